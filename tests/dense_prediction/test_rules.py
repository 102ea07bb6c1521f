"""Rules one by one: the result of each crop, and along which axes it is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs
from jax import lax
from jax.extend.core import Literal

from fcconv_jax.dense_prediction import costs
from fcconv_jax.dense_prediction.maps import crops
from fcconv_jax.dense_prediction.rules import RULES
from fcconv_jax.dense_prediction.values import (
    CropArray,
    Grid,
    NotSharedError,
    Part,
    array_of,
)

ROWS, COLUMNS = Grid(0), Grid(1)
BOTH = {ROWS, COLUMNS}
PIXELS = np.random.default_rng(0).normal(size=(2, 11, 13, 3)).astype(np.float32)
MAPS = crops(11, 6, 1), crops(13, 8, 1)
EVERY = np.array([[PIXELS[:, r][:, :, c] for c in MAPS[1]] for r in MAPS[0]])
KERNEL = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)
HEAD = np.random.default_rng(2).normal(size=(6, 8, 3, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def _all_that_can_be_shared(monkeypatch):
    monkeypatch.setattr(costs, "WORTH", 0.1)
    monkeypatch.setattr(costs, "PASS", 0.0)


def image():
    parts = (Part(2), Part(6, MAPS[0], ROWS), Part(8, MAPS[1], COLUMNS), Part(3))
    return CropArray(jnp.asarray(PIXELS), (), parts, (1,) * 4)


def run(function, value):
    """The outputs of a function of one primitive, by its rule."""
    jaxpr = jax.make_jaxpr(function)(EVERY[0, 0])
    *before, eqn = jaxpr.jaxpr.eqns
    assert not before, "expected a function of one primitive"
    known = dict(zip(jaxpr.jaxpr.constvars, map(CropArray.plain, jaxpr.consts)))
    known[jaxpr.jaxpr.invars[0]] = value
    values = [
        CropArray.plain(atom.val) if isinstance(atom, Literal) else known[atom]
        for atom in eqn.invars
    ]
    return RULES[eqn.primitive.name](eqn, values)


def on_every_crop(function):
    return jax.vmap(jax.vmap(function))(EVERY)


def convolution(padding, stride=(1, 1), **options):
    def call(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, KERNEL, stride, padding, dimension_numbers=numbers, **options
        )

    return call


def pooled(combine, start, window, stride, padding):
    def call(x):
        return lax.reduce_window(
            x, np.float32(start), combine, (1, *window, 1), (1, *stride, 1), padding
        )

    return call


CASES = {
    "elementwise": (lambda x: lax.sin(x), BOTH),
    "with a number": (lambda x: lax.mul(x, np.float32(2)), BOTH),
    "same": (lambda x: lax.optimization_barrier(x), BOTH),
    "VALID convolution": (convolution("VALID"), BOTH),
    "SAME convolution": (convolution("SAME"), BOTH),
    "strided convolution": (convolution("SAME", (2, 3)), BOTH),
    "dilated convolution": (convolution("SAME", rhs_dilation=(2, 1)), BOTH),
    "transposed convolution": (
        convolution([(1, 2), (2, 1)], lhs_dilation=(2, 2)),
        BOTH,
    ),
    "max pool": (pooled(lax.max, -np.inf, (2, 3), (2, 1), "SAME"), BOTH),
    "sum pool": (pooled(lax.add, 0, (3, 2), (1, 2), "VALID"), BOTH),
    "transpose": (lambda x: lax.transpose(x, (3, 2, 0, 1)), BOTH),
    "reverse": (lambda x: lax.rev(x, (1, 3)), BOTH),
    "slice": (lambda x: lax.slice(x, (0, 1, 0, 1), (2, 6, 8, 3), (1, 2, 3, 1)), BOTH),
    "broadcast": (
        lambda x: lax.broadcast_in_dim(x, (2, 6, 7, 8, 3), (0, 1, 3, 4)),
        BOTH,
    ),
    "reshape": (lambda x: lax.reshape(x, (2, 2, 3, 24)), BOTH),
    "pad": (
        lambda x: lax.pad(
            x, np.float32(7), ((0, 0, 0), (1, 2, 0), (-1, 0, 1), (0, 1, 0))
        ),
        BOTH,
    ),
    "concatenate along an image axis": (lambda x: lax.concatenate([x, x], 1), BOTH),
    "concatenate channels": (lambda x: lax.concatenate([x, x], 3), BOTH),
    "split": (lambda x: lax.split(x, (1, 2), 3), BOTH),
    "split an image axis": (lambda x: lax.split(x, (2, 4), 1), BOTH),
    "tile": (lambda x: lax.tile(x, (1, 2, 1, 3)), BOTH),
    "sum of channels": (lambda x: lax.reduce_sum(x, (3,)), BOTH),
    "sum of rows": (lambda x: lax.reduce_sum(x, (1,)), {COLUMNS}),
    "largest of all": (lambda x: lax.reduce_max(x, (1, 2)), set()),
    "cumulative sum": (lambda x: lax.cumsum(x, 3), BOTH),
    "position": (lambda x: lax.argmax(x, 3, np.int32), BOTH),
    "product of channels": (
        lambda x: lax.dot(x, KERNEL[0, 0], dimension_numbers=(((3,), (0,)), ((), ()))),
        BOTH,
    ),
    "product of weights": (
        lambda x: lax.dot(KERNEL[0, 0], x, dimension_numbers=(((0,), (3,)), ((), ()))),
        BOTH,
    ),
    "head": (
        lambda x: lax.dot(
            x, HEAD, dimension_numbers=(((1, 2, 3), (0, 1, 2)), ((), ()))
        ),
        set(),
    ),
}


# Earlier versions of JAX tile by a broadcast and a reshape.
NEW = {"tile": needs("jax", "0.9.0")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEW.get(name, ())) for name in CASES]
)
def test_each_crop_gets_its_own_result(name):
    function, shared = CASES[name]
    outs = run(function, image())
    wanted = jax.tree.leaves(on_every_crop(function))
    for out, want in zip(outs, wanted, strict=True):
        assert out.shape == want.shape[2:]
        assert out.shared == shared
        found = array_of(out)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: lax.cumsum(x, 1), "along an axis of the image"),
        (lambda x: lax.argmin(x, 2, np.int32), "along an axis of the image"),
        (lambda x: lax.dot_general(x, x, (((3,), (3,)), ((0,), (0,)))), "two values"),
        (lambda x: lax.reshape(x, (2, 4, 12, 3)), "cuts through"),
        (
            lambda x: lax.conv_general_dilated(
                PIXELS, x, (1, 1), "VALID", dimension_numbers=("NHWC", "OHWI", "NHWC")
            ),
            "a kernel that is computed from the image",
        ),
    ],
)
def test_what_crops_cannot_share(function, reason):
    with pytest.raises(NotSharedError, match=reason):
        run(function, image())
