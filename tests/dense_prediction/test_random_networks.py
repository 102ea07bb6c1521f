"""Random networks on every crop of an image, against the crops one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in
from random_networks import HEADS, LAYERS, crops_one_by_one, network

import fcconv_jax as fc
from fcconv_jax.dense_prediction import costs
from fcconv_jax.versions import enable_x64

EACH = 6


def check(seed, rank, layers=None, heads=None):
    names, params, call, window, channels = network(seed, rank, layers, heads)
    rng = np.random.default_rng(seed)
    stride = tuple(int(s) for s in rng.integers(1, 5, rank))
    size = [w + int(rng.integers(0, 13 if rank < 3 else 5)) for w in window]
    images = jnp.asarray(rng.standard_normal((1 + seed % 2, *size, channels)))
    want = crops_one_by_one(lambda x: call(params, x), images, window, stride)
    got = fc.slide(call, window, stride)(params, images)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape, (seed, names)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)
        assert error < 1e-13, (seed, names, window, stride, error)


@pytest.fixture(autouse=True)
def _in_float64():
    with enable_x64(True):
        yield


@pytest.fixture(params=["what pays", "all that can be"])
def sharing(request, monkeypatch):
    """Also shares what would not pay on images as small as these."""
    if request.param == "all that can be":
        monkeypatch.setattr(costs, "WORTH", 0.5)
        monkeypatch.setattr(costs, "PASS", 0.0)
        monkeypatch.setattr(costs, "MOVE", 1e9)  # so that strips and interior part
        monkeypatch.setattr(costs, "WORTH_WHOLE", 0.0)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize(
    "block", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))]
)
def test_images(block):
    for seed in range(block * EACH, (block + 1) * EACH):
        check(seed, 2)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_signals(block):
    for seed in range(1000 + block * EACH, 1000 + (block + 1) * EACH):
        check(seed, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("sharing")
def test_volumes():
    for seed in range(2000, 2000 + EACH):
        check(seed, 3)


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("name", one_in(2, LAYERS))
def test_each_layer(name):
    check(7, 2, layers=[name, "conv"], heads=["flatten"])


@pytest.mark.usefixtures("sharing")
@pytest.mark.parametrize("name", HEADS)
def test_each_head(name):
    check(3, 2, layers=["conv", "max_pool", "activation"], heads=[name])
