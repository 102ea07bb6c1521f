"""What shares nothing runs as a batch of crops, as a user would write it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import crops_one_by_one

import fcconv_jax as fc
from fcconv_jax.backends.options import pool_options
from fcconv_jax.tracing.jaxprs import opened, subjaxprs
from fcconv_jax.tracing.primitives import MATMULS, POOLS

WINDOW, STRIDE = (8, 8), (8, 8)


class Pools(nn.Module):
    """Convolutions and pools behind a mean over the crop."""

    @nn.compact
    def __call__(self, x):
        x = x - x.mean((1, 2, 3), keepdims=True)
        for features in (4, 8):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Whole(nn.Module):
    """A pool over the whole crop."""

    how: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(5)(getattr(x, self.how)((1, 2)))


class Perceptron(nn.Module):
    """Dense layers behind a maximum over the crop."""

    @nn.compact
    def __call__(self, x):
        x = x / x.max((1, 2, 3), keepdims=True)
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


class Attention(nn.Module):
    """Attention over all patches of a crop."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4))(x).reshape(x.shape[0], 4, 8)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(3)(x.mean(1))


def made(model, images=1):
    x = np.random.default_rng(0).normal(size=(images, 24, 32, 3)).astype(np.float32)
    return model.init(jax.random.key(0), x[:, :8, :8]), x


def operations(jaxpr):
    """Convolutions, matmuls and pools, with the shapes of their operands."""
    found = []
    for eqn in opened(jaxpr)[0].eqns:
        bodies = [body for _, body in subjaxprs(eqn)]
        found += [each for body in bodies for each in operations(body)]
        if eqn.primitive.name in MATMULS | POOLS:
            found.append((eqn.primitive.name, *(v.aval.shape for v in eqn.invars)))
    return sorted(found)


@pytest.mark.parametrize("model", [Pools(), Perceptron(), Attention()], ids=str)
def test_operations_are_those_of_a_batch_of_crops(model):
    variables, x = made(model)
    grid = fc.slide(model, WINDOW, STRIDE)
    assert not grid.report(variables, x).shares
    batch = np.repeat(x[:, :8, :8], 12, 0)
    mine = jax.make_jaxpr(grid)(variables, x)
    assert operations(mine) == operations(jax.make_jaxpr(model.apply)(variables, batch))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x - x.mean()).sum((1, 2)) / jnp.sqrt((x * x).sum()),
        lambda x: jnp.sort(x, 0).cumsum(0).sum((1, 2)),
        lambda x: x[::-1].reshape(-1, 4, 2, 8, 3).sum((2, 3)) * x.max(),
        lambda x: nn.max_pool(x / x.max(0), (2, 2), (2, 2)).mean((1, 2)),
        lambda x: jnp.einsum("nhwc,mhwc->nm", x, x)[:, :1] / x.std((1, 2, 3)).max(),
        lambda x: jnp.concatenate([x, 2 * x[:1]], 0)[1:].min((1, 2)) / x.std((1, 2)),
    ],
)
def test_what_depends_on_the_batch_sees_the_images_of_one_position(function, images):
    x = np.random.default_rng(0).normal(size=(images, 24, 32, 3)).astype(np.float32)
    grid = fc.slide(function, WINDOW, STRIDE)
    want = crops_one_by_one(function, x, WINDOW, STRIDE)
    np.testing.assert_allclose(grid(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not pool_options("cpu"), reason="XLA computes pools right")
@pytest.mark.parametrize("how", ["pools", "mean", "max"])
def test_pools_of_a_batch_of_crops_keep_nan(how):
    """Those that YNNPACK fuses lose it, if the batch has more than a few crops."""
    model = Pools() if how == "pools" else Whole(how)
    variables, x = made(model, images=8)
    x[:, 3, 5] = np.nan
    grid = fc.slide(model, WINDOW, STRIDE)
    assert not grid.report(variables, x).shares
    assert np.isnan(grid(variables, x)).all(-1).sum() == len(x)


@pytest.mark.parametrize("counts", [(1, 1), (1, 3), (4, 1), (2, 5), (4, 2, 3)])
@pytest.mark.parametrize("images", [1, 2])
def test_crops_lie_in_the_order_of_their_places(counts, images):
    window, stride = (3, 4, 2)[: len(counts)], (2, 5, 3)[: len(counts)]
    sizes = [(n - 1) * s + w for n, w, s in zip(counts, window, stride)]
    x = np.random.default_rng(0).normal(size=(images, *sizes, 2)).astype(np.float32)
    grid = fc.slide(lambda x: x / jnp.sort(x, 1), window, stride)
    assert not grid.report(x).shares
    want = crops_one_by_one(lambda x: x / jnp.sort(x, 1), x, window, stride)
    np.testing.assert_allclose(grid(x), want, rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's CPU backend")
@pytest.mark.parametrize(
    ("function", "gathers"),
    [
        (lambda x: x.reshape(x.shape[0], -1), 2),
        (lambda x: jax.jit(lambda y, x: (y * x).sum((1, 2)))(2.0, x / 255), 2),
        (lambda x: x / x.max((1, 2, 3), keepdims=True), 1),
        (lambda x: jax.jit(lambda x: (2 * x).sum(1) + x.max(1))(x - 1), 1),
    ],
)
def test_crops_that_xla_would_fuse_are_gathered_in_pieces(function, gathers):
    x = np.ones((1, 24, 32, 3), np.float32)
    text = str(jax.make_jaxpr(fc.slide(function, WINDOW, STRIDE))(x))
    assert text.count("= gather[") == gathers


def test_the_program_of_many_crops_is_small():
    grid = fc.slide(lambda x: jnp.sort(x, 1).mean((1, 2)), (4, 4), 1)
    lowered = grid.lower(jax.ShapeDtypeStruct((1, 300, 300, 1), np.float32))
    assert len(lowered.as_text()) < 10_000


def test_padding_that_is_written_out_has_a_stride():
    def padded(x):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return (x / x.std((1, 2), keepdims=True)).max((1, 2))

    x = np.random.default_rng(0).normal(size=(1, 12, 12, 1)).astype(np.float32)
    grid = fc.slide(padded, (4, 4))
    assert grid.report(x).stride == (1, 1)
    want = crops_one_by_one(padded, x, (4, 4), (1, 1))
    np.testing.assert_allclose(grid(x), want, rtol=1e-5)
