"""Single layers: dense, conv and tuned, with PyTorch beside where it is installed.

PyTorch runs the same numbers as ``Linear`` on channels-last inputs and as ``Conv2d`` on
its own, channels-first ones, eager and compiled, on as many threads as there are cores,
in the same race.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from models import ALL_TO_CONV, TUNED
from running import Case, Forms, as_record, compare, linen, tuned

_BATCHES = (1, 8, 32)
_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
_SECONDS = 4.0
_BUDGET = 10.0
# PyTorch's threads wait actively for some milliseconds before they leave the cores.
_APART = 0.005
# Loops: XLA's convolutions are slow there.
_LOOPED = 0.01


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a model.

    Attributes:
      shape: of one input, channels last.
      features: of the output.
      form: "dense" or "conv", as the model has it.
      window: of its conv form, which is its stride too.
      bias: whether it has one.
    """

    shape: tuple[int, ...]
    features: int
    form: str = "dense"
    window: int = 1
    bias: bool = True

    def model(self, dtype: Any) -> nn.Module:
        """The layer, with a flatten before it where it is dense and has a window."""
        types = {"dtype": dtype, "param_dtype": dtype, "use_bias": self.bias}
        if self.form == "conv":
            sides = (self.window, self.window)
            return nn.Conv(
                *(self.features, sides, sides), padding="VALID", name="layer", **types
            )
        dense = nn.Dense(self.features, name="layer", **types)
        if self.window == 1:
            return dense
        return nn.Sequential([lambda x: x.reshape(x.shape[0], -1), dense])

    @property
    def image(self) -> tuple[int, ...]:
        """The shape with two spatial axes."""
        *spatial, channels = self.shape
        return (*spatial, *(1,) * (2 - len(spatial)), channels)


def _resnet() -> dict[str, Layer]:
    """The 1x1 convolutions of ResNet-50, a pair for each stage."""
    found = {}
    for stage in range(4):
        size, width = 56 >> stage, 64 << stage
        for name, channels, features in (
            ("reduce", 4 * width, width),
            ("expand", width, 4 * width),
        ):
            found[f"resnet-{size}-{name}"] = Layer(
                (size, size, channels), features, "conv", bias=False
            )
    return found


LAYERS = {
    "vgg-fc6": Layer((7, 7, 512), 4096, window=7),
    "vgg-fc7": Layer((4096,), 4096),
    "vgg-fc8": Layer((4096,), 1000),
    "vit-mlp-up": Layer((197, 768), 3072),
    "vit-mlp-down": Layer((197, 3072), 768),
    "vit-patches": Layer((224, 224, 3), 768, "conv", window=16),
    "bert-projection": Layer((128, 768), 768),
    **_resnet(),
}


def measure(layer: Layer, batch: int, dtype: Any) -> dict[str, Any]:
    """Runs all forms of a layer in turns."""
    model = layer.model(dtype)
    _, params, x = linen(model, batch, *layer.shape, dtype=dtype)
    forms = tuned(model, params, x, _BUDGET)
    names = {"original": layer.form, "all to conv": "conv", "all to dense": "dense"}
    runs = {names.get(name, name): run for name, run in forms.runs.items()}
    most = {"tuned": TUNED, "conv": ALL_TO_CONV}

    def make(torch: Any) -> dict[str, _Torch]:
        flat = {path[-1].key: leaf for path, leaf in jax.tree.leaves_with_path(params)}
        return _torch_layer(torch, layer, flat, x)

    return _beside(forms, runs, layer.form, most, make)


def loop(params: Any, x: jax.Array) -> jax.Array:
    """Two 1x1 convolutions ``(N, C, W)`` in a loop (JAX issue 12868)."""

    def step(_: int, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, params["w"], (1,), "VALID", dimension_numbers=("NCW", "OIW", "NCW")
        )

    return lax.fori_loop(0, 2, step, x)


def scan(params: Any, x: jax.Array) -> jax.Array:
    """1x1 convolutions ``(N, C, H, W)``, each with its own kernel, in a scan."""

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return lax.conv_general_dilated(x, w, (1, 1), "VALID"), None

    return lax.scan(step, x, params["w"])[0]


def measure_loop(
    function: Callable[..., Any], kernels: tuple[int, ...], input_: tuple[int, ...]
) -> dict[str, Any]:
    """Runs all forms of a loop of convolutions in turns.

    Args:
      function: of ``{"w": kernels}`` and an input.
      kernels: their shape; the first axis is that of the steps, where it is scanned.
      input_: its shape.
    """
    size = input_[1]
    params = {"w": jnp.full(kernels, 1 / size, jnp.float32)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=input_), jnp.float32)
    forms = tuned(function, params, x)

    def make(torch: Any) -> dict[str, _Torch]:
        w = to_tensor(torch, params["w"])
        convolve = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d}
        each = w if w.ndim > x.ndim else (w, w)

        def steps(x: Any) -> Any:
            for kernel in each:
                x = convolve[x.ndim](x, kernel)
            return x

        return {f"PyTorch Conv{x.ndim - 2}d": (steps, to_tensor(torch, x), _as_it_is)}

    return _beside(forms, forms.runs, "original", {"tuned": _LOOPED}, make)


# A function, its input, and what brings its output into the order of JAX's.
_Torch = tuple[Callable[..., Any], Any, Callable[[Any], Any]]


def _beside(
    forms: Forms,
    runs: dict[str, Callable[[], Any]],
    original: str,
    most: dict[str, float],
    make: Callable[[Any], dict[str, _Torch]],
) -> dict[str, Any]:
    """Runs JAX's forms in turns with PyTorch's, eager and compiled.

    Args:
      forms: what tuning found.
      runs: JAX's forms by name.
      original: the name of the original.
      most: as for :func:`running.compare`.
      make: PyTorch's forms, from the module ``torch``.
    """
    shape = jax.eval_shape(runs[original]).shape
    known, left_out = {}, {}
    runs = dict(runs)
    torch = find_torch(left_out)
    for name, (eager, x, order) in (make(torch) if torch else {}).items():
        for title, call in ((name, eager), (f"{name}, compiled", torch.compile(eager))):
            run = torch.inference_mode()(functools.partial(call, x))
            try:
                result = order(run()).float().numpy().reshape(shape)
            except Exception as error:  # of many kinds, such as no C++ compiler
                left_out[title] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                runs[title], known[title] = run, result
    found = compare(runs, original, most, _SECONDS, _APART, known)
    return {
        **found,
        "original": original,
        "left out": left_out,
        **as_record(forms.plan, forms.seconds),
    }


def find_torch(left_out: dict[str, str]) -> Any:
    """Return PyTorch, on all cores; None where it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        left_out["PyTorch"] = "not installed"
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def _torch_layer(
    torch: Any, layer: Layer, params: dict[str, jax.Array], x: jax.Array
) -> dict[str, _Torch]:
    """A layer on rows of features, copied in the run unless a view does; on images."""
    k, features = layer.window, layer.features
    n, (height, width, channels) = x.shape[0], layer.image
    kernel = to_tensor(torch, params["kernel"]).reshape(k, k, channels, features)
    images = to_tensor(torch, x).reshape(n, height, width, channels)
    bias = to_tensor(torch, params["bias"]) if layer.bias else None
    weight = kernel.reshape(-1, features).T.contiguous()
    filters = kernel.permute(3, 2, 0, 1).contiguous()

    def rows(x: Any) -> Any:
        x = x.reshape(n, height // k, k, width // k, k, channels)
        x = x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, height // k, width // k, -1)

    def dense(x: Any) -> Any:
        return torch.nn.functional.linear(x, weight, bias)

    def of_patches(x: Any) -> Any:
        return dense(rows(x))

    def convolve(x: Any) -> Any:
        return torch.nn.functional.conv2d(x, filters, bias, stride=k)

    first = images.permute(0, 3, 1, 2).contiguous()
    is_view = k in (1, height)
    linear = (dense, rows(images)) if is_view else (of_patches, images)
    return {
        "PyTorch Linear": (*linear, _as_it_is),
        "PyTorch Conv2d": (convolve, first, lambda y: y.permute(0, 2, 3, 1)),
    }


def to_tensor(torch: Any, array: jax.Array) -> Any:
    """The same numbers in PyTorch; through float32, for NumPy has no bfloat16."""
    wide = torch.from_numpy(np.array(array, np.float32))
    return wide.to(getattr(torch, array.dtype.name))


def _as_it_is(y: Any) -> Any:
    return y


CASES: dict[str, Case] = {
    **{
        f"{name}-{batch}-{dtype}": functools.partial(
            measure, layer, batch, _DTYPES[dtype]
        )
        for name, layer in LAYERS.items()
        for batch in _BATCHES
        for dtype in _DTYPES
    },
    "loop-1000": functools.partial(
        measure_loop, loop, (1000, 1000, 1), (1, 1000, 1024)
    ),
    "scan-512": functools.partial(
        measure_loop, scan, (4, 512, 512, 1, 1), (1, 512, 32, 32)
    ),
}
