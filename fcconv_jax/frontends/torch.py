"""PyTorch Modules, as they are, run by JAX through torchax.

Inputs and outputs keep PyTorch's layouts (NCHW), params those of its ``state_dict``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..messages.extras import require
from ..plan import Form, Plan
from ..plan.rules import Rule
from ..tracing.marks import name_output
from .held import BoundHeld, ConvertedModel

# Type checkers take "import torch" for this very file where PyTorch is not installed.
torch: Any = import_module("torch")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundTorch(BoundHeld):
    """A ``torch.nn.Module`` in eval mode; params are a ``state_dict``."""

    library = "torch"
    first_spatial_axis = 2
    kernel_layout = "OIHW"
    params_of = "its state_dict()"

    def __post_init__(self) -> None:
        """Takes tensors among the inputs as arrays."""
        args, kwargs = _as_arrays((tuple(self.args), dict(self.kwargs)))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """Modules."""
        return (torch.nn.Module,)

    def call_of(self) -> Callable[..., Any]:
        """The Module's ``forward``."""
        return getattr(self.model, "forward", self.model)

    @classmethod
    def split(cls, model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Parameters and buffers by their names in the ``state_dict``.

        Raises:
          TypeError: a submodule is in training mode.
          MissingExtraError: torchax is not installed.
        """
        _require_eval(model)
        torchax = require("torchax", "torch", "Running a torch.nn.Module")
        # Tied weights stay apart, as they do in a state_dict.
        values, run = torchax.extract_jax(model, dedup_parameters=False)
        learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}

        def call(params: PyTree, state: Any, *args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                # torchax asks for the 64 bits of PyTorch's integers.
                warnings.filterwarnings("ignore", "Explicitly requested dtype")
                try:
                    return _as_tree(run({**params, **state}, args, kwargs))
                except Exception as error:
                    _explain(error, type(model).__name__)
                    raise

        call.__name__ = type(model).__name__
        params = {name: x for name, x in values.items() if name in learned}
        state = {name: x for name, x in values.items() if name not in learned}
        return call, {"params": params, "state": state}

    @classmethod
    def split_params(cls, model: Any, params: PyTree) -> dict[str, Any]:
        """A ``state_dict``, of tensors or arrays, all of it."""
        _, own = cls.split(model)
        missing = [name for name in model.state_dict() if name not in params]
        if missing:
            raise TypeError(
                f"Expected the whole state_dict, got none for {missing[0]!r}. Pass "
                "model.state_dict()."
            )
        given = _as_arrays(dict(params))
        return {
            key: {name: given.get(name, own) for name, own in tree.items()}
            for key, tree in own.items()
        }

    def _plan(self, to: Form, rules: Sequence[Rule]) -> Plan:
        plan = super()._plan(to, rules)
        if isinstance(self.model, ConvertedModel):
            return plan
        layers, left = dict(plan.layers), dict(plan.left)
        for names in _tied(self.model):
            moves = {layers[name].leaves if name in layers else None for name in names}
            if len(moves) == 1:
                continue
            for name in names & layers.keys():
                del layers[name]
                others = ", ".join(repr(each) for each in sorted(names - {name}))
                left[name] = (
                    f"tied to {others}, which does not convert alike: one array cannot "
                    "have both shapes. Untie it first (a clone of the Parameter)"
                )
        return dataclasses.replace(
            plan, layers=tuple(layers.items()), left=tuple(left.items())
        )

    def named(
        self, variables: PyTree, arrays: Any, wanted: Callable[[str], bool]
    ) -> Any:
        """The same call, with the outputs of submodules named by forward hooks."""
        if isinstance(self.model, ConvertedModel):
            return self.call(variables, arrays)
        env = require("torchax", "torch", "Running a torch.nn.Module").default_env()

        def hook(path: str) -> Callable[..., Any]:
            def named(module: Any, args: Any, out: Any) -> Any:
                del module, args
                if not isinstance(out, torch.Tensor):
                    return out
                return env.j2t_iso(name_output(path, env.t2j_iso(out)))

            return named

        hooks = [
            each.register_forward_hook(hook(path))
            for path, each in self.model.named_modules()
            if path and wanted(path)
        ]
        try:
            return self.call(variables, arrays)
        finally:
            for each in hooks:
                each.remove()


def _require_eval(model: Any) -> None:
    # What torch.export returns has one mode, that of the Module it was made from.
    exported = isinstance(model, torch.fx.GraphModule)
    training = [name for name, each in model.named_modules() if each.training]
    if training and not exported:
        raise TypeError(
            f"Expected a Module in eval mode, got a {type(model).__name__} in "
            f"training mode (at {training[0]!r}). Call model.eval(); on the command "
            "line, name a function that makes the model and does so."
        )


def _tied(model: Any) -> Iterator[set[str]]:
    """Yield the names of each Parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(each), set()).add(name)
    yield from (each for each in names.values() if len(each) > 1)


def _as_arrays(tree: PyTree) -> Any:
    def as_array(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # DLPack would keep the 64 bits of token ids, with which JAX does not compute.
        narrow = jax.dtypes.canonicalize_dtype(str(leaf.dtype).removeprefix("torch."))
        leaf = leaf.detach().cpu().to(getattr(torch, narrow.name))
        return jax.dlpack.from_dlpack(leaf.contiguous())

    return jax.tree.map(as_array, tree)


def _as_tree(out: Any) -> Any:
    """Return an output as JAX takes it: transformers' as the dicts that they are."""
    if isinstance(out, Mapping):
        return {name: _as_tree(x) for name, x in out.items() if x is not None}
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*map(_as_tree, out))
    if isinstance(out, list | tuple):
        return type(out)(map(_as_tree, out))
    if out is None or isinstance(out, jax.Array | bool | int | float | complex):
        return out
    raise TypeError(
        f"Expected outputs of tensors, got {type(out).__name__}. Leave it out, such as "
        "by use_cache=False, or wrap the Module in one that returns the tensors."
    )


def _explain(error: Exception, name: str) -> None:
    """Name the operation that torchax lacks, and the way round."""
    if type(error).__name__ != "OperatorNotFound":
        return
    operation = str(error).partition("name ")[2].partition(" has")[0] or str(error)
    raise PlanError(
        f"Expected operations that torchax runs, got {operation} in {name}. Export "
        "the Module to simpler operations first, and pass the result: "
        "torch.export.export(model, (x,)).run_decompositions().module(). If that has "
        "it, too, write it in other operations."
    ) from error


FRONTEND = BoundTorch
