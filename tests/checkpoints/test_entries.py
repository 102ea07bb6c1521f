import fcntl
import itertools
import math
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.checkpoints import entries as module
from fcconv_jax.checkpoints.entries import Filed, InMemory, LazyLeaf
from fcconv_jax.checkpoints.extents import Extent, File, copy
from fcconv_jax.checkpoints.slabs import row_major_slabs
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.messages.errors import CheckpointError

DTYPES = ("u1", "<u2", "<f4", "<f8", "<c16")


@st.composite
def moves(draw):
    """Rearrangements: reshape, reverse, transpose, reshape."""
    split = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    perm = tuple(draw(st.permutations(range(len(split)))))
    cut = draw(st.integers(0, len(split)))
    source = (math.prod(split[:cut]), math.prod(split[cut:]))
    moved = tuple(split[axis] for axis in perm)
    cut = draw(st.integers(0, len(split)))
    target = (*moved[:cut], math.prod(moved[cut:]))
    flip = draw(st.sets(st.sampled_from(range(len(split))))) if split else ()
    return Rearrangement(source, split, perm, target, tuple(sorted(flip)))


def filed(array: np.ndarray, folder, parts: int) -> Filed:
    """The entries of an array in several places of a file, in between other bytes."""
    file = File.nameless(folder)
    content, spans, at = array.tobytes(), [], 3
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    for start, stop in itertools.pairwise(cuts):
        file.extent(at, at + stop - start).write(0, memoryview(content[start:stop]))
        spans.append((at, stop - start))
        at += stop - start + 5
    return Filed(array.shape, array.itemsize, Extent(file, tuple(spans)))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), move=moves(), dtype=st.sampled_from(DTYPES))
def test_entries_are_moved_and_compared_in_pieces_of_any_size(
    tmp_path_factory, data, move, dtype
):
    folder = tmp_path_factory.getbasetemp()
    rng = np.random.default_rng(math.prod(move.source))
    dtype = np.dtype(dtype)
    count = math.prod(move.source)
    array = rng.integers(0, 255, (count * dtype.itemsize,), np.uint8).view(dtype)
    array = array.reshape(move.source)
    want = np.ascontiguousarray(move(array))
    where = filed(array, folder, data.draw(st.integers(1, 3)))
    out = filed(np.zeros_like(want), folder, data.draw(st.integers(1, 3)))
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", data.draw(st.integers(1, 200)))
        for entries in (where, InMemory(array)):
            moved = LazyLeaf(entries, dtype, move)
            moved.write(out.extent, folder, told.append)
            assert bytes(out.extent.read(0, want.nbytes)) == want.tobytes()
            assert not moved.differs(InMemory(want), folder)
            assert not moved.differs(
                Filed(want.shape, dtype.itemsize, out.extent), folder
            )
            assert moved.array().tobytes() == want.tobytes()
            if count:
                flipped = bytearray(want.tobytes())
                flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1
                other = np.frombuffer(flipped, dtype).reshape(want.shape)
                assert moved.differs(InMemory(other), folder)
                assert moved.differs(filed(other, folder, 2), folder)
    assert sum(told) == 2 * want.nbytes


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple), limit=st.integers(1, 60)
)
def test_slabs_hold_each_entry_once_and_in_order(shape, limit):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    seen = []
    for start, sizes in row_major_slabs(shape, 2, limit):
        box = numbers[tuple(slice(a, a + n) for a, n in zip(start, sizes))]
        assert box.shape == sizes
        assert 2 * box.size <= max(limit, 2)
        seen += box.ravel().tolist()
    assert seen == list(range(numbers.size))


@pytest.mark.parametrize("start", [0, 1000, 4096])
@pytest.mark.parametrize("to", [0, 1000, 5096, 70])
@pytest.mark.parametrize("count", [0, 50, 3096, 9000, 50_000])
def test_whole_blocks_are_shared_where_the_file_system_can(
    tmp_path, monkeypatch, start, to, count
):
    content = np.random.default_rng(0).bytes(start + count)
    (tmp_path / "source").write_bytes(content)
    source, target = File.read(tmp_path / "source"), File.create(tmp_path / "target")
    shared: list[int] = []

    def share(fd, request, what):
        """What the kernel does on Btrfs and XFS."""
        source_fd, begin, length, there = struct.unpack("=qQQQ", what)
        assert (begin % 4096, length % 4096, there % 4096) == (0, 0, 0)
        os.pwrite(fd, os.pread(source_fd, length, begin), there)
        shared.append(length)

    monkeypatch.setattr(fcntl, "ioctl", share)
    told: list[int] = []
    places = source.extent(start, start + count), target.extent(to, to + count)
    copy(*places, told.append)
    assert bytes(places[1].read(0, count)) == content[start:]
    assert sum(told) == count
    aligned = (start - to) % 4096 == 0 and count >= 9000
    assert bool(shared) == aligned


def test_a_file_that_became_shorter_is_named(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(bytes(1000))
    extent = File.read(path).extent(0, 1000)
    path.write_bytes(bytes(400))
    with pytest.raises(CheckpointError, match="source: became shorter"):
        copy(extent, File.nameless(tmp_path).extent(0, 1000))
    with pytest.raises(CheckpointError, match="source: became shorter"):
        extent.read(0, 1000)
