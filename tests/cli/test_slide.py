"""fcconv slide: a classifier over whole images, from a checkpoint."""

import shlex

import flax
import jax
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fcconv_jax as fc
from fcconv_jax.cli import app

MODEL = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))

def double(x):
    return 2 * x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, a checkpoint of it in both forms, and two images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    space: dict = {}
    exec(MODEL, space)
    model, crop = space["Net"](), np.zeros((1, 8, 8, 3), np.float32)
    variables = model.init(jax.random.key(0), crop)
    (tmp_path / "ckpt.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    plan = fc.make_plan(model, crop)
    fc.convert_checkpoint("ckpt.msgpack", "conv.msgpack", plan)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 20, 28, 3)).astype(np.uint8)
    Image.fromarray(pixels[0]).save("first.png")
    np.save("second.npy", pixels[1])
    grid = fc.slide(model, (8, 8), 2)
    return np.asarray(grid(variables, pixels / np.float32(255)))


def run(command, status=0):
    result = CliRunner().invoke(app, ["slide", *shlex.split(command)])
    assert result.exit_code == status, result.output
    return result


def test_images_to_an_array_and_a_heat_map(folder):
    options = "--window 8x8 --stride 2 --out grid.npy --heatmap heat.png"
    for checkpoint in ("ckpt.msgpack", "conv.msgpack"):
        command = f"model.py:Net first.png second.npy --params {checkpoint} {options}"
        result = run(command)
        np.testing.assert_allclose(np.load("grid.npy"), folder, atol=1e-5)
        assert "7x11 crops of 8x8, 2x2 apart" in result.stderr
        place = np.unravel_index(folder[0].argmax(), folder[0].shape)
        y, x = 2 * place[0], 2 * place[1]
        assert f"first.png: largest output {place[2]}, " in result.stdout
        assert f", at {y},{x}" in result.stdout
        with Image.open("heat.png") as picture:
            assert picture.size == (28, 20)


@pytest.mark.usefixtures("folder")
def test_wrong_usage():
    start = "model.py:Net first.png --params ckpt.msgpack"
    assert (
        "no such file"
        in run("model.py:Net none.png --params ckpt.msgpack --window 8x8", 2).stderr
    )
    assert "--window: expected sizes such" in run(f"{start} --window 8:8", 2).stderr
    assert "not a checkpoint of this" in run(f"{start} --window 30x30", 1).stderr
    assert (
        "Pillow cannot read it"
        in run("model.py:Net model.py --params ckpt.msgpack --window 8x8", 2).stderr
    )
