"""Images of any size by tiles: what is written, what is refused, and stopped runs."""

import json
import os

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.dense_prediction.tiles import _places

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
    places = list(_places([7, 5], [3, 5]))
    assert places == [((0, 0), (0, 0)), ((3, 3), (0, 0)), ((4, 6), (0, 0))]


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
    chex.assert_trees_all_close(np.asarray(out), WANT, atol=1e-5)


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
    with pytest.raises(ValueError, match="room for one window"):
        GRID.write(W, IMAGES, out=np.zeros_like(WANT), memory=1000, progress=False)


def test_a_stopped_run_goes_on(tmp_path):
    out = stopped(tmp_path)
    assert 0 < (out == 0).mean() < 1
    seen = []
    GRID.write(
        W, IMAGES, **options(out, tmp_path, progress=lambda *done: seen.append(done[1]))
    )
    assert seen[0] == 3
    assert not (tmp_path / "state").exists()
    chex.assert_trees_all_close(out, WANT, atol=1e-6)


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
    chex.assert_trees_all_close(out, WANT, atol=1e-6)


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
    chex.assert_trees_all_close(out.array, WANT, atol=1e-5)
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
    chex.assert_trees_all_close(np.asarray(out.read().result()), want, atol=1e-6)
