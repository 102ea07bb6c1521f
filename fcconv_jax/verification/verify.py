"""Proves a converted model equal to the original: verify and assert_equivalent."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import arguments
from ..forms import pair_of_forms
from ..functions.trace import is_function
from ..linen_layers import module_path
from ..models import convert_model
from ..params import convert_opt_state, convert_params, leaf_path, restore_params
from ..plan import Form, LayerPlan, Plan
from ..variables import is_nnx_module
from .bounds import LeafComparison
from .certificate import Certificate, prepare_certificate
from .function_program import FunctionProgram, canonical_layer, function_variables
from .pair import Pair
from .report import LayerReport, Report

Progress = Callable[[str, int, int], None]
# Examples in a certificate's input: enough to tell rows of a batch apart.
_ROWS = 4


def assert_equivalent(
    model: Any, params: Any, *inputs: Any, plan: Plan, **options: Any
) -> None:
    """Asserts that a model and its converted form are the same.

    In the spirit of chex: silent when it holds, else an error that says where it does
    not. Takes what :func:`verify` takes.

    Raises:
      AssertionError: names the layer or leaf, what was got and the bound.

    Example:
      >>> import fcconv_jax as fc
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> fc.assert_equivalent(model, params, x, plan=fc.make_plan(model, x))
    """
    report = verify(model, params, *inputs, plan=plan, **options)
    if not report.passed:
        raise AssertionError("the two forms differ\n" + "\n".join(report.failures))


def verify(
    model: Any,
    params: Any,
    *inputs: Any,
    plan: Plan,
    converted_model: Any = None,
    converted_params: Any = None,
    tx: Any = None,
    gradients: bool = True,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Report:
    """Checks every claim that a conversion makes, on the device at hand.

    1. Parameters: ``converted_params`` hold the same bits, rearranged by the plan.
    2. Each layer: both forms agree to the bit on integers that leave no rounding
       (:mod:`fcconv_jax.verification.certificate`).
    3. The model on ``inputs``: outputs, and the outputs of every converted layer, lie
       within the rounding-error bound derived for this model, these parameters and
       this input (:mod:`fcconv_jax.verification.bounds`).
    4. Gradients, and the parameters after one optimizer step, likewise.
    5. A census: matrix products and convolutions of the two compiled programs.

    Args:
      model: the ``flax.linen`` or ``flax.nnx`` Module, or the function of params and
        inputs, that was planned.
      params: its params or its variables; for an NNX model an ``nnx.State``, a pure
        dict of its params, or None for the model's own. The outputs of the layers in
        between are then not compared, only the model's.
      *inputs: what it is called with.
      plan: from :func:`fcconv_jax.make_plan`.
      converted_model: what to compare with; ``convert_model(model, plan)`` if None. A
        linen Module of your own, say one written with ``nn.Conv``.
      converted_params: its params or variables; ``convert_params(params, plan)`` if
        None.
      tx: the ``optax`` optimizer of the step; SGD with momentum if None.
      gradients: whether to do 4.
      progress: called with a phase, the steps done and the steps in all.
      **kwargs: keyword arguments of ``model.apply``: ``train=``, ``rngs=``, ...

    Returns:
      A report; ``report.passed`` tells, ``print(report)`` shows.
    """
    tell = progress or (lambda phase, done, total: None)
    if converted_model is None:
        converted_model = convert_model(model, plan)
    variables = _variables(model, params)
    expected = convert_params(variables, plan)
    other = expected
    if converted_params is not None:
        other = _variables(converted_model, converted_params)
    failures = _check_params(expected, other)
    if not failures:
        failures = _check_params(variables, restore_params(other, plan))
    original = _program(model, plan, inputs, kwargs)
    changed = _program(converted_model, plan, inputs, kwargs)
    notes: list[str] = []
    # All is traced before anything runs: XLA compiles it meanwhile.
    tell("tracing", 0, 2 + gradients)
    proofs = _certificates(variables, plan)
    tell("tracing", 1, 2 + gradients)
    forward = Pair(original.run, changed.run, variables, other, notes)
    step = None
    if gradients:
        tell("tracing", 2, 2 + gradients)
        step = _pair_of_steps(original, changed, variables, other, plan, tx, notes)
    certificates = {}
    for done, (path, proof) in enumerate(proofs.items()):
        tell("certificates", done, len(proofs))
        certificates[path] = proof()
    tell("model on the input", 0, 1)
    comparisons = forward.compare()
    layers = tuple(
        LayerReport(
            path,
            layer.case,
            layer.layer,
            certificates[path],
            tuple(c for c in comparisons if c.path.startswith(f"layers/{path}/")),
        )
        for path, layer in plan.items()
    )
    outputs = tuple(c for c in comparisons if not c.path.startswith("layers/"))
    steps: tuple[LeafComparison, ...] = ()
    if step is not None:
        tell("gradients and a step", 0, 1)
        steps = tuple(step.compare())
    tell("census", 0, 1)
    counts = forward.censuses()
    return Report(
        to=plan.to,
        failed_params=tuple(failures),
        layers=layers,
        outputs=outputs,
        steps=steps,
        original=counts[0],
        converted=counts[1],
        skipped=tuple(plan.skipped.items()),
        notes=tuple(notes),
        device=str(jax.devices()[0].device_kind),
        backend=jax.default_backend(),
        jax_version=jax.__version__,
    )


class _Program:
    """A model on fixed inputs, as functions of its variables alone."""

    def __init__(self, model: Any, plan: Plan, inputs: Any, kwargs: Mapping[str, Any]):
        self.model, self.plan = model, plan
        self.arrays, self.static = arguments.split((inputs, dict(kwargs)))

    def _apply(self, variables: Any, **extra: Any) -> Any:
        args, kwargs = self.static.merge(self.arrays)
        return self.model.apply(variables, *args, **{**kwargs, **extra})

    def run(self, variables: Any) -> dict[str, Any]:
        """Output, updated collections, and the outputs of every planned layer."""
        _, kwargs = self.static.merge(self.arrays)
        mutable = kwargs.get("mutable", False)
        collections = [mutable] if isinstance(mutable, str) else list(mutable or ())
        out, updated = self._apply(
            variables,
            mutable=[*collections, "intermediates"],
            capture_intermediates=self._is_planned,
        )
        captured = updated.get("intermediates", {})
        layers = {}
        for path in self.plan:
            node = captured
            for name in path.split("/") if path else ():
                node = node.get(name, {})
            calls = node.get("__call__", ())
            layers[path] = {str(i): y for i, y in enumerate(calls)}
        rest = {name: updated[name] for name in collections if name in updated}
        return {"output": out, "updated": rest, "layers": layers}

    def _is_planned(self, module: nn.Module, method: str) -> bool:
        return method == "__call__" and module_path(module) in self.plan

    def call(self, variables: Any) -> Any:
        """The output alone."""
        return self._apply(variables)


def _program(model: Any, plan: Plan, inputs: Any, kwargs: Mapping[str, Any]) -> Any:
    """A model of either kind on fixed inputs."""
    if is_nnx_module(model):
        from .nnx_program import NnxProgram

        return NnxProgram(model, inputs, kwargs)
    if is_function(model):
        return FunctionProgram(model, inputs, kwargs)
    return _Program(model, plan, inputs, kwargs)


def _gradient(program: Any, variables: Any) -> Any:
    """Gradient of a fixed random projection of the float outputs."""

    def loss(params: Any) -> Any:
        out = program.call({**variables, "params": params})
        floats = [
            leaf
            for leaf in jax.tree.leaves(out)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        ]
        rng, signs = np.random.default_rng(0), np.array([-1, 1], np.int8)
        return sum(
            jnp.sum(jnp.real(leaf) * rng.choice(signs, leaf.shape)) for leaf in floats
        )

    return jax.grad(loss)(variables["params"])


def _variables(model: Any, params: Any) -> Mapping[str, Any]:
    if is_nnx_module(model):
        from .nnx_program import nnx_variables

        return nnx_variables(model, params)
    if is_function(model):
        return function_variables(params)
    is_variables = isinstance(params, Mapping) and "params" in params
    return params if is_variables else {"params": params}


def _check_params(want: Any, got: Any) -> list[str]:
    """Names each leaf of two trees that is not the same to the bit."""
    import chex

    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(want, got)
    except AssertionError as error:
        return [f"parameters: {error}"]
    failures = []
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got)
    ):
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            continue
        a, b = np.asarray(a), np.asarray(b)
        differ = _bits(a) != _bits(b)
        if differ.any():
            index = tuple(int(i) for i in np.argwhere(differ)[0][: a.ndim])
            failures.append(
                f"parameters: {leaf_path(path)!r} is {b[index]!r} at {index}, expected "
                f"{a[index]!r} (the same bits, rearranged)"
            )
    return failures


def _bits(array: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.reshape(*array.shape, -1) if array.size else flat


def _certificates(
    variables: Mapping[str, Any], plan: Plan
) -> dict[str, Callable[[], Certificate]]:
    """What gives the certificate of each layer; layers that are alike share one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(variables["params"]))
    dtypes = {leaf_path(path): jnp.result_type(leaf) for path, leaf in leaves}
    known: dict[Any, Callable[[], Certificate]] = {}
    found = {}
    for path, layer in plan.items():
        # A tied kernel is stored under another path, in the dtype of its model.
        leaf = "/".join(part for part in (path, layer.leaves[0][0]) if part)
        dtype = dtypes.get(leaf, next(iter(dtypes.values())))
        key = (layer, dtype)
        if key not in known:
            known[key] = functools.cache(_certification(layer, plan.to, dtype))
        found[path] = known[key]
    return found


def certify_layer(
    layer: LayerPlan,
    to: Form,
    dtype: Any = jnp.float32,
    *,
    preferred_element_type: Any = None,
    **options: Any,
) -> Certificate:
    """Certifies that a layer's two forms are the same map, to the bit.

    Args:
      layer: the layer's plan.
      to: the form that the plan goes to.
      dtype: dtype of input and parameters; quantised ones too, such as ``int8`` and
        ``float8_e4m3fn``.
      preferred_element_type: dtype of the product's sums, such as ``int32``.
      **options: of :func:`fcconv_jax.verification.certificate.certify`.

    Example:
      >>> import fcconv_jax as fc
      >>> plan = fc.make_plan(nn.Dense(3), jnp.ones((2, 4)))
      >>> certify_layer(plan[""], plan.to).passed
      True
    """
    return _certification(layer, to, dtype, preferred_element_type, **options)()


def _certification(
    layer: LayerPlan,
    to: Form,
    dtype: Any,
    preferred_element_type: Any = None,
    **options: Any,
) -> Callable[[], Certificate]:
    if layer.is_product:
        layer = canonical_layer(layer, to)
    source, target = pair_of_forms(
        layer,
        to,
        precision=options.get("precision"),
        preferred_element_type=preferred_element_type,
    )
    bias = layer.bias
    if to == "conv":
        groups = (layer.groups,) if layer.groups > 1 else ()
        *window, channels, _ = layer.channels_last(layer.kernel.target)
        reduction = math.prod(window) * channels
        rest = (*groups, reduction)
        index = np.broadcast_to(np.arange(reduction), rest)
    else:
        rest = layer.input_shape[-1 - len(layer.window) :]
        reduction = math.prod(layer.kernel.source[:-1])
        index = _window_index(layer, rest)
    return prepare_certificate(
        source,
        target,
        x=jax.ShapeDtypeStruct((_ROWS, *rest), dtype),
        kernel=jax.ShapeDtypeStruct(layer.kernel.source, dtype),
        # Added to the sums: narrow floats do not promote.
        bias=None
        if bias is None
        else jax.ShapeDtypeStruct(bias.source, preferred_element_type or dtype),
        map_kernel=layer.kernel,
        map_bias=bias or (lambda none: none),
        reduction=reduction,
        reduction_index=index,
        **options,
    )


def _window_index(layer: LayerPlan, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers the entries of an image by their place in the window that covers them."""
    per_group = shape[-1] // layer.groups
    index = np.zeros(shape, int)
    for axis, size in enumerate(layer.window):
        place = np.arange(shape[axis]) % size
        index = index * size + place.reshape(-1, *[1] * (len(shape) - axis - 1))
    return index * per_group + np.arange(shape[-1]) % per_group


def _pair_of_steps(
    original: Any,
    changed: Any,
    variables: Mapping[str, Any],
    other: Mapping[str, Any],
    plan: Plan,
    tx: Any,
    notes: list[str],
) -> Pair | None:
    """Gradients, and the parameters after one optimizer step."""
    import optax

    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(variables["params"])]
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        notes.append("no gradients: some params are not floats")
        return None
    tx = optax.sgd(1e-2, momentum=0.9) if tx is None else tx
    state = jax.jit(tx.init)(variables["params"])
    other_state = convert_opt_state(state, plan, tx=tx, params=variables["params"])

    def step(program: _Program, variables: Any, state: Any) -> dict[str, Any]:
        grads = _gradient(program, variables)
        updates, _ = tx.update(grads, state, variables["params"])
        return {
            "gradient": grads,
            "params": optax.apply_updates(variables["params"], updates),
        }

    def restored(variables: Any) -> Any:
        after = step(changed, variables, other_state)
        return {name: restore_params(tree, plan) for name, tree in after.items()}

    return Pair(lambda v: step(original, v, state), restored, variables, other, notes)
