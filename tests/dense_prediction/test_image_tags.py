"""Tags that change what pixels mean: applied, reported, or refused by name."""

import importlib.util
import warnings

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.dense_prediction.images.base import Affine

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (9, 6)).astype(np.uint8)


TURNED = {
    1: GRAY,
    2: GRAY[:, ::-1],
    3: GRAY[::-1, ::-1],
    4: GRAY[::-1],
    5: GRAY.T,
    6: np.rot90(GRAY, -1),
    7: GRAY[::-1, ::-1].T,
    8: np.rot90(GRAY),
}


def oriented(file, orientation, **options):
    """Write an image with a tag of its orientation."""
    pillow = pytest.importorskip("PIL.Image")
    if file.suffix == ".tif":
        tifffile = pytest.importorskip("tifffile")
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(file, GRAY, extratags=[tag], **options)
        return
    exif = pillow.Exif()
    exif[274] = orientation
    pillow.fromarray(GRAY).save(file, exif=exif)
    ops = pytest.importorskip("PIL.ImageOps")
    upright = np.asarray(ops.exif_transpose(pillow.open(file)))
    np.testing.assert_array_equal(upright, TURNED[orientation])


@pytest.mark.parametrize("mode", [None, "L"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(tmp_path, orientation, suffix, mode):
    file, want = tmp_path / f"photo{suffix}", TURNED[orientation]
    oriented(file, orientation)
    if mode and suffix == ".tif" and orientation > 4:
        with pytest.raises(fc.ImageError, match=r"photo\.tif: .* Leave the mode out"):
            fc.open_image(file, mode=mode)
        return
    image = fc.open_image(file, mode=mode, apply_tags=True)
    np.testing.assert_array_equal(image[0, ..., 0], want)
    part = image[:, 2:5, 1:4, 0]
    np.testing.assert_array_equal(part[0], want[2:5, 1:4])
    assert image.unapplied is None
    stored = fc.open_image(file, mode=mode, apply_tags=False)
    np.testing.assert_array_equal(stored[0, ..., 0], GRAY)
    assert (stored.unapplied is None) == (orientation == 1)
    if orientation > 1:
        with pytest.warns(
            UserWarning, match=rf"orientation \({orientation}\).*True to"
        ):
            image = fc.open_image(file, mode=mode)
        np.testing.assert_array_equal(image[0, ..., 0], GRAY)


def test_levels_are_turned(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = RNG.integers(0, 256, (64, 32, 3)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tag = (274, "H", 1, 6, True)
        options = {"tile": (16, 16), "photometric": "rgb", "extratags": [tag]}
        tif.write(pixels, subifds=1, **options)
        tif.write(pixels[::2, ::2], subfiletype=1, **options)
    want = np.rot90(pixels, -1)
    image = fc.open_image(tmp_path / "a.tif", level=1, apply_tags=True)
    small = np.rot90(pixels[::2, ::2], -1)
    np.testing.assert_array_equal(image[0], small)
    assert image.transform == Affine(2, 0, 0, 0, 2, 0)
    whole = fc.open_image(tmp_path / "a.tif", apply_tags=True)
    np.testing.assert_array_equal(whole[0], want)
    np.testing.assert_array_equal(whole.thumbnail(32), small)


def geotiff(file, array, **options):
    """A GeoTIFF; returns rasterio's dataset, to which tags may be added."""
    rasterio = pytest.importorskip("rasterio")
    height, width, bands = array.shape
    dataset = rasterio.open(
        file,
        "w",
        "GTiff",
        width,
        height,
        bands,
        dtype=array.dtype,
        **{
            "crs": "EPSG:32633",
            "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 4_100_000),
            **options,
        },
    )
    dataset.write(np.moveaxis(array, -1, 0))
    return dataset


def test_scale_and_offset(tmp_path):
    stored = RNG.integers(0, 10_000, (40, 30, 2)).astype(np.int16)
    stored[3, 4] = -999
    with geotiff(tmp_path / "a.tif", stored, nodata=-999) as dataset:
        dataset.scales, dataset.offsets = (0.0001, 0.0001), (-0.1, -0.1)
        dataset.build_overviews([2])
    said = "a scale of 0.0001 and an offset of -0.1, which isn't applied"
    with pytest.warns(UserWarning, match=rf"a\.tif: its tags give {said}"):
        image = fc.open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image[0], stored)
    image = fc.open_image(tmp_path / "a.tif", bands=(2,), apply_tags=True)
    assert (image.dtype, image.largest) == (np.float32, 1)
    want = (stored[..., 1] * 0.0001 - 0.1).astype(np.float32)
    np.testing.assert_array_equal(image[0, ..., 0], want)
    assert np.argwhere(~image.valid(slice(40), slice(30))).tolist() == [[3, 4]]
    half = fc.open_image(tmp_path / "a.tif", level=1, apply_tags=True)
    assert half.shape == (1, 20, 15, 2)
    assert half[:].max() < 1
    np.testing.assert_array_equal(image.thumbnail(20), half[0, ..., 1:])
    with geotiff(tmp_path / "b.tif", stored) as dataset:
        dataset.scales = (1, 2)
    with pytest.warns(UserWarning, match="a scale and an offset of each band"):
        fc.open_image(tmp_path / "b.tif")
    image = fc.open_image(tmp_path / "b.tif", bands=(2, 1), apply_tags=True)
    np.testing.assert_array_equal(image[0], stored[..., ::-1] * [2, 1])


def test_palettes_of_geotiffs(tmp_path):
    classes = RNG.integers(0, 4, (20, 30, 1)).astype(np.uint8)
    colors = [(9, 8, 7, 255), (0, 128, 3, 255), (70, 0, 1, 255), (5, 6, 255, 255)]
    with geotiff(tmp_path / "a.tif", classes, nodata=3) as dataset:
        dataset.write_colormap(1, dict(enumerate(colors)))
    with pytest.raises(fc.ImageError, match=r"palette\. Pass the mode P .*, or RGB"):
        fc.open_image(tmp_path / "a.tif")
    image = fc.open_image(tmp_path / "a.tif", mode="P")
    np.testing.assert_array_equal(image[0], classes)
    colored = fc.open_image(tmp_path / "a.tif", mode="RGB", bands=(3, 1))
    want = np.array(colors, np.uint8)[classes[..., 0]][..., [2, 0]]
    np.testing.assert_array_equal(colored[0], want)
    valid = colored.valid(slice(20), slice(30))
    np.testing.assert_array_equal(valid, classes[..., 0] != 3)
    assert image.crs == colored.crs is not None
    assert image.transform == colored.transform == Affine(10, 0, 5e5, 0, -10, 4.1e6)
    rgba = fc.open_image(tmp_path / "a.tif", mode="RGBA")
    assert rgba.shape[3] == 4


def test_ground_control_points(tmp_path):
    control = pytest.importorskip("rasterio.control")
    points = [
        control.GroundControlPoint(row, column, 5e5 + 10 * column, 4e6 - 9 * row)
        for row, column in ((0, 0), (0, 30), (20, 0), (20, 29))
    ]
    pixels = RNG.integers(0, 256, (20, 30, 1)).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rasterio's, of the missing transform
        geotiff(tmp_path / "a.tif", pixels, gcps=points, transform=None).close()
    with pytest.warns(UserWarning, match="ground control points .* Warp the file"):
        image = fc.open_image(tmp_path / "a.tif")
    assert image.transform == Affine()
    assert image.crs is None
    np.testing.assert_array_equal(image[0], pixels)
    fc.open_image(tmp_path / "a.tif", apply_tags=False)
    with pytest.raises(
        fc.ImageError, match="can be applied, got coordinates by ground"
    ):
        fc.open_image(tmp_path / "a.tif", apply_tags=True)


def test_a_geotiff_without_rasterio(tmp_path, monkeypatch):
    """tifffile and Pillow read its pixels, but not where they are."""
    pixels = RNG.integers(0, 256, (20, 30, 1)).astype(np.uint8)
    geotiff(tmp_path / "a.tif", pixels).close()
    assert fc.open_image(tmp_path / "a.tif").crs is not None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name != "rasterio" and find(name)
    )
    with pytest.warns(UserWarning, match="only rasterio reads, .* Install rasterio: p"):
        image = fc.open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image[0], pixels)
    assert image.crs is None
    with pytest.raises(fc.ImageError, match=r"only rasterio reads\. Install"):
        fc.open_image(tmp_path / "a.tif", apply_tags=True)
