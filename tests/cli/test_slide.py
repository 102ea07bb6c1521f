"""fcconv slide: a classifier over whole images, from a checkpoint."""

import errno
import os
import shlex
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image
from typer.testing import CliRunner

import fcconv_jax as fc
from fcconv_jax.cli import app
from fcconv_jax.cli.heatmap import Heat

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
NNX = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), (2, 2), rngs=rngs)
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return self.head(x.reshape(x.shape[0], -1))
"""
START = "model.py:Net first.png --params ckpt.msgpack"


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
            assert picture.size == (360, 20 + 56)  # with its legend


def test_a_heat_map_of_a_class(folder):
    start = f"{START} --window 8x8 --stride 2 --heatmap heat.png"
    told = run(f"{start} --class 2").stdout
    values = folder[0, ..., 2]
    y, x = (2 * int(p) for p in np.unravel_index(values.argmax(), values.shape))
    assert "heat map of class 2, raw outputs: from " in told
    assert (
        f"{values.max():.4g}, highest in the 8x8 crop at row {y}, column {x};" in told
    )
    with Image.open("heat.png") as picture:
        raw = np.asarray(picture)
    told = run(f"{start} --class 2 --softmax").stdout
    shares = np.exp(folder[0]) / np.exp(folder[0]).sum(-1, keepdims=True)
    assert f"class 2, softmax: from {shares[..., 2].min():.4g} to " in told
    with Image.open("heat.png") as picture:
        soft = np.asarray(picture)
    # The hottest position is red, and the legend has the words.
    assert (raw[:20, :28] != soft[:20, :28]).any()
    assert (raw[20:] != soft[20:]).any()
    count = folder.shape[-1]
    message = f"--class: expected 0 to {count - 1}, the model's classes, got {count}"
    assert message in run(f"{start} --class {count}", 2).stderr
    without = f"{START} --window 8x8 --class 1"
    assert "Expected --heatmap with --class" in run(without, 2).stderr


def test_a_heat_map_where_nothing_was_computed():
    values = np.array([[[0.5, 2.0], [np.nan, np.nan]]])
    heat = Heat.of(values, 1, softmax=False)
    assert heat.summary((2, 2), (8, 8)).endswith("; 1 positions have no finite value")
    assert "no finite" in Heat.of(values[:, 1:], None, True).summary((2, 2), (8, 8))


def one_channel(folder_name, model):
    """A checkpoint of the model for gray images; returns its variables."""
    variables = model.init(jax.random.key(3), np.zeros((1, 8, 8, 1), np.float32))
    with open(folder_name, "wb") as file:
        file.write(flax.serialization.to_bytes(variables))
    return variables


def net():
    space: dict = {}
    exec(MODEL, space)
    return space["Net"]()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("options", "message", "status"),
    [
        ("--window 8:8", "--window", 2),
        ("--window 0", "--window: expected a size such as 224", 2),
        ("--window 8x8x8", "--window: expected a size such as 224", 2),
        (
            "--window 30x30",
            "--window: expected at most 20x28, the size of first.png",
            2,
        ),
        ("--window 8 --stride 0", "--stride: expected a size", 2),
        ("--window 8 --stride 2x2x2", "--stride: expected a size", 2),
        ("--window 8 --memory 0", "--memory", 2),
        ("--window 8 --scale 0", "--scale", 2),
        ("--window 8 --scale nan", "--scale", 2),
        ("--window 8 --scale inf", "--scale", 2),
        ("--window 8 --heatmap heat.xyz", "--heatmap: expected the name of", 2),
        ("--window 8 --out grid.h5", "--out: expected a file that ends in .npy,", 2),
        ("--window 8 --resume", "--resume: expected --out", 2),
        ("--window 8 --top 0", "--top", 2),
        ("--window 8 --mask none.png", "--mask: none.png: no such file", 2),
        ("--window 8 --mask nodata", "--mask nodata: expected a GeoTIFF with", 2),
        ("--window 8 --mask second.npy second.npy", "--mask: expected one image", 2),
        ("--window 12x12", "not a checkpoint of this", 1),
    ],
)
def test_options_that_cannot_be(options, message, status):
    assert message in run(f"{START} {options}", status).stderr


@pytest.mark.usefixtures("folder")
def test_files_that_are_no_images():
    Path("broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    header = b"{'descr': ('<f4', 'shape': (2, 2), }"  # which tokenize refuses
    Path("header.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    )
    # As a part of an earlier run, too.
    Path("grid.npy.part").write_bytes(Path("header.npy").read_bytes())
    Path("grid.npy.part.json").write_text("{}")
    command = "model.py:Net first.png --params ckpt.msgpack --window 8 --out grid.npy"
    assert "another (not a .npy array)" in run(f"{command} --resume", 2).stderr
    Path("other.npy").write_text("no array", encoding="utf-8")
    np.save("text.npy", np.array([["a"]]))
    np.save("small.npy", np.zeros((9, 9, 3), np.uint8))
    np.save("signed.npy", np.zeros((20, 28, 3), np.int32))
    for images, message in (
        ("none.png", "no such file"),
        ("model.py", "Pillow can't read it"),
        ("broken.npy", "not a .npy array"),
        ("header.npy", "not a .npy array"),
        ("other.npy", "not a .npy array (the magic string is not correct"),
        ("text.npy", "expected numbers"),
        ("first.png small.npy", "expected images of one shape"),
        ("first.png signed.npy", "expected images of one dtype"),
        ("signed.npy", "int32 pixels, whose range isn't known, got none. Pass --scale"),
    ):
        command = f"model.py:Net {images} --params ckpt.msgpack --window 8"
        assert message in run(command, 2).stderr


def test_one_size_is_for_both_axes(folder):
    run(f"{START} --window 8 --stride 2 --out grid.npy")
    np.testing.assert_allclose(np.load("grid.npy"), folder[:1], atol=1e-5)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("dtype", "divisor"),
    [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1), (bool, 1)],
)
def test_pixels_run_from_0_to_1(dtype, divisor):
    variables = one_channel("gray.msgpack", net())
    pixels = np.random.default_rng(4).uniform(0, divisor, (20, 28))
    pixels = pixels > 0.5 if dtype is bool else pixels.astype(dtype)
    if dtype == np.float32:
        np.save("image.npy", pixels)
    else:
        Image.fromarray(pixels).save("image.png")
    name = "image.npy" if dtype == np.float32 else "image.png"
    command = f"model.py:Net {name} --params gray.msgpack --window 8 --stride 4"
    result = run(f"{command} --out grid.npy")
    assert f"{np.dtype(dtype)} pixels, divided by {divisor}" in result.stderr
    grid = fc.slide(net(), (8, 8), 4)
    want = grid(variables, (pixels / np.float32(divisor))[None, :, :, None])
    np.testing.assert_allclose(np.load("grid.npy"), want, atol=1e-5)
    run(f"{command} --scale 100 --out other.npy")
    want = grid(variables, (pixels / np.float32(100))[None, :, :, None])
    np.testing.assert_allclose(np.load("other.npy"), want, rtol=1e-4, atol=1e-4)


def test_images_of_other_channels(folder):
    pixels = np.random.default_rng(4).integers(0, 256, (20, 28, 4)).astype(np.uint8)
    Image.fromarray(pixels).save("rgba.png")
    Image.fromarray(pixels[..., 0]).save("gray.png")
    Image.fromarray(pixels[..., :3]).quantize(7).save("palette.png")
    with Image.open("first.png") as first:
        first.convert("RGBA").save("opaque.png")
    options = "--params ckpt.msgpack --window 8 --stride 2 --out grid.npy"
    for name, count in (("rgba.png", 4), ("gray.png", 1)):
        said = run(f"model.py:Net {name} {options}", 2).stderr
        assert f"for the model in ckpt.msgpack, got {name} with {count}" in said
        assert "Pass --mode RGB" in said
        run(f"model.py:Net {name} {options} --mode RGB")
    run(f"model.py:Net opaque.png {options} --mode RGB")
    np.testing.assert_allclose(np.load("grid.npy"), folder[:1], atol=1e-5)
    run(f"model.py:Net palette.png {options}")  # its colours, not their numbers
    assert "--mode XYZ" in run(f"model.py:Net rgba.png {options} --mode XYZ", 2).stderr
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save("deep.png")
    assert (
        "expected 8 bits a channel"
        in run(f"model.py:Net deep.png {options} --mode RGB", 2).stderr
    )


def test_an_image_of_more_pixels_than_pillow_allows(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    run(f"{START} --window 8 --stride 2 --out grid.npy")
    np.testing.assert_allclose(np.load("grid.npy"), folder[:1], atol=1e-5)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.usefixtures("folder")
def test_a_full_disk_leaves_what_was_there(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    np.save("grid.npy", np.arange(5))
    monkeypatch.setattr(os, "posix_fallocate", full)
    result = run(f"{START} --window 8 --out grid.npy", 2)
    assert "grid.npy: " in result.stderr
    assert "bytes can't be written (No space left on device)" in result.stderr
    assert np.load("grid.npy").tolist() == [0, 1, 2, 3, 4]
    assert not list(Path().glob(".grid*"))


def test_a_disk_that_fills_up_leaves_what_resume_continues(monkeypatch):
    """TensorStore raises a ValueError then."""

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: [...] No space left on device")

    monkeypatch.setattr(fc.Slide, "write", full)
    said = run(f"{START} --window 8 --out grid.zarr", 2).stderr
    assert "can't be written (No space left on device). Make room, then go on" in said
    assert "--resume from grid.zarr.part" in said


TORCH = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 2)
        self.head = torch.nn.Linear(36, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))

def make():
    torch.manual_seed(0)
    return Net().eval()
"""
EQUINOX = """
import equinox as eqx
import jax

class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self):
        self.conv = eqx.nn.Conv2d(3, 4, 3, 2, key=jax.random.key(0))
        self.head = eqx.nn.Linear(36, 3, key=jax.random.key(1))

    def __call__(self, x):
        return self.head(jax.nn.relu(self.conv(x)).reshape(-1))

def make():
    return eqx.filter_vmap(Net())
"""
FUNCTION = """
import jax.numpy as jnp

def make():
    def f(params, x):
        return jnp.tanh(x.mean((1, 2)) @ params["w"])
    return f, {"w": jnp.arange(6.0).reshape(3, 2)}
"""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("code", "needs"),
    [(TORCH, "torchax"), (EQUINOX, "equinox"), (FUNCTION, "jax")],
    ids=["torch", "equinox", "function"],
)
def test_models_of_other_libraries(code, needs):
    pytest.importorskip(needs)
    Path("other.py").write_text(code)
    space: dict = {}
    exec(code, space)
    pixels = np.load("second.npy").astype(np.float32)[None] / 255
    run("other.py:make second.npy --window 8 --stride 4 --out grid.npy")
    first = code != FUNCTION
    pixels = np.moveaxis(pixels, -1, 1) if first else pixels
    rows, columns = (2, 3) if first else (1, 2)
    model, args = space["make"](), ()
    if not first:
        model, args = model[0], model[1:]
    for i, j in ((0, 0), (3, 5), (2, 1)):
        crop = np.take(pixels, range(4 * i, 4 * i + 8), rows)
        crop = np.take(crop, range(4 * j, 4 * j + 8), columns)
        if needs == "torchax":
            import torch

            want = model(torch.tensor(crop)).detach().numpy()
        else:
            want = model(*args, crop)
        np.testing.assert_allclose(np.load("grid.npy")[:, i, j], want, atol=1e-5)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("code", "needs"), [(TORCH, "torchax"), (EQUINOX, "equinox")], ids=["torch", "eqx"]
)
def test_params_of_other_libraries(code, needs):
    pytest.importorskip(needs)
    Path("other.py").write_text(code)
    space: dict = {}
    exec(code, space)
    model = space["make"]()
    if needs == "torchax":
        state = {name: each.numpy() for name, each in model.state_dict().items()}
    else:
        inner = space["Net"]()
        state = {
            f"{name}.{kind}": np.asarray(getattr(getattr(inner, name), kind))
            for name in ("conv", "head")
            for kind in ("weight", "bias")
        }
    # The last layer is linear, so other params of it show in every output.
    for name in ("head.weight", "head.bias"):
        state[name] = 2 * state[name]
    safetensors.numpy.save_file(state, "other.safetensors")
    options = "second.npy --window 8 --stride 4"
    run(f"other.py:make {options} --out own.npy")
    run(f"other.py:make {options} --params other.safetensors --out grid.npy")
    np.testing.assert_allclose(
        np.load("grid.npy"), 2 * np.load("own.npy"), rtol=1e-5, atol=1e-6
    )


def test_levels_regions_bands_and_scaling(folder):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.load("second.npy")
    large = np.repeat(np.repeat(pixels, 2, 0), 2, 1)
    with tifffile.TiffWriter("scan.tif") as tif:
        tif.write(large, tile=(16, 16), subifds=1, photometric="rgb")
        tif.write(pixels, tile=(16, 16), subfiletype=1, photometric="rgb")
    options = "--params ckpt.msgpack --window 8 --stride 2 --out grid.npy"
    run(f"model.py:Net scan.tif --level 1 {options}")
    np.testing.assert_allclose(np.load("grid.npy"), folder[1:], atol=1e-5)
    run(f"model.py:Net scan.tif --level 1 --region 2,4,14,20 {options}")
    np.testing.assert_allclose(np.load("grid.npy"), folder[1:, 1:5, 2:9], atol=1e-5)
    # Written with its bands reversed, scaled and shifted; the options undo it.
    other = np.float32([0.5, 0.25, 2]) * pixels[..., ::-1] / 255 + np.float32([1, 2, 3])
    np.save("other.npy", 10 * other.astype(np.float32))
    undo = "--bands 3,2,1 --scale 10 --mean 3,2,1 --std 2,0.25,0.5"
    said = run(f"model.py:Net other.npy {undo} {options}").stderr
    np.testing.assert_allclose(np.load("grid.npy"), folder[1:], atol=1e-5)
    assert "float32 pixels, divided by 10, mean 3,2,1, std 2,0.25,0.5" in said
    for wrong, message in (
        ("--level 2", "scan.tif: expected one of its levels (0: 40x56, 1: 20x28)"),
        ("--region 0,0,41,5", "scan.tif: expected a region"),
        ("--region 0,x", "--region: expected numbers separated by commas, got '0,x'"),
        ("--bands 4", "scan.tif: expected bands from 1 to 3"),
        ("--mean 1,2", "--mean: expected one number, or 3 separated by commas"),
        ("--std 0", "--std: expected one number, or 3"),
        ("--std nan", "--std: expected one number, or 3"),
    ):
        assert message in run(f"model.py:Net scan.tif {wrong} {options}", 2).stderr


@pytest.mark.usefixtures("folder")
def test_models_that_hold_their_params(folder):
    Path("holds.py").write_text(NNX)
    pixels = np.random.default_rng(4).uniform(size=(20, 28, 1)).astype(np.float32)
    np.save("gray.npy", pixels)
    space: dict = {}
    exec(NNX, space)
    for seed, option in ((0, ""), (1, "--params trained.msgpack")):
        model = space["Net"](nnx.Rngs(seed))
        state = nnx.to_pure_dict(nnx.state(model))
        Path("trained.msgpack").write_bytes(flax.serialization.to_bytes(state))
        done = run(
            f"holds.py:Net gray.npy {option} --window 8 --stride 4 --out grid.npy"
        )
        assert ("params: random, from rngs=nnx.Rngs(0)" in done.stderr) == (not option)
        want = fc.slide(model, (8, 8), 4)(pixels[None])
        np.testing.assert_allclose(np.load("grid.npy"), want, atol=1e-5)
    assert "Pass --params" in run("model.py:Net first.png --window 8", 2).stderr


@pytest.mark.usefixtures("folder")
def test_tags_that_turn_an_image(folder):
    exif = Image.Exif()
    exif[274] = 3
    pixels = np.load("second.npy")
    Image.fromarray(pixels[::-1, ::-1]).save("photo.png", exif=exif)
    options = "--params ckpt.msgpack --window 8 --stride 2 --out grid.npy"
    np.save("mask.npy", np.ones((20, 28), np.uint8))
    for tags, noted in (("--apply-tags", False), ("--ignore-tags", False), ("", True)):
        said = run(f"model.py:Net photo.png {tags} {options} --mask mask.npy").stderr
        assert ("an orientation (3)" in said) == noted
        applied = np.allclose(np.load("grid.npy"), folder[1:], atol=1e-5)
        assert applied == (tags == "--apply-tags")


def test_a_mask_with_a_palette_is_nonzero_where_its_indices_are(folder):
    tifffile = pytest.importorskip("tifffile")
    classes = np.zeros((20, 28), np.uint8)
    classes[:, 14:] = 1
    colors = np.full((3, 256), 65535, np.uint16)  # of class 0, too
    tifffile.imwrite("classes.tif", classes, photometric="palette", colormap=colors)
    options = "--params ckpt.msgpack --window 8 --stride 2 --out grid.npy"
    run(f"model.py:Net first.png --mask classes.tif {options}")
    found = np.load("grid.npy")
    assert np.isnan(found[:, :, :4]).all()
    np.testing.assert_allclose(found[:, :, 4:], folder[:1, :, 4:], atol=1e-5)
