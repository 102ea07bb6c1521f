"""One call of a model, bound: its params, inputs and keyword arguments in one value."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import PyTree

from ..backends.compilation import Program
from ..backends.name import Device
from ..messages.errors import PlanError
from ..messages.user_code import explained
from ..params.leaves import flatten_with_path, leaf_path
from ..params.moves import map_leaves
from ..plan import Form, KernelLayout, Plan
from ..plan.paths import join_path
from ..plan.rules import Rule, as_rules, require_traceable
from ..planning.layouts import lay_out
from ..planning.mesh_layouts import for_mesh
from ..tracing import arguments
from ..tracing.inputs_read import inputs_read


def as_given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of a call whose caller passes all of them."""
    return args


class OnCrops(NamedTuple):
    """A model as a function whose last positional argument is a batch of crops.

    Attributes:
      function: the function.
      complete: puts the variables of a model that holds them before a call's arguments.
      first_spatial_axis: of the crops, where the library has one layout of images.
      bind: binds the model to all that the function takes; None for JAX's own models,
        which need no :meth:`BoundModel.check_library`.
    """

    function: Callable[..., Any]
    complete: Callable[[tuple[Any, ...]], tuple[Any, ...]] = as_given
    first_spatial_axis: int = 1
    bind: Callable[..., BoundModel] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class BoundModel(abc.ABC):
    """A model with its params, inputs and keyword arguments; immutable.

    Made by :func:`fcconv_jax.frontends.bind.bind`, which picks the front end of the
    model's library: a subclass of this one. Everything else takes the bound model, and
    never asks which library the model is of.

    Args:
      model: as the user passes it.
      params: likewise; None for those that the model holds, or, where it holds none,
        for their shapes.
      args: the inputs, without the params; arrays, which may be abstract.
      kwargs: keyword arguments of the call.
      given: the variables, where they are known already.
    """

    model: Any
    params: PyTree = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: Mapping[str, Any] | None = None

    library: ClassVar[str]
    # Whether the jit of a converted model sets the compiler options of its plan.
    takes_options: ClassVar[bool] = True
    # Behind the batch, or behind the batch and the channels.
    first_spatial_axis: ClassVar[int] = 1
    # How the library stores kernels.
    kernel_layout: ClassVar[KernelLayout] = "HWIO"
    # Whether checkpoints hold the names of collections above those of the leaves.
    stores_collections: ClassVar[bool] = False
    # Whether they hold other variables among the params, such as sown values.
    mixes_variables: ClassVar[bool] = False

    # What to pass where a tree of params is wanted and the model is none; else empty.
    params_of: ClassVar[str] = ""

    # How the library's models are recognised, and called.

    @classmethod
    def classes(cls) -> tuple[type, ...]:
        """The classes that the library's models are instances of."""
        return ()

    @classmethod
    def owns(cls, model: object) -> bool:
        """Whether a value is a model of this library, converted ones included.

        Raises:
          TypeError: it holds such a model in a way that hides its params.
        """
        return isinstance(model, cls.classes())

    @classmethod
    def class_options(cls, model_class: type) -> dict[str, Any]:
        """Return the arguments of a model class that needs no settings."""
        del model_class
        return {}

    @classmethod
    def planned(cls, model: object, args: Sequence[Any], kwargs: PyTree) -> BoundModel:
        """The model with the arguments that ``make_plan`` takes: its inputs."""
        return cls(model, None, tuple(args), kwargs)

    @classmethod
    def called(cls, model: object, args: Sequence[Any], kwargs: PyTree) -> BoundModel:
        """The model with all that a call takes: its inputs, if it holds params."""
        return cls(model, None, tuple(args), kwargs)

    @classmethod
    @abc.abstractmethod
    def on_crops(cls, model: object) -> OnCrops:
        """What ``slide`` runs on crops."""

    def bound_on_crops(self) -> OnCrops:
        """The same of a bound model, whose variables and keyword arguments stay."""

        def call(variables: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
            return self._call(variables, args, {**self.kwargs, **kwargs})

        def bind(variables: PyTree, *args: Any, **kwargs: Any) -> BoundModel:
            given = {**self.kwargs, **kwargs}
            return dataclasses.replace(self, args=args, kwargs=given, given=variables)

        call.__name__ = type(self.model).__name__
        return OnCrops(
            *(call, lambda args: (self.variables, *args)),
            *(self.first_spatial_axis, bind),
        )

    @classmethod
    @abc.abstractmethod
    def convert_model(cls, model: object, plan: Plan) -> Any:
        """The model in the plan's form."""

    @classmethod
    def convert_in_place(cls, model: object, plan: Plan) -> Any:
        """Convert a model that holds its params, layer by layer.

        Raises:
          TypeError: models of this library can't be changed.
        """
        del plan
        raise TypeError(
            f"Expected an NNX model for inplace=True, got a {type(model).__name__}. "
            "Drop inplace=; params that keep their order aren't copied."
        )

    # Keyword arguments of a call that the library adds to those of the model.
    more_options: ClassVar[tuple[str, ...]] = ()

    def accepts(self) -> tuple[set[str], bool]:
        """Names of the call's parameters, and whether it takes any keyword."""
        method = self.kwargs.get("method")
        if isinstance(method, str):
            if not hasattr(self.model, method):
                raise PlanError(
                    "Expected method= as a method's name of "
                    f"{type(self.model).__name__}, got {method!r}. Drop it to call it."
                )
            method = getattr(self.model, method)
        try:
            found = inspect.signature(method or self.call_of()).parameters.values()
        except (TypeError, ValueError):  # such as a function written in C
            return set(), True
        takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
        return {*(p.name for p in found), *self.more_options}, takes_any

    def call_of(self) -> Callable[..., Any]:
        """The function that a call runs, with its signature."""
        return self.model

    # The parts of the call.

    @functools.cached_property
    def variables(self) -> Mapping[str, Any]:
        """The params in ``params``, and other state in collections beside them."""
        return self._variables() if self.given is None else self.given

    @abc.abstractmethod
    def _variables(self) -> Mapping[str, Any]: ...

    @functools.cached_property
    def _split(self) -> tuple[list[Any], arguments.Static]:
        return arguments.split((self.args, dict(self.kwargs)))

    @property
    def arrays(self) -> list[Any]:
        """The arrays among the inputs and the keyword arguments."""
        return self._split[0]

    @property
    def held(self) -> PyTree:
        """Arrays of the model that decide on which devices it is planned for."""
        return ()

    @functools.cached_property
    def shapes(self) -> Mapping[str, Any]:
        """The variables as ``jax.ShapeDtypeStruct``, out of their boxes."""
        variables = nn.meta.unbox(self.variables)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables
        )

    def stored_paths(self, variables: Mapping[str, Any]) -> list[str]:
        """Where a checkpoint has each array of some variables, in their order."""
        paths = [
            path
            for path, leaf in flatten_with_path(variables)[0]
            for _ in jax.tree.leaves(leaf)
        ]
        if self.stores_collections:
            return paths
        return [path.partition("/")[2] for path in paths]

    @classmethod
    def levels(cls, path: str) -> tuple[str, ...]:
        """Split the path of an array, in the model or in a checkpoint of it."""
        return tuple(path.split("/"))

    def layer_dtypes(self, plan: Plan) -> dict[str, Any]:
        """Return the dtype of each layer of a plan: that of its kernel."""
        variables = self.variables
        tree = meta.unbox(variables.get("params", variables))
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        dtypes = {leaf_path(path): jnp.result_type(leaf) for path, leaf in leaves}
        # A tied kernel is stored under another path, in the dtype of its model.
        other = next(iter(dtypes.values()), None)
        kernels = {path: layer.leaves[0][0] for path, layer in plan.items()}
        return {
            path: dtypes.get(join_path(path, kernel), other)
            for path, kernel in kernels.items()
        }

    @functools.cached_property
    def reads(self) -> list[bool]:
        """Whether the output depends on each array of the variables, in their order."""
        return inputs_read(jax.make_jaxpr(self.output)(self.shapes, self.arrays))

    @functools.cached_property
    def traced(self) -> tuple[Any, Any]:
        """The trace of :meth:`call`, and the shapes of what it returns."""
        trace = jax.make_jaxpr(self.call, return_shape=True)
        return trace(self.variables, self.arrays)

    def with_variables(self, variables: Mapping[str, Any]) -> BoundModel:
        """The same call with other variables."""
        return dataclasses.replace(self, given=variables)

    def with_arrays(self, arrays: Sequence[Any]) -> BoundModel:
        """The same call on other inputs."""
        args, kwargs = self._split[1].merge(arrays)
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def drawn(self, seed: int) -> BoundModel:
        """The same call with params drawn at random, unless the model holds its own."""
        del seed
        return self

    def on(self, device: Device) -> BoundModel:
        """The same call with all arrays on one device."""
        variables, arrays = jax.device_put((self.variables, self.arrays), device)
        return self.with_variables(variables).with_arrays(arrays)

    # What can be done with it.

    def plan(
        self,
        to: Form = "conv",
        rules: Iterable[Rule | str] = (),
        backend: str | None = None,
    ) -> Plan:
        """The plan of the model; see :func:`fcconv_jax.make_plan`."""
        if to not in ("conv", "dense"):
            raise PlanError(
                f"Expected to='conv' or to='dense', got {to!r:.60}. Pass to='conv'."
            )
        chosen = as_rules(rules)
        require_traceable(chosen, to)
        with self.explaining():
            plan = self._plan(to, chosen)
        # Where the arrays lie decides: params on a GPU want its layouts.
        arrays = (self.held, self.args)
        plan = lay_out(plan, chosen, backend, arrays, self.kernel_layout)
        return for_mesh(plan, arrays, self.args, chosen)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Explain the failure of a call on what can't be its inputs."""
        with explained():
            try:
                yield
            except Exception as error:
                self._explain_inputs(error)
                raise

    def _explain_inputs(self, error: Exception) -> None:
        if not self.args and isinstance(error, TypeError):
            raise PlanError(
                f"Expected the inputs of the call, got none ({error}). Pass arrays or "
                "abstract arrays after the model and the params, if any."
            ) from error
        for arg in self.args:
            if isinstance(arg, tuple) and arg and all(type(n) is int for n in arg):
                raise PlanError(
                    f"Expected arrays or abstract arrays as inputs, got the tuple "
                    f"{arg}. Pass jax.ShapeDtypeStruct({arg}, jnp.float32) for that "
                    "shape."
                ) from error
            if isinstance(arg, str) and arg in ("conv", "dense"):
                raise PlanError(
                    f"Expected arrays or abstract arrays as inputs, got {arg!r}. Pass "
                    f"the form by name: to={arg!r}."
                ) from error
            if isinstance(arg, Plan):
                raise PlanError(
                    "Expected arrays or abstract arrays as inputs, got a Plan. Pass it "
                    "by name: plan=plan."
                ) from error
            variables = isinstance(arg, Mapping) and "params" in arg
            if variables or isinstance(arg, str) or not arguments.split(arg)[0]:
                fix = "Pass numpy.asarray(...) of it."
                if isinstance(arg, Mapping):
                    fix = "Pass what the model is called on alone, without params."
                raise PlanError(
                    "Expected arrays or abstract arrays as inputs, got a "
                    f"{type(arg).__name__}. {fix}"
                ) from error
        if any(array.dtype == object for array in self.arrays):
            raise PlanError(
                "Expected arrays of numbers as inputs, got one of Python objects. Pass "
                "numpy.asarray(x, numpy.float32)."
            ) from error
        if isinstance(error, ZeroDivisionError):
            name = type(self.model).__name__
            shapes = ", ".join(str(tuple(array.shape)) for array in self.arrays)
            raise PlanError(
                f"Expected positive sizes, got 0 from {name} on inputs of shape "
                f"{shapes}. Pass larger inputs."
            ) from error

    @abc.abstractmethod
    def _plan(self, to: Form, rules: Sequence[Rule]) -> Plan: ...

    def convert(self, plan: Plan) -> BoundModel:
        """The same call of the converted model, with converted variables."""
        model = self.convert_model(self.model, plan)
        return dataclasses.replace(
            self, model=model, given=map_leaves(self.variables, plan)
        )

    def call(self, variables: PyTree, arrays: PyTree = None) -> PyTree:
        """Return the output of a call, with the state that it changes.

        Args:
          variables: in the place of the model's.
          arrays: in the place of those among the inputs; None for the same.
        """
        return self._call(variables, *self._arguments(arrays))

    def output(self, variables: PyTree, arrays: PyTree = None) -> PyTree:
        """Return the output of a call alone; arguments as for :meth:`call`."""
        return self._call(variables, *self._arguments(arrays))

    def named(
        self, variables: PyTree, arrays: PyTree, wanted: Callable[[str], bool]
    ) -> PyTree:
        """The same, with the outputs of modules named in the trace.

        Args:
          variables: as for :meth:`call`.
          arrays: likewise.
          wanted: whether the module at a path is to be named.
        """
        del wanted
        return self.call(variables, arrays)

    @abc.abstractmethod
    def _call(self, variables: PyTree, args: PyTree, kwargs: PyTree) -> Any: ...

    def _arguments(self, arrays: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._split[1].merge(self.arrays if arrays is None else arrays)

    def check_inference(self) -> None:
        """Refuse a model in training mode, whose calls change its state.

        Raises:
          PlanError: names the state, and the fix.
        """
        return  # Flax and Haiku refuse by themselves; adapters run for inference.

    def check_library(self) -> None:
        """Refuse a model that another library than JAX runs with other results.

        Raises:
          PlanError: names the first module whose results differ, and a workaround.
        """
        return  # JAX runs the models of all other libraries.

    def program(self) -> Program:
        """The call as it is compiled: inputs are arguments, not constants."""
        return Program(self.call, (self.variables, self.arrays))


@dataclasses.dataclass(frozen=True)
class BothForms:
    """A bound model and its converted form, on the same inputs."""

    plan: Plan
    original: BoundModel
    changed: BoundModel

    @property
    def variables(self) -> Mapping[str, Any]:
        """Those of the original."""
        return self.original.variables

    @property
    def other(self) -> Mapping[str, Any]:
        """Those of the converted model."""
        return self.changed.variables

    def by_form(self) -> dict[str, Program]:
        """Return the two programs, under 'original' and 'converted'."""
        return {
            "original": self.original.program(),
            "converted": self.changed.program(),
        }

    def on(self, device: Device) -> BothForms:
        """The same with all arrays on one device."""
        return BothForms(self.plan, self.original.on(device), self.changed.on(device))
