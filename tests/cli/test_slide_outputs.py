"""fcconv slide: files with coordinates, masks, places, and stopped runs."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from PIL import Image
from typer.testing import CliRunner

import fcconv_jax as fc
from fcconv_jax.cli import app
from fcconv_jax.cli.heatmap import Heat

MODEL = """
import jax.numpy as jnp

def make():
    def f(params, x):
        y = jnp.maximum(x[..., None] * params["w"], 0.1)
        return y.mean((1, 2)).sum(1)
    return f, {"w": jnp.array([1.0, -2.0, 0.5])}
"""
WINDOW, STRIDE = (8, 12), (4, 2)
OPTIONS = "--window 8x12 --stride 4x2"
PIXELS = np.random.default_rng(0).normal(size=(60, 90, 2)).astype(np.float32)


@pytest.fixture
def want(tmp_path, monkeypatch):
    """Results that the command is to write, in a folder with a model and an image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    np.save("image.npy", PIXELS)
    space: dict = {}
    exec(MODEL, space)
    function, params = space["make"]()
    return np.asarray(fc.slide(function, WINDOW, STRIDE)(params, PIXELS[None]))


def run(command, status=0):
    result = CliRunner().invoke(app, ["slide", "model.py:make", *shlex.split(command)])
    assert result.exit_code == status, result.output
    return result


def geotiff(file, pixels, **options):
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(0.3, 0.01, 500_000.7, 0.02, -0.3, 4_100_000.1)
    options = {"crs": "EPSG:32633", "transform": transform, **options}
    height, width, bands = pixels.shape
    with rasterio.open(
        file, "w", "GTiff", width, height, bands, dtype=pixels.dtype, **options
    ) as dataset:
        dataset.write(np.moveaxis(pixels, -1, 0))
    return transform


def test_a_zarr_says_what_it_is_of(want):
    for _ in range(2):  # it replaces another
        run(f"image.npy {OPTIONS} --out grid.zarr")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": "grid.zarr"}}
    np.testing.assert_allclose(
        tensorstore.open(spec).result().read().result(), want, atol=1e-6
    )
    found = json.loads(Path("grid.zarr/zarr.json").read_text())["attributes"]
    assert found["fcconv_jax"] == {
        "window": [8, 12],
        "stride": [4, 2],
        "crs": None,
        "transform": [2, 0, 5, 0, 4, 2],
    }
    left = {path.name for path in Path().iterdir()} - {"__pycache__"}
    assert left == {"grid.zarr", "image.npy", "model.py"}


def _thesis(path):
    path.mkdir(parents=True)
    (path / "thesis").write_text("years")


@pytest.mark.parametrize(
    ("end", "make"),
    [
        ("npy.part.lock", lambda path: path.symlink_to("thesis")),
        ("npy.part.lock", os.mkfifo),
        ("npy.part.lock", Path.mkdir),
        ("npy.part", lambda path: path.symlink_to("thesis")),
        ("npy.part", os.mkfifo),
        ("npy.part", _thesis),
        ("npy.part.json", lambda path: path.symlink_to("thesis")),
        ("npy.part.json", Path.mkdir),
        ("zarr.part", _thesis),
        ("zarr.part", lambda path: _thesis(path / "c")),
        ("zarr.part", lambda path: path.symlink_to("folder")),
        ("zarr", lambda path: (_thesis(path), (path / "zarr.json").write_text("{}"))),
        ("zarr", lambda path: path.symlink_to("folder")),
    ],
)
@pytest.mark.parametrize("resume", ["", "--resume"])
def test_what_others_left_is_not_touched(tmp_path, monkeypatch, end, make, resume):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").write_text("years")
    _thesis(tmp_path / "folder")
    (tmp_path / "folder" / "zarr.json").write_text("{}")
    make(Path(f"grid.{end}"))
    before = sorted(map(str, Path().rglob("*")))
    suffix = end.partition(".")[0]
    done = run(f"image.npy {OPTIONS} --out grid.{suffix} {resume}", 2)
    assert re.search(r"got something else\. Move it|got the folder", done.stderr)
    assert sorted(map(str, Path().rglob("*"))) == before
    assert all(path.read_text() == "years" for path in Path().rglob("thesis"))


def test_a_stopped_zarr_with_other_coordinates(want, monkeypatch):
    def stop(*_, resume, **__):
        resume.write_text("{}")
        raise ValueError("stopped")

    geotiff("image.tif", PIXELS)
    with monkeypatch.context() as patch:
        patch.setattr(fc.Slide, "write", stop)
        run(f"image.tif {OPTIONS} --out grid.zarr", 1)
    geotiff("image.tif", PIXELS, crs="EPSG:32634")
    said = run(f"image.tif {OPTIONS} --out grid.zarr --resume", 2).stderr
    assert 'got that of another (crs PROJCS["WGS 84 / UTM zone 33N"' in said
    said = run(f"image.npy {OPTIONS} --out grid.zarr --resume", 2).stderr
    assert re.search(r"another \(crs .*, transform \[0\.6, .*\]\)\. Pass that", said)


@pytest.mark.parametrize("region", [None, (8, 15, 40, 61)])
def test_a_geotiff_lies_where_its_windows_do(want, region):
    rasterio = pytest.importorskip("rasterio")
    image_map = geotiff("image.tif", PIXELS)
    option = "" if region is None else "--region " + ",".join(map(str, region))
    run(f"image.tif {OPTIONS} {option} --out grid.tif")
    row, column, height, width = region or (0, 0, *PIXELS.shape[:2])
    part = PIXELS[None, row : row + height, column : column + width]
    space: dict = {}
    exec(MODEL, space)
    function, params = space["make"]()
    want = np.asarray(fc.slide(function, WINDOW, STRIDE)(params, part))[0]
    with rasterio.open("grid.tif") as dataset:
        np.testing.assert_allclose(np.moveaxis(dataset.read(), 0, -1), want, atol=1e-6)
        assert dataset.crs == "EPSG:32633"
        assert dataset.profile["tiled"]
        to_pixels = ~image_map
        for i, j in ((0, 0), (want.shape[0] - 1, want.shape[1] - 1), (3, 5)):
            x, y = dataset.xy(i, j)  # the centre of a pixel of the grid
            found = (
                to_pixels.a * x + to_pixels.b * y + to_pixels.c,
                to_pixels.d * x + to_pixels.e * y + to_pixels.f,
            )
            middle = (column + 2 * j + 6, row + 4 * i + 4)
            assert max(abs(np.subtract(found, middle))) < 1e-6


@pytest.fixture
def old(want):
    """A TIFF that is to stay, and the size of the new one's pixels."""
    geotiff("grid.tif", PIXELS)
    return Path("grid.tif").read_bytes(), want.nbytes


def test_a_tiff_without_room_is_refused_before_the_work(old, monkeypatch):
    kept, nbytes = old

    def allocate(fd, start, size):
        if size > 1.5 * nbytes:  # the part fits, the file beside it doesn't
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(fc.Slide, "write", lambda *_, **__: pytest.fail("worked"))
    said = run(f"image.npy {OPTIONS} --out grid.tif", 2).stderr
    assert "bytes can't be written (No space left on device). Make room, or" in said
    assert Path("grid.tif").read_bytes() == kept
    assert set(os.listdir()) - {"__pycache__"} == {"grid.tif", "image.npy", "model.py"}


def test_a_tiff_that_reads_back_other_than_written_stays_out(want, old, monkeypatch):
    writer = pytest.importorskip("rasterio.io").DatasetWriter
    write = writer.write
    monkeypatch.setattr(
        *(writer, "write"),
        lambda self, values, **options: write(self, 0 * values, **options),
    )
    said = run(f"image.npy {OPTIONS} --out grid.tif", 2).stderr
    assert "it reads back differently). Make room and take the result" in said
    assert "from grid.tif.part, a .npy array, or pass another --out" in said
    assert Path("grid.tif").read_bytes() == old[0]
    np.testing.assert_allclose(np.load("grid.tif.part"), want, atol=1e-6)


def test_a_tiff_of_a_picture_has_pixels_as_coordinates(want):
    rasterio = pytest.importorskip("rasterio")
    run(f"image.npy {OPTIONS} --out grid.tif")
    with rasterio.open("grid.tif") as dataset:
        np.testing.assert_allclose(
            np.moveaxis(dataset.read(), 0, -1), want[0], atol=1e-6
        )
        assert dataset.xy(3, 5) == (5 * 2 + 6, 3 * 4 + 4)
    said = run(f"image.npy image.npy {OPTIONS} --out grid.tif", 2).stderr
    assert "grid.tif: expected one image for a TIFF, got 2" in said


def test_places_are_printed_with_coordinates(want):
    pytest.importorskip("rasterio")
    image_map = geotiff("image.tif", PIXELS)
    lines = run(f"image.tif {OPTIONS} --top 5").stdout.splitlines()
    heat = want[0].max(-1)
    found = []
    for line in lines:
        match = re.fullmatch(
            r"image.tif: largest output (\d), (\S+), at (\d+),(\d+); centre at "
            r"x=(\S+), y=(\S+) \(coordinates\)",
            line,
        )
        assert match
        label, value, y, x, east, north = map(float, match.groups())
        i, j = int(y) // 4, int(x) // 2
        assert want[0, i, j].argmax() == label
        assert abs(heat[i, j] - value) < 1e-3
        wanted = (
            image_map.a * (x + 6) + image_map.b * (y + 4) + image_map.c,
            image_map.d * (x + 6) + image_map.e * (y + 4) + image_map.f,
        )
        np.testing.assert_allclose((east, north), wanted, atol=1e-3)
        found.append((y, x, heat[i, j]))
    assert len(found) == 5
    assert found[0][2] == heat.max()
    assert [each[2] for each in found] == sorted((e[2] for e in found), reverse=True)
    for n, (y, x, _) in enumerate(found):
        assert all(abs(y - b) >= 8 or abs(x - a) >= 12 for b, a, _ in found[:n])


@pytest.mark.usefixtures("want")
def test_places_of_a_region_are_those_of_the_level():
    pytest.importorskip("rasterio")
    geotiff("image.tif", PIXELS, crs=None)  # coordinates of an unknown system
    region = "--region 20,30,40,60 --heatmap heat.png"
    place, heat = run(f"image.tif {OPTIONS} {region}").stdout.splitlines()
    row, column = re.findall(r"at (\d+),(\d+); centre .*\(coordinates\)", place)[0]
    assert f"highest in the 8x12 crop at row {row}, column {column};" in heat
    assert int(row) >= 20
    assert int(column) >= 30
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter("scan.tif") as tif:
        how = {"photometric": "minisblack", "planarconfig": "contig"}
        how["tile"] = (16, 16)
        tif.write(PIXELS, subifds=1, **how)
        tif.write(PIXELS[::2, ::2], subfiletype=1, **how)
    region = "--level 1 --region 3,7,20,30 --scale 1"
    assert "(pixels of the largest level)" in run(f"scan.tif {OPTIONS} {region}").stdout
    assert "centre" not in run(f"scan.tif {OPTIONS} --region 3,7,20,30").stdout


def test_masks_from_files_and_nodata(want):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:5, 12:15] = 255  # rows 9 to 14 and columns 36 to 44 of the image
    Image.fromarray(mask).save("mask.png")
    said = run(f"image.npy {OPTIONS} --mask mask.png --out grid.npy").stderr
    assert "skipped 0 of 1 tiles without any of the mask" in said
    rows, columns = np.arange(14) * 4, np.arange(40) * 2
    inside = ((rows + 8 > 9) & (rows < 15))[:, None] & (
        (columns + 12 > 36) & (columns < 45)
    )
    grid = np.load("grid.npy")[0]
    np.testing.assert_array_equal(np.isnan(grid).all(-1), ~inside)
    np.testing.assert_allclose(grid[inside], want[0][inside], atol=1e-6)
    # The mask is of the whole image, whatever the region, in any mode.
    Image.fromarray(mask).convert("RGBA").save("mask.png")
    run(f"image.npy {OPTIONS} --mask mask.png --region 4,2,48,80 --out part.npy")
    np.testing.assert_array_equal(
        np.isnan(np.load("part.npy")[0]).all(-1), ~inside[1:12, 1:36]
    )
    Image.fromarray(mask[:, :25]).save("other.png")
    said = run(f"image.npy {OPTIONS} --mask other.png", 2).stderr
    assert "--mask: expected a mask of image.npy, 60x90 pixels or fewer" in said


def test_windows_that_hold_nodata_are_left_out(want):
    pytest.importorskip("rasterio")
    pixels = PIXELS.copy()
    pixels[:, 30:] = -1
    geotiff("image.tif", pixels, nodata=-1)
    run(f"image.tif {OPTIONS} --mask nodata --out grid.npy")
    grid = np.load("grid.npy")[0]
    left = [2 * column + 12 > 30 for column in range(40)]
    assert np.isnan(grid).all((0, 2)).tolist() == left
    known = ~np.array(left)
    np.testing.assert_allclose(grid[:, known], want[0][:, known], atol=1e-6)
    geotiff("image.tif", pixels)
    said = run(f"image.tif {OPTIONS} --mask nodata", 2).stderr
    assert "--mask nodata: expected a GeoTIFF with a nodata value" in said


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_pixels_that_are_nan_are_black_under_a_heat_map(want):
    pixels = PIXELS.copy()
    pixels[:, 30:] = np.nan
    np.save("image.npy", pixels)
    said = run(f"image.npy {OPTIONS} --heatmap heat.png").stdout
    assert f"{14 * 30} positions have no finite value" in said
    with Image.open("heat.png") as picture:
        assert not np.asarray(picture)[:60, 30:90].any()


def test_a_mask_without_a_pixel_leaves_nothing(want):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save("mask.png")
    options = "--mask mask.png --heatmap heat.png --out grid.npy"
    done = run(f"image.npy {OPTIONS} {options}")
    assert "skipped 1 of 1 tiles" in done.stderr
    assert "no position has an output other than NaN" in done.stdout
    assert np.isnan(np.load("grid.npy")).all()


def test_a_heat_map_keeps_one_class_in_memory():
    heat = Heat.of(np.arange(60.0).reshape(3, 4, 5), 2, softmax=False)
    assert heat.values.base is None
    assert heat.values.tolist() == (np.arange(0.0, 60, 5) + 2).reshape(3, 4).tolist()


def test_heat_lies_at_the_centre_of_its_window(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    pixels = np.zeros((60, 90, 2), np.float32)
    pixels[40:48, 60:72, 0] = 1  # one window, at its row 10 and column 30
    np.save("image.npy", pixels)
    run("image.npy --window 8x12 --stride 8x12 --heatmap heat.png")
    with Image.open("heat.png") as picture:
        red, green, _ = np.moveaxis(np.asarray(picture)[:60, :90].astype(int), -1, 0)
    rows, columns = np.nonzero(red - green > 60)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 47, 60, 71)


MEAN = """
import jax.numpy as jnp

def make():
    return (lambda params, x: x.mean((1, 2)) * params["w"]), {"w": jnp.array([1.0, -2])}
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npy", "zarr"])
def test_ctrl_c_leaves_what_resume_continues(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MEAN)
    rng = np.random.default_rng(0)
    np.save("image.npy", rng.normal(size=(800, 800, 2)).astype(np.float32))
    options = f"--window 100 --stride 5 --memory 1 --out grid.{suffix}"
    command = [sys.executable, "-m", "fcconv_jax", "slide", "model.py:make"]
    command += ["image.npy", *options.split()]
    # A job in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    record = Path(f"grid.{suffix}.part.json")
    while started.poll() is None and not (
        record.exists() and len(json.loads(record.read_text())["tiles"]) > 2
    ):
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate()
    assert started.returncode == 130, err
    assert f"are in grid.{suffix}.part. Run the same command with --resume" in err
    assert not Path(f"grid.{suffix}").exists()
    said = run(f"image.npy {options} --resume --scale 2", 1).stderr
    assert "is the record of another run, with other model or scaling" in said
    said = run(f"image.npy {options} --resume").stderr
    assert re.search(r"[1-9]\d* of \d+ tiles were finished", said)
    left = {f"grid.{suffix}", "image.npy", "model.py"}
    assert set(os.listdir()) - {"__pycache__"} == left
    if suffix == "npy":
        image = np.load("image.npy").astype(np.float64)
        sums = np.pad(image.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
        at = np.arange(141) * 5
        top, left, low, right = at[:, None], at[None], at[:, None] + 100, at[None] + 100
        total = sums[low, right] - sums[top, right] - sums[low, left] + sums[top, left]
        want = total / 10_000 * [1, -2]
        np.testing.assert_allclose(np.load("grid.npy")[0], want, atol=1e-5)
