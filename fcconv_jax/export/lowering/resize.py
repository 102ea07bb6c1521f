"""Recognizes ``jax.image.resize`` as the one operation that runtimes have for it.

JAX writes matrices or gathers, whose sizes are all that a trace shows. So the traced
function is run once on random numbers, and compared with what the runtimes compute.
Other methods, such as cubic or antialiased ones, stay matrices.
"""

from __future__ import annotations

import jax
import numpy as np

from ...tracing.jaxprs import AnyJaxpr, evaluate, opened
from ..graph import Value
from .builder import Builder


def resize(low: Builder, body: AnyJaxpr, x: Value) -> Value | None:
    """Append a resize of two axes; None where the body computes something else.

    Args:
      low: collects the operations.
      body: the jaxpr of ``jax.image.resize``.
      x: the image, of three or four axes.
    """
    out = tuple(opened(body)[0].outvars[0].aval.shape)
    rank = len(out)
    axes = [i for i in range(rank) if out[i] != x.shape[i]]
    if len(axes) == 1:  # the other spatial axis is beside it
        axes = sorted({axes[0], max(axes[0] - 1, rank - 3)})
    if x.dtype != np.float32 or rank not in (3, 4) or len(axes) != 2:
        return None
    others = [i for i in range(rank) if i not in axes]
    order = [*others[:-1], *axes, others[-1]]
    sizes = [(x.shape[i], out[i]) for i in axes]
    probe = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    with jax.ensure_compile_time_eval():
        made = np.asarray(jax.jit(lambda x: evaluate(body, [x])[0])(probe))
    for mode, matrix in (("nearest", _nearest), ("linear", _linear)):
        a, b = (matrix(*pair) for pair in sizes)
        if a is None or b is None:
            continue
        turned = probe.transpose(order)
        want = np.einsum("hy,wx,...yxc->...hwc", a, b, turned)
        # Float32 rounds numbers of size 1 by 1e-7 or so; another mode differs by far
        # more.
        if np.abs(want - made.transpose(order)).max() < 1e-5:
            image = low.transpose(x, order)
            shape = image.shape if rank == 4 else (1, *image.shape)
            image = low.reshape(image, shape)
            size = tuple(n for _, n in sizes)
            made_shape = (shape[0], *size, shape[3])
            y = low.add("resize", [image], made_shape, mode=mode, size=size)
            y = low.reshape(y, [out[i] for i in order])
            return low.transpose(y, [order.index(i) for i in range(rank)])
    return None


def _nearest(inner: int, outer: int) -> np.ndarray | None:
    places = (np.arange(outer) + 0.5) * inner / outer
    # Runtimes may round a place between two pixels to either.
    if np.abs(places - places.round()).min() < 1e-3:
        return None
    return np.eye(inner)[np.floor(places).astype(int)]


def _linear(inner: int, outer: int) -> np.ndarray:
    places = np.clip((np.arange(outer) + 0.5) * inner / outer - 0.5, 0, inner - 1)
    first = np.minimum(np.floor(places).astype(int), max(inner - 2, 0))
    share = (places - first)[:, None]
    eye = np.eye(inner)
    return (1 - share) * eye[first] + share * eye[np.minimum(first + 1, inner - 1)]
