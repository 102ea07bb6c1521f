"""Random networks from a grammar of layers, and crops one by one to compare with."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYERS = {}


def layer(function):
    """Adds a layer: it takes a generator and a shape, returns a function or None."""
    LAYERS[function.__name__] = function
    return function


def normal(rng, *shape):
    return rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[:-1]), 1))


def out_size(n, kernel, stride, pads, dilation=1, holes=1):
    return ((n - 1) * holes + 1 + sum(pads) - (kernel - 1) * dilation - 1) // stride + 1


@layer
def conv(rng, shape):
    rank = len(shape) - 1
    groups = int(rng.choice([g for g in (1, 2, shape[-1]) if shape[-1] % g == 0]))
    features = groups * int(rng.integers(1, 4))
    kernel = [int(k) for k in rng.integers(1, 5, rank)]
    strides = [int(k) for k in rng.integers(1, 4, rank)]
    dilation = [int(k) for k in rng.choice([1, 1, 2], rank)]
    kind = rng.choice(["VALID", "SAME", "pairs"])
    pads = [tuple(int(p) for p in rng.integers(-1, 3, 2)) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    for n, span, pad in zip(shape, spans, pads):
        if kind != "SAME" and n + (sum(pad) if kind == "pairs" else 0) < span:
            return None
    w = normal(rng, *kernel, shape[-1] // groups, features)
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def run(p, x):
        return lax.conv_general_dilated(
            x,
            p,
            strides,
            pads if kind == "pairs" else str(kind),
            None,
            dilation,
            numbers,
            feature_group_count=groups,
        )

    return w, run


@layer
def transposed(rng, shape):
    rank = len(shape) - 1
    kernel = [int(k) for k in rng.integers(2, 4, rank)]
    w = normal(rng, *kernel, shape[-1], 2)
    holes = [int(k) for k in rng.integers(1, 3, rank)]
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return w, lambda p, x: lax.conv_general_dilated(
        x, p, (1,) * rank, [(1, 1)] * rank, holes, None, numbers
    )


def _window(rng, shape):
    rank = len(shape) - 1
    window = tuple(int(k) for k in rng.integers(1, 4, rank))
    strides = tuple(int(k) for k in rng.integers(1, 4, rank))
    padding = str(rng.choice(["VALID", "SAME"]))
    fits = all(n >= k for n, k in zip(shape, window)) or padding == "SAME"
    return (window, strides, padding) if fits else None


@layer
def max_pool(rng, shape):
    args = _window(rng, shape)
    return args and ((), lambda p, x: nn.max_pool(x, *args))


@layer
def min_pool(rng, shape):
    args = _window(rng, shape)
    return args and ((), lambda p, x: -nn.max_pool(-x, *args))


@layer
def average_pool(rng, shape):
    args = _window(rng, shape)
    counted = bool(rng.integers(2))
    return args and ((), lambda p, x: nn.avg_pool(x, *args, count_include_pad=counted))


@layer
def activation(rng, shape):
    f = [nn.relu, nn.gelu, nn.silu, jnp.tanh, nn.softplus, jnp.abs][rng.integers(6)]
    return (), lambda p, x: f(x)


@layer
def affine(rng, shape):
    scale, bias, mean = normal(rng, 3, shape[-1])
    return (scale, bias, mean), lambda p, x: (x - p[2]) * (1 + p[0]) + p[1]


@layer
def channel_norm(rng, shape):
    def run(p, x):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + 0.1)

    return (), run


@layer
def residual(rng, shape):
    rank = len(shape) - 1
    w = normal(rng, *(3,) * rank, shape[-1], shape[-1])
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def run(p, x):
        y = lax.conv_general_dilated(x, p, (1,) * rank, "SAME", None, None, numbers)
        return x + nn.relu(y)

    return w, run


@layer
def dense_block(rng, shape):
    w, run = residual(rng, shape)
    return w, lambda p, x: jnp.concatenate([x, run(p, x) * 2], -1)


@layer
def squeeze_and_excite(rng, shape):
    w = normal(rng, shape[-1], shape[-1])
    axes = tuple(range(1, len(shape)))
    return w, lambda p, x: x * nn.sigmoid(x.mean(axes, keepdims=True) @ p)


@layer
def repeated(rng, shape):
    w = np.stack([residual(rng, shape)[0] for _ in range(2)])
    _, run = residual(rng, shape)
    return w, lambda p, x: lax.scan(lambda c, k: (run(k, c), None), x, p)[0]


@layer
def branch(rng, shape):
    w, run = residual(rng, shape)
    return (w, rng.standard_normal(())), lambda p, x: lax.cond(
        p[1] > 0, lambda x: run(p[0], x), lambda x: x * 2, x
    )


@layer
def mapped(rng, shape):
    w, run = residual(rng, shape)
    return w, lambda p, x: jax.vmap(lambda one: run(p, one[None])[0])(x)


@layer
def wrapped(rng, shape):
    w, run = residual(rng, shape)
    how = [jax.jit, jax.checkpoint][rng.integers(2)]
    return w, lambda p, x: how(run)(p, x)


@layer
def cut(rng, shape):
    if min(shape[:-1]) < 4:
        return None
    return (), lambda p, x: x[:, 1:-2:2]


@layer
def mirrored(rng, shape):
    return (), lambda p, x: jnp.flip(x, 1)


@layer
def padded(rng, shape):
    widths = [(0, 0), *[(1, 2)] * (len(shape) - 1), (0, 0)]
    return (), lambda p, x: jnp.pad(x, widths, constant_values=0.5)


@layer
def upsampled(rng, shape):
    if max(shape[:-1]) > 12:
        return None
    return (), lambda p, x: jnp.repeat(x, 2, axis=1)


@layer
def position_embedding(rng, shape):
    return normal(rng, *shape), lambda p, x: x + p


@layer
def row_embedding(rng, shape):
    w = normal(rng, *shape[:1], *(1,) * (len(shape) - 2), shape[-1])
    return w, lambda p, x: x * p


@layer
def joined_rows(rng, shape):
    return (), lambda p, x: jnp.concatenate([x, x * 2], 1)


@layer
def space_norm(rng, shape):
    axes = tuple(range(1, len(shape)))
    return (), lambda p, x: x - 0.5 * x.mean(axes, keepdims=True)


HEADS = {}


def head(function):
    HEADS[function.__name__] = function
    return function


@head
def flatten(rng, shape):
    w = normal(rng, math.prod(shape), 4)
    return w, lambda p, x: nn.softmax(x.reshape(x.shape[0], -1) @ p)


@head
def flatten_channels_first(rng, shape):
    w = normal(rng, math.prod(shape), 4)
    return w, lambda p, x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1) @ p


@head
def tokens(rng, shape):
    w = normal(rng, shape[-1], 4)

    def run(p, x):
        return nn.gelu(x.reshape(x.shape[0], -1, x.shape[-1]) @ p).max(1)

    return w, run


@head
def attention(rng, shape):
    w = normal(rng, shape[-1], 3)

    def run(p, x):
        y = x.reshape(x.shape[0], -1, x.shape[-1]) @ p
        return (nn.softmax(y @ y.swapaxes(1, 2)) @ y).mean(1)

    return w, run


@head
def global_pools(rng, shape):
    axes = tuple(range(1, len(shape)))
    return (), lambda p, x: {"mean": x.mean(axes), "max": x.max(axes)}


@head
def segmentation(rng, shape):
    w = normal(rng, shape[-1], 2)
    return w, lambda p, x: (x @ p, jnp.abs(x).sum(-1))


@head
def full_window(rng, shape):
    rank = len(shape) - 1
    w = normal(rng, *shape, 3)
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return w, lambda p, x: lax.conv_general_dilated(
        x, p, (1,) * rank, "VALID", None, None, numbers
    ).reshape(x.shape[0], 3)


@head
def patches(rng, shape):
    """Space to depth by reshape and transpose, where it divides."""
    if len(shape) != 3 or shape[0] % 2 or shape[1] % 2:
        return flatten(rng, shape)
    h, w, c = shape
    weights = normal(rng, 4 * c, 3)

    def run(p, x):
        y = x.reshape(-1, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return (y.reshape(-1, h // 2, w // 2, 4 * c) @ p).max((1, 2))

    return weights, run


def network(seed, rank=2, layers=None, heads=None, depth=4):
    """A random network: its names, params, function, and a window that it takes."""
    rng = np.random.default_rng(seed)
    window = tuple(int(n) for n in rng.integers(6, 13, rank))
    shape = (*window, int(rng.integers(1, 4)))
    channels = shape[-1]
    names, params, steps = [], [], []
    for _ in range(depth):
        name = str(rng.choice(layers or list(LAYERS)))
        found = LAYERS[name](rng, shape)
        if found is None:
            continue
        p, run = found
        x = jax.ShapeDtypeStruct((2, *shape), jnp.float64)
        new = jax.eval_shape(run, p, x).shape[1:]
        if min(new) < 1 or math.prod(new) > 6000:
            continue
        names.append(name)
        params.append(p)
        steps.append(run)
        shape = new
    name = str(rng.choice(heads or list(HEADS)))
    p, last = HEADS[name](rng, shape)
    names.append(name)
    params.append(p)

    def call(params, x):
        for p, step in zip(params, steps):
            x = step(p, x)
        return last(params[-1], x)

    return names, params, call, window, channels


def crops_one_by_one(function, images, window, stride, stack=np.stack):
    """What ``slide`` has to give: the function on each crop, stacked.

    With ``stack=jnp.stack`` it can be traced.
    """
    starts = [
        range(0, n - size + 1, step)
        for n, size, step in zip(images.shape[1:], window, stride)
    ]
    compiled = jax.jit(function)

    def at(*place):
        if len(place) < len(starts):
            rows = [at(*place, p) for p in starts[len(place)]]
            return jax.tree.map(lambda *r: stack(r, 1), *rows)
        where = tuple(slice(p, p + size) for p, size in zip(place, window))
        return compiled(images[(slice(None), *where)])

    return at()
