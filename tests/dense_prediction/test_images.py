"""Images in files: every format read by the part equals the array that was written."""

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.dense_prediction.images.base import Affine

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (90, 70, 3)).astype(np.uint8)
PARTS = (
    (slice(None), slice(None), slice(None)),
    (slice(10, 43), slice(31, 67), slice(1, 3)),
    (slice(0, 1), slice(69, 70), slice(None)),
    (slice(3, 80, 7), slice(None, None, 5), 2),
    (-1, slice(5, 5), slice(None)),
)


def check(image, want):
    """Compare parts of an image with those of an array."""
    assert image.shape == (1, *want.shape)
    assert image.dtype == want.dtype.newbyteorder("=")
    for part in PARTS:
        np.testing.assert_array_equal(image[(slice(None), *part)], want[None][:, *part])
    np.testing.assert_array_equal(image[0, 2, 3], want[2, 3])


def pyramid(file, array, **options):
    """A tiled TIFF with levels of 1, 1/2 and 1/4, as scanners write them."""
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(file) as tif:
        tif.write(array, tile=(32, 16), subifds=2, photometric="rgb", **options)
        for step in (2, 4):
            small = array[::step, ::step]
            tif.write(small, tile=(32, 16), subfiletype=1, photometric="rgb", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": (16, 32)},
        {"tile": (16, 32), "compression": "zlib", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw"},
        {"tile": (32, 16), "byteorder": ">", "compression": "zlib"},
        {"tile": (16, 16), "bigtiff": True},
        {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
        {"planarconfig": "separate"},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs(tmp_path, options, dtype):
    tifffile = pytest.importorskip("tifffile")
    options = dict(options)
    own = {key: options.pop(key) for key in ("byteorder", "bigtiff") if key in options}
    array = RGB.astype(dtype) * 3
    planar = options.get("planarconfig") == "separate"
    with tifffile.TiffWriter(tmp_path / "a.tif", **own) as tif:
        written = np.moveaxis(array, -1, 0) if planar else array
        tif.write(written, photometric="rgb", **options)
    image = fc.open_image(tmp_path / "a.tif")
    check(image, array)
    assert (
        image.largest == {"uint8": 255, "uint16": 65535, "float32": 1}[image.dtype.name]
    )


def test_levels_regions_and_bands(tmp_path):
    pyramid(tmp_path / "a.svs", RGB, compression="zlib")
    for level, step in enumerate((1, 2, 4)):
        image = fc.open_image(tmp_path / "a.svs", level=level)
        check(image, np.ascontiguousarray(RGB[::step, ::step]))
        assert image.transform.at(image.shape[2], image.shape[1]) == (70, 90)
    image = fc.open_image(
        tmp_path / "a.svs", level=1, region=(3, 4, 30, 25), bands=(3, 1)
    )
    np.testing.assert_array_equal(image[:], RGB[None, 6:66:2, 8:58:2, [2, 0]])
    assert image.transform.at(1, 2) == (10, 10)
    for options, message in (
        (
            {"level": 3},
            r"a.svs: expected one of its levels \(0: 90x70, 1: 45x35, 2: 23x18",
        ),
        ({"region": (80, 0, 20, 5)}, r"a.svs: expected a region .* inside 90x70"),
        ({"region": (0, 0, 5)}, "expected a region"),
        ({"bands": (0,)}, "a.svs: expected bands from 1 to 3, got"),
        ({"bands": (4,)}, "expected bands from 1 to 3"),
    ):
        with pytest.raises(fc.ImageError, match=message):
            fc.open_image(tmp_path / "a.svs", **options)


def test_thumbnails_are_of_the_coarsest_level_that_has_enough_pixels(tmp_path):
    pyramid(tmp_path / "a.tif", RGB, compression="zlib")
    for most, step in ((90, 1), (45, 2), (30, 4), (23, 4), (12, 8)):
        found = fc.open_image(tmp_path / "a.tif").thumbnail(most)
        np.testing.assert_array_equal(found, RGB[::step, ::step])
    part = fc.open_image(tmp_path / "a.tif", region=(8, 16, 64, 32), bands=(2,))
    np.testing.assert_array_equal(part.thumbnail(16), RGB[8:72:4, 16:48:4, 1:2])
    second = fc.open_image(tmp_path / "a.tif", level=1)
    np.testing.assert_array_equal(second.thumbnail(23), RGB[::4, ::4])


def test_jpeg_tiles_are_those_that_tifffile_decodes(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    smooth = np.repeat(np.repeat(RGB[:12, :9], 8, 0), 8, 1)
    pyramid(tmp_path / "a.svs", smooth, compression="jpeg")
    want = tifffile.imread(tmp_path / "a.svs")
    check(fc.open_image(tmp_path / "a.svs"), want)


def test_ome_tiffs_have_channels_in_pages(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    channels = RNG.integers(0, 4096, (5, 90, 70)).astype(np.uint16)
    options = {"ome": True, "metadata": {"axes": "CYX"}, "tile": (32, 32)}
    tifffile.imwrite(tmp_path / "a.ome.tif", channels, **options)
    check(fc.open_image(tmp_path / "a.ome.tif"), np.moveaxis(channels, 0, -1))
    options["metadata"] = {"axes": "ZYX"}
    tifffile.imwrite(tmp_path / "b.ome.tif", channels, **options)
    with pytest.raises(fc.ImageError, match=r"b.ome.tif: .*got axes ZYX of shape"):
        fc.open_image(tmp_path / "b.ome.tif")


def test_gray_that_is_white_at_zero_and_bits_below_a_byte(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    gray = RGB[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", gray, photometric="miniswhite", tile=(32, 32))
    np.testing.assert_array_equal(
        fc.open_image(tmp_path / "a.tif")[0, ..., 0], 255 - gray
    )
    deep = RGB[..., 1].astype(np.uint16) * 16
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "b.tif", deep, bitspersample=12)
    image = fc.open_image(tmp_path / "b.tif")
    assert image.largest == 4095
    np.testing.assert_array_equal(image[0, ..., 0], deep)


def test_files_cut_short_or_changed_are_named(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, RGB, tile=(32, 32), compression="zlib", photometric="rgb")
    whole = file.read_bytes()
    with tifffile.TiffFile(file) as tif:
        start = tif.pages[0].dataoffsets[4]
        length = tif.pages[0].tags["ImageLength"]
        where, long = length.valueoffset, length.dtype.name
    for size in (9, 100, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:size])
        with pytest.raises(fc.ImageError, match=r"a\.tif: "):
            fc.open_image(file)[:]
    file.write_bytes(whole[:start] + b"\0\1\2\3" * 4 + whole[start + 16 :])
    image = fc.open_image(file)
    np.testing.assert_array_equal(image[0, :32, :64], RGB[:32, :64])
    with pytest.raises(
        fc.ImageError, match=r"a\.tif: tifffile cannot read .*segment 4"
    ):
        image[:]
    lie = (60_000).to_bytes(2 if long == "SHORT" else 4, "little")
    file.write_bytes(whole[:where] + lie + whole[where + len(lie) :])
    with pytest.raises(fc.ImageError, match=r"a\.tif: damaged: an image of 60000x70"):
        fc.open_image(file)


def test_sizes_of_segments_that_are_missing(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, RGB, tile=(32, 32), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(file) as tif:
        where = tif.pages[0].tags["TileByteCounts"].offset
    whole = bytearray(file.read_bytes())
    whole[where : where + 2] = (32_000).to_bytes(2, "little")  # the tag's number
    file.write_bytes(whole)
    with pytest.raises(fc.ImageError, match=r"a\.tif: damaged"):
        fc.open_image(file)


def test_segments_without_bytes_are_zeros_in_sparse_files_only(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, RGB, tile=(32, 32), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(file) as tif:
        sizes, offsets = (
            tif.pages[0].tags[name].valueoffset
            for name in ("TileByteCounts", "TileOffsets")
        )
    for works in (False, True):
        whole = bytearray(file.read_bytes())
        whole[sizes : sizes + 2] = bytes(2)
        if works:
            whole[offsets : offsets + 4] = bytes(4)
        (tmp_path / "b.tif").write_bytes(whole)
        image = fc.open_image(tmp_path / "b.tif")
        if works:
            assert not image[0, :32, :32].any()
        else:
            with pytest.raises(fc.ImageError, match=r"b\.tif: .*segment 0: 0 bytes"):
                image[:]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif"])
def test_any_damage_is_one_error(tmp_path, suffix):
    """Pillow's plugins and rasterio raise errors of many kinds."""
    pillow = pytest.importorskip("PIL.Image")
    file = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        geotiff(file, RGB)
    else:
        pillow.fromarray(RGB).save(file)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(60):
        changed = bytearray(whole)
        at = int(rng.integers(min(len(whole), 600)))
        changed[at : at + 4] = rng.bytes(4)
        file.write_bytes(changed)
        try:
            image = fc.open_image(file)
            if np.prod(image.shape) < 1e8:
                assert image[:].shape == image.shape
        except fc.ImageError as error:
            refused.append(str(error))
    assert refused
    assert all(str(file) in message for message in refused)


def geotiff(file, array, **options):
    rasterio = pytest.importorskip("rasterio")
    height, width, bands = array.shape
    options = {
        "crs": "EPSG:32633",
        "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 4_100_000),
        **options,
    }
    with rasterio.open(
        file, "w", "GTiff", width, height, bands, dtype=array.dtype, **options
    ) as dataset:
        dataset.write(np.moveaxis(array, -1, 0))
        if options.get("tiled"):
            dataset.build_overviews([2, 4])


def test_geotiffs(tmp_path):
    file = tmp_path / "a.tif"
    array = RNG.normal(size=(90, 70, 4)).astype(np.float32)
    array[20:30, 40:50] = -9999
    array[70:80, 5:9, 2] = -9999
    geotiff(file, array, tiled=True, blockxsize=32, blockysize=32, nodata=-9999)
    image = fc.open_image(file)
    check(image, array)
    assert image.transform == Affine(10, 0, 500_000, 0, -10, 4_100_000)
    assert image.crs is not None
    assert "UTM zone 33N" in image.crs
    assert image.has_nodata
    valid = np.ones((90, 70), bool)
    valid[20:30, 40:50] = False
    colors = np.zeros((8, 9, 3), np.uint8)
    colors[:4, :, 0] = 200
    geotiff(tmp_path / "color.tif", colors, nodata=0)
    some = fc.open_image(tmp_path / "color.tif").valid(slice(8), slice(9))
    np.testing.assert_array_equal(some, colors.any(-1))
    np.testing.assert_array_equal(
        image.valid(slice(5, 60), slice(30, 70)), valid[5:60, 30:70]
    )
    part = fc.open_image(file, region=(15, 35, 40, 30), bands=(4, 2))
    np.testing.assert_array_equal(part[0], array[15:55, 35:65, [3, 1]])
    assert part.transform.at(0, 0) == (500_350, 4_099_850)
    for bands in ((4, 2), (3,), (1, 3)):
        found = fc.open_image(file, bands=bands).valid(slice(70, 80), slice(0, 20))
        assert found[:, 5:9].any() == (3 not in bands)
        assert found[:, 9:].all()
    np.testing.assert_array_equal(
        part.valid(slice(0, 40), slice(0, 30)), valid[15:55, 35:65]
    )
    half = fc.open_image(file, level=1)
    assert half.shape == (1, 45, 35, 4)
    assert half.transform.at(35, 45) == (500_700, 4_099_100)
    with pytest.raises(fc.ImageError, match=r"a\.tif: expected one of its levels"):
        fc.open_image(file, level=3)
    assert not fc.open_image(geo_without_nodata(tmp_path)).has_nodata


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_levels_without_coordinates_lie_in_pixels(tmp_path):
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16, "nodata": 0}
    geotiff(tmp_path / "a.tif", RGB, crs=None, transform=None, **tiled)
    height, width, _ = RGB.shape
    for level in range(3):
        image = fc.open_image(tmp_path / "a.tif", level=level)
        _, rows, columns, _ = image.shape
        assert image.transform == Affine(width / columns, 0, 0, 0, height / rows, 0)


def geo_without_nodata(folder):
    geotiff(folder / "all.tif", RGB)
    return folder / "all.tif"


def test_geotiffs_that_are_cut_short(tmp_path):
    file = tmp_path / "a.tif"
    geotiff(file, RGB, tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    whole = file.read_bytes()
    for size in (len(whole) // 3, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(fc.ImageError, match=r"a\.tif: "):
            fc.open_image(file)[:]


def test_the_grid_of_windows_has_coordinates():
    image_map = Affine(10, 0, 500_000, 0, -10, 4_100_000)
    grid = image_map.grid(window=(8, 6), stride=(2, 3))
    # The centre of the first place is that of the first window.
    assert grid.at(0.5, 0.5) == image_map.at(3, 4)
    assert grid.at(5.5, 7.5) == image_map.at(3 + 3 * 5, 4 + 2 * 7)


def test_slide_reads_an_open_image(tmp_path):
    pyramid(tmp_path / "a.tif", RGB, compression="zlib")
    image = fc.open_image(tmp_path / "a.tif")
    grid = fc.slide(lambda x: x.astype(np.float32).mean((1, 2)), (12, 10), (2, 4))
    want = np.asarray(grid(RGB[None]))
    out = np.zeros_like(want)
    grid.write(image, out=out, memory=100_000, progress=False)
    np.testing.assert_allclose(out, want, rtol=1e-6)
    with pytest.raises(TypeError, match=r"got a Image\. Pass it to grid\.write"):
        grid(image)


def test_threads_read_one_file_at_once(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, tile=(16, 16), photometric="rgb", compression="jpeg")
    want = tifffile.imread(tmp_path / "a.tif")
    for _ in range(20):  # threads met in the first reads of a file
        image = fc.open_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(image[0], want)


def test_threads_move_in_a_file_one_at_a_time(tmp_path, monkeypatch):
    """tifffile takes no lock when it looks for JFIF in the first tile."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    options = {"tile": (16, 16), "photometric": "rgb", "compression": "jpeg"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    want = tifffile.imread(tmp_path / "a.tif")
    image = fc.open_image(tmp_path / "a.tif")
    seek, alone = tifffile.FileHandle.seek, []

    def watched(handle, *args):
        alone.append(handle.lock._is_owned())
        return seek(handle, *args)

    monkeypatch.setattr(tifffile.FileHandle, "seek", watched)
    np.testing.assert_array_equal(image[0], want)
    assert len(alone) == 24
    assert all(alone)
