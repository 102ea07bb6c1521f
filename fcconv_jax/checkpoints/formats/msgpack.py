"""Flax msgpack files: flax.serialization's bytes, read and written as a stream.

The format packs arrays into msgpack's extensions, which its library takes whole into
memory. Here the frame is parsed and the entries stay in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...messages.errors import CheckpointError
from ..checkpoint import Checkpoint, ConversionRecord, is_array
from ..entries import LazyLeaf
from ..extents import Advance, Extent, File
from ..nesting import fit_nested
from .base import FileFormat
from .msgpack_frame import ARRAY, CHUNKED, COMPLEX, SCALAR, FrameError, FrameReader
from .safetensors import write_leaves

# flax.serialization's MAX_CHUNK_SIZE: larger arrays are written in chunks.
_CHUNK = 1 << 30


def looks_like(head: bytes) -> bool:
    """Return whether a file begins with a msgpack map, as a Flax state dict does."""
    if not head:
        return False
    # Of fixmap, map16 and map32.
    return 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)


def open_(path: Path) -> Checkpoint:
    """Parse the frame; the entries stay in the file.

    Raises:
      CheckpointError: the file is truncated, is damaged, or isn't a state dict.
    """
    reader = FrameReader(File.read(path))
    try:
        tree = reader.node(())
        if reader.at != reader.size:
            raise FrameError(f"{reader.size - reader.at} bytes too many")
    except FrameError as error:
        raise CheckpointError(
            f"{path}: not a valid Flax msgpack file: {error}. It is truncated or "
            "damaged; get another copy."
        ) from None
    record = ConversionRecord.take(reader.record, path)
    return Checkpoint("msgpack", tree, record, path=path)


def write(path: Path, checkpoint: Checkpoint, advance: Advance) -> None:
    """Write the tree as Flax does, with the record where Flax does not look.

    Flax writes a large array as a dict of chunks, and reads of such a dict what it
    knows. The smallest array is written so, with the record in its dict: a file is one
    thing, which cannot be without its plan.

    Raises:
      CheckpointError: a leaf is of a type that Flax does not pack, or no array can
        hold the record.
    """
    keeper = None
    if checkpoint.record:
        arrays = list(_in_dicts(checkpoint.tree))
        if not arrays:
            raise CheckpointError(
                f"{path.name}: expected an array with axes, nested in dicts only, to "
                "store the plan with, got none. Write the checkpoint as Orbax or "
                "safetensors."
            )
        # Flax joins the chunks of an array in memory: the smallest one costs least.
        keeper = min(arrays, key=lambda leaf: leaf.nbytes)
    file = File.create(path)
    out = _Writer(file)
    try:
        for piece in _packed(checkpoint.tree, checkpoint.record, keeper):
            if isinstance(piece, bytes):
                out.put(piece)
            else:
                out.reserve(piece)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path.name}: Flax can't serialize it: {error}"
        ) from None
    out.flush()
    out.write_entries(path, advance)


def _in_dicts(node: Any) -> Iterator[Any]:
    """Yield the arrays with axes that are reached through dicts alone, as in Flax."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _in_dicts(value)
    elif is_array(node) and len(node.shape) and node.nbytes:
        yield node


class _Writer:
    """Writes the frame, and reserves space for the entries."""

    def __init__(self, file: File):
        self.file, self.at = file, 0
        self.leaves: list[tuple[LazyLeaf, list[tuple[int, int]]]] = []
        self._waiting: list[bytes] = []
        self._from = 0

    def put(self, piece: bytes) -> None:
        """Write a part of the frame."""
        self._waiting.append(piece)
        self.at += len(piece)

    def reserve(self, piece: tuple[LazyLeaf, int]) -> None:
        """Reserve space for the next bytes of a leaf."""
        leaf, nbytes = piece
        self.flush()
        if not self.leaves or self.leaves[-1][0] is not leaf:
            self.leaves.append((leaf, []))
        self.leaves[-1][1].append((self.at, nbytes))
        self.at += nbytes
        self._from = self.at

    def flush(self) -> None:
        """Write what waits."""
        content = b"".join(self._waiting)
        extent = self.file.extent(self._from, self._from + len(content))
        extent.write(0, memoryview(content))
        self._waiting, self._from = [], self.at

    def write_entries(self, path: Path, advance: Advance) -> None:
        """Write the entries into the reserved space."""
        for leaf, spans in self.leaves:
            if len(spans) == 1:
                write_leaves([(spans[0][0], leaf)], self.file, path, advance)
            else:
                leaf.write(Extent(self.file, tuple(spans)), path.parent, advance)


def _packed(
    node: Any, record: ConversionRecord | None, keeper: Any
) -> Iterator[bytes | tuple[LazyLeaf, int]]:
    """Yield the bytes of a tree; for entries, the leaf and its number of bytes."""
    import msgpack

    # As flax.serialization packs; else a tuple would come back as a list.
    packer = msgpack.Packer(strict_types=True)
    if isinstance(node, Mapping):
        yield packer.pack_map_header(len(node))
        for key, value in node.items():
            yield packer.pack(key)
            yield from _packed(value, record, keeper)
    elif isinstance(node, list | tuple):
        yield packer.pack_array_header(len(node))
        for value in node:
            yield from _packed(value, record, keeper)
    elif isinstance(node, np.generic):
        yield from _array(SCALAR, LazyLeaf.of(node), (), None)
    elif isinstance(node, complex):
        content = msgpack.packb((node.real, node.imag))
        yield packer.pack(msgpack.ExtType(COMPLEX, content))
    elif is_array(node):
        leaf = LazyLeaf.of(node)
        entries = record.entries() if record and node is keeper else {}
        if entries or leaf.nbytes > _CHUNK:
            yield from _in_chunks(leaf, entries)
        else:
            yield from _array(ARRAY, leaf, leaf.shape, None)
    else:
        yield packer.pack(node)


def _in_chunks(
    leaf: LazyLeaf, entries: Mapping[str, str]
) -> Iterator[bytes | tuple[LazyLeaf, int]]:
    """Yield an array as Flax writes one that is too large for one extension."""
    import msgpack

    packer = msgpack.Packer(strict_types=True)
    each = max(1, _CHUNK // leaf.itemsize)
    total = leaf.nbytes // leaf.itemsize
    counts = [min(each, total - start) for start in range(0, total, each)]
    yield packer.pack_map_header(3 + len(entries))
    yield packer.pack(CHUNKED) + packer.pack(True) + packer.pack("shape")
    yield packer.pack({str(axis): size for axis, size in enumerate(leaf.shape)})
    yield packer.pack("chunks")
    yield packer.pack_map_header(len(counts))
    for index, count in enumerate(counts):
        yield packer.pack(str(index))
        yield from _array(ARRAY, leaf, (count,), count * leaf.itemsize)
    for key, value in entries.items():
        yield packer.pack(key) + packer.pack(value)


def _array(
    code: int, leaf: LazyLeaf, shape: tuple[int, ...], nbytes: int | None
) -> Iterator[bytes | tuple[LazyLeaf, int]]:
    """Yield an extension that holds shape, dtype and bytes."""
    import msgpack

    dtype = np.dtype(leaf.dtype).name
    nbytes = leaf.nbytes if nbytes is None else nbytes
    # strict_types would refuse the shape, which is a tuple.
    packer = msgpack.Packer(strict_types=False)
    inner = b"\x93" + packer.pack(shape) + packer.pack(dtype) + _head(nbytes, 0xC4)
    yield _head(len(inner) + nbytes, 0xC7) + bytes([code]) + inner
    yield leaf, nbytes


def _head(size: int, first: int) -> bytes:
    """Return the head of a bin (from 0xC4 on) or of an extension (from 0xC7 on)."""
    fixed = (1, 2, 4, 8, 16)
    if first == 0xC7 and size in fixed:
        return bytes([0xD4 + fixed.index(size)])
    for extra, code in enumerate("BHI"):
        if size < 1 << 8 * struct.calcsize(code):
            return struct.pack(f">B{code}", first + extra, size)
    raise ValueError(f"an array of {size} bytes")


FORMAT = FileFormat(
    "msgpack", ".msgpack", looks_like, open_, write, fit_nested, weak=True
)
