"""Slide on images over a mesh of eight CPU devices, which one process must be given."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import flax.linen as nn, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fcconv_jax as fc

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for f in (8, 16):
            x = nn.relu(nn.Conv(f, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))

model = Net()
x = jax.random.normal(jax.random.key(0), (8, 64, 96, 3))
variables = model.init(jax.random.key(1), x[:, :32, :32])
grid = fc.slide(model, (32, 32), 4)
assert grid.report(variables, x).shares
want = np.asarray(grid(variables, x))
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
variables = jax.device_put(variables, NamedSharding(mesh, P()))
for spec in (P("d"), P(None, "d"), P(None, None, "d")):
    y = grid(variables, jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(np.asarray(y), want, atol=1e-4)
    print(spec, y.sharding.spec)
"""


@pytest.mark.slow
def test_images_and_their_axes_over_eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert first.count("'d'") == 2  # a batch of images stays where it is
