"""Images of any size by tiles: what is written, what is refused, and stopped runs."""

import json
import os
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_all_close

import fcconv_jax as fc
from fcconv_jax.dense_prediction.tiles import Tiles

WINDOW, STRIDE = (12, 10), (2, 4)
IMAGES = np.random.default_rng(0).normal(size=(1, 90, 70, 2)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)


def mean(w, x):
    return nn.relu(x @ w).mean((1, 2))


def with_bias(w, x):
    return nn.relu(x @ w).mean((1, 2)) + 1


GRID = fc.slide(mean, WINDOW, STRIDE)
WANT = np.asarray(GRID(W, IMAGES))


class StopError(Exception):
    pass


def stop(what, done, total):
    if done == 3:
        raise StopError


def options(out, tmp_path, **more):
    given = {"out": out, "memory": 60_000, "resume": tmp_path / "state"}
    return {**given, "progress": False, **more}


def stopped(tmp_path, out=None):
    """A run that was stopped after three tiles; returns its output."""
    out = np.zeros_like(WANT) if out is None else out
    with pytest.raises(StopError):
        GRID.write(W, IMAGES, **options(out, tmp_path, progress=stop))
    assert (tmp_path / "state").exists()
    return out


def test_each_position_is_written_once():
    tiles = Tiles((12, 10), (2, 4), (1, 2), 4, (7, 5), (3, 5))
    places = [tiles.place(number) for number in range(len(tiles.starts))]
    assert [each.first for each in places] == [(0, 0), (3, 0), (4, 0)]
    assert [each.new[1] for each in places] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [each.read[1] for each in places] == [
        *(slice(0, 16), slice(6, 22), slice(8, 24)),
    ]


def test_tiles_write_what_one_call_returns(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    source = np.load(tmp_path / "images.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, WANT.shape)
    seen = []
    GRID.write(
        *(W, source),
        out=out,
        memory=60_000,
        progress=lambda what, done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(seen[0][1] + 1))
    assert len(seen) > 4
    assert_trees_all_close(np.asarray(out), WANT, atol=1e-5)


def resident(file):
    """KiB of a mapped file that are in this process's memory."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_mapped_files_are_released(tmp_path):
    images = np.random.default_rng(0).normal(size=(1, 600, 500, 2)).astype(np.float32)
    files = tmp_path / "images.npy", tmp_path / "out.npy"
    np.save(files[0], images)
    source = np.load(files[0], mmap_mode="r")
    shape = GRID.eval_shape(W, images).shape
    out = np.lib.format.open_memmap(files[1], "w+", np.float32, shape)
    GRID.write(W, source, out=out, memory=300_000, progress=False)
    assert [resident(file) for file in files] == [0, 0]
    assert_trees_all_close(np.asarray(out), np.asarray(GRID(W, images)), atol=1e-5)
    assert min(resident(file) for file in files[1:]) > 100
    # What is in the pages alone is kept.
    scratch = np.load(files[1], mmap_mode="c")
    scratch[:] = 0
    GRID.write(W, images, out=scratch, memory=300_000, progress=False)
    np.testing.assert_array_equal(scratch, out)


@pytest.mark.parametrize(
    ("function", "dtype", "fits"),
    [
        (mean, np.int8, False),
        (mean, np.int64, False),
        (mean, np.float16, True),
        (mean, np.float64, True),
        (lambda w, x: x.argmax(1).astype(jnp.int32), np.int16, False),
        (lambda w, x: (x > 0).any((1, 2)), np.int32, True),
        (lambda w, x: (x > 0).any((1, 2)), bool, True),
    ],
)
def test_outputs_must_hold_the_result(function, dtype, fits):
    grid = fc.slide(function, WINDOW, STRIDE)
    shape = jax.eval_shape(grid, W, IMAGES)
    out = np.zeros(shape.shape, dtype)
    if fits:
        grid.write(W, IMAGES, out=out, progress=False)
        np.testing.assert_allclose(out, np.asarray(grid(W, IMAGES)), atol=1e-2)
    else:
        with pytest.raises(ValueError, match=f"expected {shape.dtype}, got"):
            grid.write(W, IMAGES, out=out, progress=False)


def test_wrong_outputs_and_too_little_memory():
    with pytest.raises(ValueError, match="out: expected arrays of shape"):
        GRID.write(W, IMAGES, out=np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        GRID.write(W, IMAGES, out=jnp.zeros_like(WANT))
    frozen = np.zeros_like(WANT)
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="read-only ndarray"):
        GRID.write(W, IMAGES, out=frozen)
    with pytest.raises(ValueError, match="enough for one window"):
        GRID.write(W, IMAGES, out=np.zeros_like(WANT), memory=1000, progress=False)


def test_outputs_apart_from_the_images(tmp_path):
    """A later tile reads pixels that an earlier one would have written over."""
    step = fc.slide(lambda x: x[:, 0, 0] + x[:, 2, 2], (3, 3), 1)
    images = IMAGES.copy()
    message = "apart from the images, .* in the same memory or file"
    with pytest.raises(ValueError, match=message):
        step.write(images, out=images[:, 2:, 2:], memory=1 << 14, progress=False)
    np.save(tmp_path / "a.npy", images[:, 2:, 2:])
    one, other = (np.load(tmp_path / "a.npy", mmap_mode="r+") for _ in range(2))
    with pytest.raises(ValueError, match=message):
        step.write(one, out=other[:, 2:, 2:], memory=1 << 14, progress=False)


def test_images_in_the_other_byte_order(tmp_path):
    """As FITS and some TIFF files have them; JAX would take the bytes as they are."""
    swapped = IMAGES.astype(IMAGES.dtype.newbyteorder("S"))
    np.testing.assert_array_equal(GRID(W, swapped), WANT)
    np.save(tmp_path / "a.npy", swapped)
    out = np.zeros(WANT.shape, swapped.dtype)
    images = np.load(tmp_path / "a.npy", mmap_mode="r")
    GRID.write(W, images, **options(out, tmp_path))
    np.testing.assert_allclose(out, WANT, rtol=1e-5)
    assert GRID.report(W, swapped).stride == STRIDE


def test_a_stopped_run_goes_on(tmp_path):
    out = stopped(tmp_path)
    assert 0 < (out == 0).mean() < 1
    seen = []
    GRID.write(
        W, IMAGES, **options(out, tmp_path, progress=lambda *done: seen.append(done[1]))
    )
    assert seen[0] >= 3  # those that waited to be written are finished, too
    assert not (tmp_path / "state").exists()
    assert_trees_all_close(out, WANT, atol=1e-6)


def other_pixel():
    images = IMAGES.copy()
    images[0, 3, 4, 1] += 1
    return images


@pytest.mark.parametrize(
    ("name", "grid", "args", "more"),
    [
        ("params", GRID, (W + 1, IMAGES), {}),
        ("image", GRID, (W, other_pixel()), {}),
        ("image", GRID, (W, IMAGES.astype(np.float16)), {}),
        ("model", fc.slide(with_bias, WINDOW, STRIDE), (W, IMAGES), {}),
        ("window", fc.slide(mean, (11, 11), STRIDE), (W, IMAGES), {}),
        ("stride", fc.slide(mean, WINDOW, (2, 3)), (W, IMAGES), {}),
        ("tile size", GRID, (W, IMAGES), {"memory": 90_000}),
        ("output", GRID, (W, IMAGES), {"out": np.zeros_like(WANT)}),
        ("output", GRID, (W, IMAGES), {"out": WANT.astype(np.float64)}),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, name, grid, args, more):
    out = stopped(tmp_path)
    shape = jax.eval_shape(grid, *args).shape
    out = np.zeros(shape, np.float32) if shape != out.shape else out
    with pytest.raises(ValueError, match=f"another run, with other .*{name}"):
        grid.write(*args, **options(**{"out": out, "tmp_path": tmp_path} | more))


def test_arrays_that_a_model_closes_over_are_part_of_it(tmp_path):
    def closing(w):
        return fc.slide(lambda x: mean(w, x), WINDOW, STRIDE)

    out = np.zeros_like(WANT)
    with pytest.raises(StopError):
        closing(W).write(IMAGES, **options(out, tmp_path, progress=stop))
    with pytest.raises(ValueError, match="with other model"):
        closing(W + 1).write(IMAGES, **options(out, tmp_path))
    closing(W.copy()).write(IMAGES, **options(out, tmp_path))
    assert_trees_all_close(out, WANT, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "{", "{}", "[" * 100_000, "\u0000"),
        json.dumps({"format": "fcconv_jax.slide", "run": [], "tiles": {}}),
        json.dumps({"format": "fcconv_jax.slide", "run": {}, "tiles": {"x": 1}}),
        json.dumps({"format": "fcconv_jax.slide", "run": {}, "tiles": {"1": "ab"}}),
    ],
)
def test_files_that_are_no_records(tmp_path, text):
    (tmp_path / "state").write_text(text)
    with pytest.raises(ValueError, match="resume: "):
        GRID.write(W, IMAGES, **options(np.zeros_like(WANT), tmp_path))
    assert (tmp_path / "state").read_text() == text


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_folders_and_pipes_are_no_records(tmp_path, make):
    make(tmp_path / "state")
    with pytest.raises(ValueError, match="resume: expected"):
        GRID.write(W, IMAGES, **options(np.zeros_like(WANT), tmp_path))


def test_a_record_in_no_folder(tmp_path):
    with pytest.raises(ValueError, match="doesn't exist"):
        GRID.write(W, IMAGES, **options(np.zeros_like(WANT), tmp_path / "none"))


class Lazy:
    """An array that is read by slices only, such as one of h5py; counts what is."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.most = 0

    def __getitem__(self, where):
        part = self.array[where]
        self.most = max(self.most, part.nbytes)
        return part

    def __setitem__(self, where, values):
        self.array[where] = values


def test_images_are_read_by_the_tile(tmp_path):
    images, out = Lazy(IMAGES), Lazy(np.zeros_like(WANT))
    GRID.write(W, images, **options(out, tmp_path))
    assert_trees_all_close(out.array, WANT, atol=1e-5)
    assert 0 < images.most <= 20_000  # three arrays of it take 60,000
    assert GRID.report(W, images) == GRID.report(W, IMAGES)
    with pytest.raises(TypeError, match=r"got a Lazy\. Pass it to grid\.write"):
        GRID(W, images)


def test_zarr_arrays_in_and_out(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")

    def made(name, values, shape):
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(tmp_path / name)},
        }
        array = tensorstore.open(
            spec, create=True, dtype=tensorstore.float32, shape=shape
        ).result()
        if values is not None:
            array[...] = values
        return array

    images = np.asarray(jax.random.normal(jax.random.key(5), (1, 90, 70, 2)))
    grid = fc.slide(lambda x: x.mean((1, 2)), WINDOW, STRIDE)
    want = np.asarray(grid(images))
    out = made("out", None, want.shape)
    grid.write(
        made("images", images, images.shape), out=out, memory=60_000, progress=False
    )
    assert_trees_all_close(np.asarray(out.read().result()), want, atol=1e-6)


def test_an_output_with_a_damaged_chunk(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path / "out")},
        "metadata": {"shape": list(WANT.shape), "data_type": "float32"},
    }
    out = tensorstore.open(spec, create=True).result()
    stopped(tmp_path, out)
    (chunk,) = [each for each in (tmp_path / "out" / "c").rglob("*") if each.is_file()]
    chunk.write_bytes(chunk.read_bytes()[:-9])
    again = tensorstore.open(spec, open=True).result()
    with pytest.raises(fc.ImageError, match=r"can't be read back .*a new output"):
        GRID.write(W, IMAGES, **options(again, tmp_path))


def held(mask, row, column):
    """Whether a window holds a pixel of a mask, by looking at each of its pixels."""
    height, width = IMAGES.shape[1:3]
    rows = np.arange(row, row + WINDOW[0]) * mask.shape[0] // height
    columns = np.arange(column, column + WINDOW[1]) * mask.shape[1] // width
    return mask[rows[:, None], columns].any()


@pytest.mark.parametrize("shape", [(90, 70), (9, 7), (13, 11), (1, 1)])
@pytest.mark.parametrize("memory", [60_000, 2**30])
def test_positions_without_any_of_the_mask_are_nan(shape, memory):
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3, shape[1] // 2] = 3
    mask[-1, -1] = 1
    want = WANT.copy()
    for i, j in np.ndindex(want.shape[1:3]):
        if not held(mask, i * STRIDE[0], j * STRIDE[1]):
            want[:, i, j] = np.nan
    out = np.zeros_like(WANT)
    found = GRID.write(
        W, IMAGES, out=out, memory=memory, progress=False, mask=Lazy(mask)
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert (found.skipped > 0) == (memory < 2**30 and shape != (1, 1))
    assert found.skipped < found.tiles


def test_masks_that_cannot_be():
    grid = fc.slide(lambda x: (x > 0).any((1, 2)), WINDOW, STRIDE)
    out = np.zeros((*WANT.shape[:-1], 2), bool)
    with pytest.raises(ValueError, match="mask: expected a float output"):
        grid.write(IMAGES, out=out, mask=np.ones((9, 7)), progress=False)
    for wrong in (np.ones((90, 70, 2)), np.ones((91, 70)), np.ones((0, 7)), 3):
        with pytest.raises(ValueError, match="mask: expected an array of the images'"):
            GRID.write(W, IMAGES, out=np.zeros_like(WANT), mask=wrong, progress=False)


def test_another_mask_is_another_run(tmp_path):
    out, mask = np.zeros_like(WANT), np.ones((9, 7))
    with pytest.raises(StopError):
        GRID.write(W, IMAGES, **options(out, tmp_path, progress=stop, mask=mask))
    other = mask.copy()
    other[:2, :2] = 0
    with pytest.raises(ValueError, match="another run, with other image or mask"):
        GRID.write(W, IMAGES, **options(out, tmp_path, mask=other))
    with pytest.raises(ValueError, match="another run, with other mask"):
        GRID.write(W, IMAGES, **options(out, tmp_path))
    found = GRID.write(W, IMAGES, **options(out, tmp_path, mask=mask))
    assert found.resumed >= 3
    assert_trees_all_close(out, WANT, atol=1e-6)


@pytest.mark.parametrize("fails", ["read", "write"])
def test_errors_of_files_end_the_run_and_it_goes_on(tmp_path, fails):
    class Broken(Lazy):
        count = 0

        def fail(self):
            self.count += 1
            if self.count == 4:
                raise OSError("the disk is gone")

    class Source(Broken):
        def __getitem__(self, where):
            self.fail()
            return super().__getitem__(where)

    class Target(Broken):
        def __setitem__(self, where, values):
            self.fail()
            super().__setitem__(where, values)

    images = Source(IMAGES) if fails == "read" else IMAGES
    whole = np.zeros_like(WANT)
    out = Target(whole) if fails == "write" else whole
    with pytest.raises(OSError, match="the disk is gone"):
        GRID.write(W, images, **options(out, tmp_path))
    found = GRID.write(W, images, **options(whole, tmp_path))
    assert 1 <= found.resumed <= 6  # some wait to be written, in either order
    assert_trees_all_close(whole, WANT, atol=1e-5)


def test_tiles_cover_whole_chunks_of_the_output():
    class Chunked(Lazy):
        chunks = (1, 2, 3, 3)
        parts = ()

        def __setitem__(self, where, values):
            self.parts = (*self.parts, where)
            super().__setitem__(where, values)

    out = Chunked(np.zeros_like(WANT))
    GRID.write(W, IMAGES, out=out, memory=100_000, progress=False)
    assert_trees_all_close(out.array, WANT, atol=1e-5)
    assert len(out.parts) > 4
    assert all(part[1].start % 2 == part[2].start % 3 == 0 for part in out.parts)


def test_a_record_does_not_identify_what_a_callback_calls(tmp_path):
    def twice(x):
        like = jax.ShapeDtypeStruct((), x.dtype)
        return x.mean((1, 2, 3)) * jax.pure_callback(lambda: np.float32(2), like)

    grid, image = fc.slide(twice, (4, 4), 2), np.ones((1, 9, 8, 2), np.float32)
    given = {"out": np.zeros((1, 3, 3), np.float32), "progress": False}
    with pytest.raises(fc.ImageError, match=r"got one with pure_callback.*Drop resume"):
        grid.write(image, resume=tmp_path / "state", **given)
