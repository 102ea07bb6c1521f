"""What names or places a value inside a network changes nothing of what is shared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcconv_jax as fc

IMAGES = np.random.default_rng(0).normal(size=(2, 40, 37, 2)).astype(np.float32)
WINDOW, STRIDE = (16, 13), (4, 4)


class Net(nn.Module):
    """Two blocks, with something in between that moves no entry."""

    between: str = "nothing"

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        x = BETWEEN[self.between](x)
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def mesh(kind):
    return jax.make_mesh((1,), ("data",), axis_types=(kind,))


BETWEEN = {
    "nothing": lambda x: x,
    "name": lambda x: checkpoint_name(x, "block"),
    "placement": lambda x: lax.with_sharding_constraint(
        x, NamedSharding(mesh(AxisType.Auto), PartitionSpec("data"))
    ),
    "barrier": lambda x: lax.optimization_barrier(x),
    "device": lambda x: jax.device_put(x, jax.devices()[0]),
    "copy": jnp.copy,
    "reshard": lambda x: jax.sharding.reshard(
        jax.sharding.reshard(x, PartitionSpec()), PartitionSpec("data")
    ),
}
VARIABLES = Net().init(jax.random.key(1), IMAGES[:, :16, :13])


@pytest.mark.parametrize("between", sorted({*BETWEEN} - {"nothing", "reshard"}))
def test_as_much_is_shared(between):
    plain = fc.slide(Net(), WINDOW, STRIDE).report(VARIABLES, IMAGES)
    report = fc.slide(Net(between), WINDOW, STRIDE).report(VARIABLES, IMAGES)
    assert report.flops == plain.flops
    assert report.left == plain.left


@pytest.mark.parametrize("between", ["nothing", "name", "reshard"])
def test_an_explicit_mesh(between):
    plain = fc.slide(Net(), WINDOW)
    want = plain(VARIABLES, IMAGES)
    placed = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    with jax.set_mesh(placed.mesh):
        images = jax.device_put(IMAGES, placed)
        variables = jax.device_put(
            VARIABLES, NamedSharding(placed.mesh, PartitionSpec())
        )
        grid = fc.slide(Net(between), WINDOW)
        report = grid.report(variables, images)
        scores = grid(variables, images)
    assert report.stride == plain.report(VARIABLES, IMAGES).stride
    assert report.left == plain.report(VARIABLES, IMAGES).left
    assert jax.typeof(scores).sharding.spec[0] == "data"
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_an_explicit_mesh_where_sharing_does_not_pay():
    placed = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("data"))
    with jax.set_mesh(placed.mesh):
        scores = fc.slide(lambda x: x.mean((1, 2)), (9, 9), 9)(
            jax.device_put(IMAGES, placed)
        )
    crop = IMAGES[:, 9:18, 18:27].mean((1, 2))
    np.testing.assert_allclose(scores[:, 1, 2], crop, atol=1e-5)
