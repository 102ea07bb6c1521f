"""PyTorch Modules, as they are, run by JAX through torchax.

Inputs and outputs keep PyTorch's layouts (NCHW), params those of its ``state_dict``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..messages.extras import require
from ..messages.user_code import NEEDS_A_VALUE, users_line
from ..plan import Form, Plan
from ..plan.rules import Rule
from ..tracing.marks import name_output
from .held import BoundHeld, ConvertedModel
from .torch_agreement import (
    after_submodules,
    as_numpy,
    as_tensors,
    recording,
    require_agreement,
)

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
        env = _environment()
        learned = dict(model.named_parameters(remove_duplicate=False))
        held = {**dict(model.named_buffers(remove_duplicate=False)), **_unnamed(model)}
        params, state = env.t2j_copy((_detached(learned), _detached(held)))

        call = functools.partial(_call, model)  # pickles, as a closure doesn't
        call.__name__ = type(model).__name__  # pyright: ignore[reportAttributeAccessIssue]
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

    @classmethod
    def levels(cls, path: str) -> tuple[str, ...]:
        """Split at dots, too: files nest what a state_dict keeps flat."""
        return tuple(path.replace(".", "/").split("/"))

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
        self, variables: PyTree, arrays: PyTree, wanted: Callable[[str], bool]
    ) -> PyTree:
        """The same call, with the outputs of submodules named by forward hooks."""
        if isinstance(self.model, ConvertedModel):
            return self.call(variables, arrays)
        env = _environment()

        def name(path: str, out: Any) -> Any:
            return env.j2t_iso(name_output(path, env.t2j_iso(out)))

        with after_submodules(self.model, name, wanted):
            return self.call(variables, arrays)

    def check_library(self) -> None:
        """Compare with PyTorch's own result, where there are values."""
        variables, arrays = self.variables, self.arrays
        leaves = jax.tree.leaves((variables, arrays))
        present = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
        if isinstance(self.model, ConvertedModel) or not present:
            return

        def by_torchax(record: bool) -> dict[str, Any]:
            def run(variables: PyTree, arrays: PyTree) -> dict[str, Any]:
                with recording(self.model, record) as found:
                    out = self.output(variables, arrays)
                return {**_environment().t2j_iso(found), "": out}

            with jax.default_matmul_precision("highest"):
                return jax.jit(run)(variables, arrays)

        def by_torch(wide: bool) -> Callable[[bool], dict[str, Any]]:
            def run(record: bool) -> dict[str, Any]:
                merged = {**variables["params"], **variables["state"]}
                call = (merged, *self._arguments(None))
                values, args, kwargs = as_tensors(call, wide)
                with torch.no_grad(), recording(self.model, record) as found:
                    out = torch.func.functional_call(
                        self.model, values, args, kwargs, tie_weights=False
                    )
                return {
                    p: _as_tree(x, as_numpy) for p, x in (*found.items(), ("", out))
                }

            return run

        require_agreement(self.model, by_torchax, by_torch)


def _require_eval(model: Any) -> None:
    for wrapper, inner in (
        ("OptimizedModule", "_orig_mod"),
        ("DataParallel", "module"),
    ):
        if type(model).__name__ == wrapper:
            raise TypeError(
                f"Expected the Module itself, got {wrapper}. Pass model.{inner}."
            )
    # What torch.export returns has one mode, that of the Module it was made from.
    exported = isinstance(model, torch.fx.GraphModule)
    training = [name for name, each in model.named_modules() if each.training]
    if training and not exported:
        raise TypeError(
            f"Expected a Module in eval mode, got a {type(model).__name__} in training "
            f"mode (at {training[0]!r}). Call model.eval() first; on the command line, "
            "pass a function that does so and returns the model."
        )


@functools.cache
def _environment() -> Any:
    """Return an environment of torchax, with its grouped convolutions corrected."""
    require("torchax", "torch", "Running a torch.nn.Module")
    env = import_module("torchax.tensor").Environment()

    def convolve(*args: PyTree) -> PyTree:
        return env.j2t_iso(_convolve(*env.t2j_iso(args)))

    env.override_op_definition(torch.ops.aten.convolution, convolve)
    return env


def _convolve(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    """Compute ``aten::convolution``.

    torchax 0.0.14 reads the kernel of a transposed convolution with groups, ``(in, out
    / groups, *window)``, as if its input channels were not sorted by group.
    """
    window = weight.shape[2:]
    rank = len(window)
    kernel, pads = weight, [(p, p) for p in padding]
    spec = (*range(rank + 2),)
    kernel_spec = spec
    if transposed:
        # A transposed convolution applies its kernel from the other end.
        kernel = jnp.flip(weight, spec[2:])
        kernel_spec = (1, 0, *spec[2:])
        if groups > 1:
            split = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(0, 1)
            kernel = split.reshape(len(split), -1, *window)
        reach = [d * (k - 1) for d, k in zip(dilation, window)]
        ends = zip(reach, padding, output_padding)
        pads = [(far - p, far - p + more) for far, p, more in ends]
    y = lax.conv_general_dilated(
        # PyTorch takes an example without a batch.
        x if x.ndim > rank + 1 else x[None],
        kernel,
        (1,) * rank if transposed else strides,
        pads,
        lhs_dilation=strides if transposed else None,
        rhs_dilation=dilation,
        dimension_numbers=lax.ConvDimensionNumbers(spec, kernel_spec, spec),
        feature_group_count=groups,
    )
    if bias is not None:
        y = y + bias.reshape(1, -1, *(1,) * rank)
    return y if x.ndim > rank + 1 else y[0]


def _unnamed(model: Any) -> dict[str, Any]:
    """Return the tensors that submodules hold as plain attributes."""
    found = {}
    for path, each in model.named_modules():
        for name in dir(each):
            # Properties, such as a parametrized weight, are computed from the others.
            value = inspect.getattr_static(each, name, None)
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _detached(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


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


def _as_tree(out: PyTree, leaf: Callable[[Any], Any] | None = None) -> Any:
    """Return an output as JAX takes it: transformers' as the dicts that they are."""
    if isinstance(out, torch.Tensor):
        return _environment().t2j_iso(out) if leaf is None else leaf(out)
    if isinstance(out, Mapping):
        return {name: _as_tree(x, leaf) for name, x in out.items() if x is not None}
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*(_as_tree(x, leaf) for x in out))
    if dataclasses.is_dataclass(out):
        fields = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
        return _as_tree(fields, leaf)
    if isinstance(out, list | tuple):  # such as what Tensor.topk returns
        return (list if isinstance(out, list) else tuple)(
            _as_tree(x, leaf) for x in out
        )
    if out is None or isinstance(out, jax.Array | bool | int | float | complex):
        return out
    raise TypeError(
        f"Expected outputs of tensors, got {type(out).__name__}. Disable it, such as "
        "with use_cache=False, or wrap the Module in one that returns tensors only."
    )


def _explain(error: Exception, name: str) -> None:
    """Name what torchax cannot run, and the way round."""
    line = users_line(error)
    at = f" at {line}" if line else ""
    if type(error).__name__ == "OperatorNotFound":
        operation = str(error).partition("name ")[2].partition(" has")[0] or str(error)
        raise PlanError(
            f"Expected operations that torchax runs, got {operation} in {name}. Export "
            "the Module to simpler operations first, and pass the result: "
            "torch.export.export(model, (x,)).run_decompositions().module(). If the "
            "result has it, too, replace the operation."
        ) from error
    if isinstance(error, NEEDS_A_VALUE):
        raise PlanError(
            "Expected operations that do not depend on the inputs' values, got "
            f"{name}, which reads one{at or ' in torchax'}. Use torch.where instead of "
            "if, and tensors instead of item(), tolist() and numpy()."
        ) from error
    if isinstance(error, AssertionError) and "mixed math" in str(error):
        raise PlanError(
            f"Expected parameters, buffers or attributes as tensors, got others in "
            f"{name}{at}. Call register_buffer for tensors in lists and globals."
        ) from error


def _call(
    model: Any, params: PyTree, state: PyTree, *args: PyTree, **kwargs: PyTree
) -> Any:
    env = _environment()
    with warnings.catch_warnings():
        # torchax asks for the 64 bits of PyTorch's integers.
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        try:
            given = env.j2t_iso(({**params, **state}, args, kwargs))
            with env:
                # Tied weights stay apart, as they do in a state_dict.
                out = torch.func.functional_call(model, *given, tie_weights=False)
            return _as_tree(out)
        except Exception as error:
            _explain(error, type(model).__name__)
            raise


FRONTEND = BoundTorch
