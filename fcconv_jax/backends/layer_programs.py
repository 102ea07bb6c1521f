"""Compiles the two forms of each layer of a plan, each as a program of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..messages.errors import BackendError
from ..params.layer_dtypes import layer_dtypes
from ..plan import Form, LayerPlan, Plan, other_form
from ..plan.layer_forms import canonical_layer, pair_of_forms
from .compilation import (
    TIMEOUT,
    Compilation,
    Compiling,
    Program,
    compile_present,
)
from .layer_comparison import FORMS, CompiledLayers, LayerPrograms
from .name import Backend
from .resolution import Resolution, resolve
from .timing import milliseconds


def compile_layers(
    plan: Plan,
    backend: str | Backend,
    *,
    only: Sequence[str] | None = None,
    params: Any = None,
    dtype: Any = None,
    timeout: float = TIMEOUT,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompiledLayers:
    """Compiles both forms of each layer of a plan, each as a program of its own.

    The input has the shape that the layer had when it was planned. Where a device of
    the backend is present both programs are run, and timed.

    Args:
      plan: from :func:`fcconv_jax.make_plan`; ``backend=`` gives it the layouts that
        are quickest there.
      backend: such as ``"cpu"``, ``"tpu:v5e"`` or ``"cuda:h100"``.
      only: the paths of the layers to compile; all of the plan if None.
      params: params or variables of the model in the form that the plan starts from,
        arrays or abstract ones; each layer has the dtype of its kernel.
      dtype: of every layer instead; float32 where neither is given.
      timeout: seconds for compiling ahead of time.
      progress: called with a step, how many are done, and how many there are.

    Returns:
      The programs, by layer; ``print(found.answer)``.

    Raises:
      BackendError: the backend is unknown, cannot be compiled for here, or its
        compiler failed; the message names the package to install.

    Example:
      >>> import flax.linen as nn, fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)), backend="cpu")
      >>> found = compile_layers(plan, "cpu")
      >>> found[""].quantity, [step.product for step in found[""].steps["conv"]][:1]
      ('milliseconds', ['dot'])
    """
    chosen = resolve(backend)
    if chosen.how == "lowered":
        raise BackendError(f"{chosen.backend}: {chosen.reason}")
    dtypes = dict.fromkeys(plan, jnp.dtype(dtype or jnp.float32))
    if dtype is None and params is not None:
        dtypes = layer_dtypes(params, plan)
    kinds = {
        path: (dataclasses.replace(plan[path], tied=()), dtypes[path])
        for path in (plan if only is None else only)
    }
    numbers = {
        kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))
    }
    programs = {
        f"{number}_{form}": program
        for (layer, layer_dtype), number in numbers.items()
        for form, program in layer_forms(layer, layer_dtype).items()
    }
    compiled = _compile(programs, chosen, timeout, progress)
    times = {
        number: _measure(programs, compiled, number, chosen)
        for number in numbers.values()
    }
    return CompiledLayers(
        chosen.backend,
        tuple(
            LayerPrograms(
                path,
                plan[path],
                kind[1],
                compiled[f"{numbers[kind]}_dense"],
                compiled[f"{numbers[kind]}_conv"],
                times[numbers[kind]],
            )
            for path, kind in kinds.items()
        ),
    )


def layer_forms(layer: LayerPlan, dtype: Any) -> dict[Form, Program]:
    """The two forms of a layer as programs of input, kernel and bias.

    Args:
      layer: the layer's plan.
      dtype: of input and parameters.

    Example:
      >>> import flax.linen as nn, fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)))
      >>> [x.shape for x in layer_forms(plan[""], jnp.float32)["conv"].args]
      [(2, 4), (1, 4, 3), (3,)]
    """
    to = layer.to
    if layer.is_matmul:
        layer = canonical_layer(layer)
    moves = [move for _, move in layer.leaves]
    shape = layer.input_shape if to == "dense" else layer.dense_input_shape()
    x = _abstract(shape, dtype)
    bias = [] if layer.bias else [None]
    found: dict[Form, Program] = {}
    source = other_form(to)
    for form, function, shapes in zip(
        (source, to),
        pair_of_forms(layer, to),
        ([move.source for move in moves], [move.target for move in moves]),
    ):
        args = (x, *(_abstract(shape, dtype) for shape in shapes), *bias)
        found[form] = Program(function, args)
    return found


def _abstract(shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _compile(
    programs: Mapping[str, Program],
    chosen: Resolution,
    timeout: float,
    progress: Callable[[str, int, int], None] | None,
) -> Mapping[str, Compilation]:
    tell = progress or (lambda what, done, total: None)
    if chosen.how == "executed":
        found = {}
        for name, program in programs.items():
            tell("compiling", len(found), len(programs))
            found[name] = compile_present(program, chosen)
        return found
    tell("compiling", 0, 1)
    with Compiling(programs, [chosen], timeout=timeout) as compiling:
        (outcome,) = compiling.results().values()
    if isinstance(outcome, BackendError):
        raise outcome
    return outcome


def _measure(
    programs: Mapping[str, Program],
    compiled: Mapping[str, Compilation],
    number: int,
    chosen: Resolution,
) -> Mapping[str, float]:
    """Run times of the two forms on random numbers, where the device is present."""
    if chosen.how != "executed":
        return {}
    rng = np.random.default_rng(0)
    runs: dict[str, Callable[[], Any]] = {}
    for form in FORMS:
        name = f"{number}_{form}"
        args = jax.tree.map(
            lambda leaf: jax.device_put(
                rng.standard_normal(leaf.shape).astype(leaf.dtype), chosen.device
            ),
            programs[name].args,
        )
        runs[form] = functools.partial(compiled[name].executable, *args)
    return milliseconds(runs)
