"""Training steps: layers that have two forms, beside PyTorch's, and whole models.

A step is a loss with its gradient: of a layer by its input and params, of a model by
its params. PyTorch runs the same numbers on channels-first inputs, eager and compiled,
on as many threads as there are cores, in the same race.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
from layers import find_torch, to_tensor
from running import Case, as_record, bound, largest_error, linen, race

import fcconv_jax as fc

_SECONDS = 10.0
_MODEL_SECONDS = 30.0
_BUDGET = 60.0
# PyTorch's threads wait actively for some milliseconds before they leave the cores.
_APART = 0.005
# No form that is chosen may be slower than the original beyond the noise.
_NO_SLOWER = 1.02

Array = jax.Array
Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution that is slow to differentiate on a CPU.

    Attributes:
      shape: of the input, channels last.
      features: of the output.
      window: of the kernel.
      stride: inputs per output; of a transposed convolution outputs per input.
      transposed: whether it is a transposed convolution.
    """

    shape: tuple[int, ...]
    features: int
    window: int
    stride: int = 1
    transposed: bool = False

    def model(self) -> nn.Module:
        """Return the layer."""
        sides, strides = (self.window,) * 2, (self.stride,) * 2
        if self.transposed:
            return nn.ConvTranspose(self.features, sides, strides)
        return nn.Conv(self.features, sides, strides, padding="VALID")


LAYERS = {
    "pointwise": Layer((8, 56, 56, 64), 256, 1),
    "patchify": Layer((8, 224, 224, 3), 384, 16, 16),
    "unpatchify-2": Layer((8, 32, 32, 64), 32, 2, 2, transposed=True),
    "unpatchify-16": Layer((8, 14, 14, 192), 3, 16, 16, transposed=True),
    "phases-4": Layer((8, 32, 32, 64), 32, 4, 2, transposed=True),
}


def measure_layer(layer: Layer) -> dict[str, Any]:
    """Run the forward pass and the step of a layer in both forms, in turns."""
    model, variables, x = linen(layer.model(), *layer.shape)
    plan = fc.make_plan(model, x, to="dense", rules=["*=phases"] * _overlaps(layer))
    forms = {"conv": (model, variables)}
    name = "phases" if _overlaps(layer) else "dense"
    converted: Any = fc.convert_model(model, plan)
    forms[name] = (converted, fc.convert_params(variables, plan))

    forward: dict[str, Run] = {}
    steps: dict[str, Run] = {}
    for form, (module, params) in forms.items():
        forward[form] = functools.partial(jax.jit(module.apply), params, x)
        steps[form] = functools.partial(_layer_step(module.apply), params, x)
    wanted, left_out = steps["conv"]()[1], {}
    errors = {name: _apart(steps[name]()[1], wanted)}
    for title, (run, step) in _torch_runs(layer, variables, x, left_out).items():
        forward[title], steps[title] = run, step
        errors[title] = _apart(np.moveaxis(step(), 1, -1), wanted)
    opponents = [title for title in steps if title not in forms]
    found = race(steps, _SECONDS, _APART, opponents)
    ms = found["milliseconds"]
    return {
        **found,
        "forward": race(forward, _SECONDS, _APART, opponents)["milliseconds"],
        "errors": errors,
        "original": "conv",
        "left out": left_out,
        "bounds": [bound(f"{name} / conv", ms[name] / ms["conv"], 1.0)],
    }


def _overlaps(layer: Layer) -> bool:
    return layer.transposed and layer.window != layer.stride


def _apart(found: Any, wanted: Any) -> float:
    return largest_error(np.asarray(found), np.asarray(wanted))


def _layer_step(call: Callable[[Any, Array], Array]) -> Callable[..., Any]:
    """Return gradients by the params, and by the input, of the sum of squares."""

    def loss(params: Any, x: Array) -> Array:
        return jnp.sum(call(params, x) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def _torch_runs(
    layer: Layer, variables: Any, x: Array, left_out: dict[str, str]
) -> dict[str, tuple[Run, Run]]:
    """Return PyTorch's forward pass and step, which gives the gradient by the input."""
    torch = find_torch(left_out)
    if torch is None:
        return {}
    kernel = variables["params"]["kernel"]
    bias = to_tensor(torch, variables["params"]["bias"])
    image = to_tensor(torch, jnp.moveaxis(x, -1, 1)).contiguous()
    if layer.transposed:  # Flax applies its kernel reversed by default
        weight = to_tensor(torch, kernel[::-1, ::-1].transpose(2, 3, 0, 1)).contiguous()
    else:
        weight = to_tensor(torch, kernel.transpose(3, 2, 0, 1)).contiguous()
    trained = [image, weight, bias]
    for each in trained:
        each.requires_grad_()
    crop = (layer.window - layer.stride) // 2

    def call(x: Any, weight: Any, bias: Any) -> Any:
        if layer.transposed:
            return torch.nn.functional.conv_transpose2d(
                x, weight, bias, stride=layer.stride, padding=crop
            )
        return torch.nn.functional.conv2d(x, weight, bias, stride=layer.stride)

    found: dict[str, tuple[Run, Run]] = {}
    for title, each in (
        ("PyTorch", call),
        ("PyTorch, compiled", torch.compile(call)),
    ):

        def step(each: Any = each) -> Any:
            loss = (each(*trained) ** 2).sum()
            return torch.autograd.grad(loss, trained)[0].numpy()

        def forward(each: Any = each) -> Any:
            with torch.no_grad():
                return each(*trained)

        try:
            step()
            forward()
        except Exception as error:  # of many kinds, such as no C++ compiler
            left_out[title] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found[title] = forward, step
    return found


def measure_model(
    make: Callable[[], Any],
    most: float,
    options: dict[str, Any],
    against: str = "original",
) -> dict[str, Any]:
    """Tune the step of a model, and measure the plan against the other forms."""
    model, variables, x = make()
    start = time.perf_counter()
    plan = fc.tune(model, variables, x, objective="training", budget=_BUDGET, **options)
    seconds = time.perf_counter() - start
    assert plan.tuning is not None
    print(plan.tuning, file=sys.stderr)
    plans = {}
    for to in ("conv", "dense"):
        if each := fc.make_plan(model, x, to=to, **options):
            plans[f"all to {to}"] = each
    if plan or plan.options:
        plans["tuned"] = plan
    steps = {"original": _model_step(model, variables, x, options)}
    for name, each in plans.items():
        converted: Any = fc.convert_model(model, each)
        moved = fc.convert_params(variables, each)
        steps[name] = _model_step(converted, moved, x, options, dict(each.options))
    wanted = _flat(steps["original"]()[1])
    errors = {}
    for name, each in plans.items():
        gradients = fc.restore_params({"params": steps[name]()[1]}, each)["params"]
        errors[name] = largest_error(_flat(gradients), wanted)
    found = race(steps, _MODEL_SECONDS)
    ms = found["milliseconds"]
    ratio = ms.get("tuned", ms["original"]) / ms[against]
    return {
        **found,
        "errors": errors,
        "bounds": [bound(f"tuned / {against}", ratio, most)],
        **as_record(plan, seconds),
    }


def _model_step(
    model: Any,
    variables: Any,
    x: Array,
    options: dict[str, Any],
    compiler_options: dict[str, Any] | None = None,
) -> Run:
    """Return the step of a linen model: loss and gradients by the params."""

    def loss(params: Any, variables: Any, x: Array) -> Array:
        outputs = model.apply({**variables, "params": params}, x, **options)
        return jnp.sum(
            jnp.array([jnp.sum(abs(y) ** 2) for y in jax.tree.leaves(outputs)])
        )

    step = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options)
    return functools.partial(step, variables["params"], variables, x)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _images(model: nn.Module, batch: int, size: int = 224) -> Any:
    return linen(model, batch, size, size, 3)


_STATISTICS = {"mutable": ["batch_stats"]}
_MODELS: dict[str, Case] = {
    "resnet50-8": functools.partial(
        *(measure_model, functools.partial(_images, networks.Resnet(True), 8)),
        *(0.70, _STATISTICS),
    ),
    "vit-b-2": functools.partial(
        *(measure_model, functools.partial(_images, networks.Vit(), 2)),
        *(_NO_SLOWER, {}),
    ),
    "unet-2": functools.partial(
        *(measure_model, functools.partial(_images, networks.Unet(), 2, 64)),
        *(0.35, {}),
    ),
    "mae-decoder-2": functools.partial(
        *(
            measure_model,
            functools.partial(linen, networks.MaeDecoder(), 2, 14, 14, 1024),
        ),
        *(0.60, {}, "all to conv"),
    ),
}

CASES: dict[str, Case] = {
    **{f"step-{n}": functools.partial(measure_layer, v) for n, v in LAYERS.items()},
    **{f"step-{name}": run for name, run in _MODELS.items()},
}
