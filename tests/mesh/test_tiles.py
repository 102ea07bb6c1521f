"""Devices and processes that share the tiles of an image write what one device does."""

import json

import numpy as np
import pytest
import tensorstore
from mesh.started import free_port, outputs

PROGRAM = """
import json, sys
import flax.linen as nn, jax, numpy as np, tensorstore
import fcconv_jax as fc

number, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, number)

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))

model = Net()
image = np.random.default_rng(0).normal(size=(1, 150, 130, 3)).astype(np.float32)
mask = np.zeros((15, 13))
mask[:, 4:] = 1
variables = jax.jit(model.init)(jax.random.key(1), image[:, :16, :16])
variables = jax.tree.map(np.asarray, variables)
grid = fc.slide(model, (16, 16), 2)
spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": folder}}
out = tensorstore.open(
    spec, open=True, create=True, dtype=tensorstore.float32, shape=(1, 68, 58, 5),
    chunk_layout=tensorstore.ChunkLayout(
        write_chunk=tensorstore.ChunkLayout.Grid(shape=(1, 8, 8, 5))
    ),
).result()
mesh = None
if jax.device_count() > 1:
    mesh = jax.sharding.Mesh(jax.devices(), ("tiles",))
found = grid.write(
    variables, image, out=out, memory=700_000, progress=False, mesh=mesh, mask=mask,
    resume=folder + ".json",
)
print(json.dumps(found))
"""


def run(folder, devices, count=1):
    """Write an image in several processes; the tiles of each, and the result."""
    lines = outputs(
        ["-c", PROGRAM], count, devices, str(count), free_port(), str(folder)
    )
    found = [json.loads(line) for line in lines]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return found, np.asarray(tensorstore.open(spec).result().read().result())


@pytest.mark.slow
def test_devices_and_processes_write_what_one_device_does(tmp_path):
    [[tiles, skipped, _]], want = run(tmp_path / "one", 1)
    assert tiles > 20
    assert 0 < skipped < tiles
    assert 0 < np.isnan(want).mean() < 0.5
    [[*eight, _]], several = run(tmp_path / "eight", 8)
    assert eight == [tiles, skipped]
    np.testing.assert_array_equal(several, want)
    found, shared = run(tmp_path / "hosts", 2, count=2)
    assert sum(each[0] for each in found) == tiles
    assert all(each[0] > tiles // 3 for each in found)
    np.testing.assert_array_equal(shared, want)
    assert not list(tmp_path.glob("*.json*"))
