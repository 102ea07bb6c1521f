"""safetensors files: a header, and entries that need not be looked at to be moved."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...files.strict_json import loads, whole_numbers
from ...messages.errors import CheckpointError
from ..checkpoint import Checkpoint, ConversionRecord, is_array
from ..entries import Filed, LazyLeaf
from ..extents import BLOCK, Advance, Extent, File, copy
from ..nesting import fit_flat
from .base import FileFormat

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
# Packed dtypes, which NumPy lacks.
_BITS = {"F4": 4, "I4": 4, "U4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WORD = 8
# As the format's own library has it.
_LONGEST_HEADER = 100_000_000


def looks_like(head: bytes) -> bool:
    """Return whether a file begins with a length that a header may have, and JSON."""
    length = int.from_bytes(head[:_WORD], "little")
    return length <= _LONGEST_HEADER and head[_WORD : _WORD + 1] == b"{"


def open_(path: Path) -> Checkpoint:
    """Read the header; the entries stay in the file, in its order.

    Raises:
      CheckpointError: the file is truncated, or its header is damaged.
    """
    file = File.read(path)
    try:
        header, metadata, start = _header(file)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {error}. It is truncated or "
            "damaged; get another copy."
        ) from None
    tree = {}
    for name, (dtype, shape, begin, end) in header.items():
        known = _DTYPES.get(dtype, dtype)
        itemsize = 0 if isinstance(known, str) else known.itemsize
        extent = file.extent(start + begin, start + end)
        tree[name] = LazyLeaf(Filed(shape, itemsize, extent), known)
    record = ConversionRecord.take(metadata, path)
    return Checkpoint("safetensors", tree, record, metadata, path)


def write(path: Path, checkpoint: Checkpoint, advance: Advance) -> None:
    """Write a flat dict of arrays, in its order, with the record in the metadata.

    Entries that keep their order are copied from file to file, many at once; the
    others are moved a piece at a time.

    Raises:
      CheckpointError: a leaf isn't an array, or has a dtype that the format lacks.
    """
    record = checkpoint.record.entries() if checkpoint.record else {}
    metadata = {**checkpoint.metadata, **record}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    leaves = []
    offset = 0
    for name, leaf in checkpoint.tree.items():
        dtype = _dtype_name(leaf)
        if dtype is None:
            kind = leaf.dtype if is_array(leaf) else type(leaf).__name__
            raise CheckpointError(
                f"{path.name}: leaf {name!r} is of type {kind}, safetensors "
                f"holds arrays of {', '.join(sorted(d.name for d in _NAMES))}; "
                "write the checkpoint as Orbax or msgpack."
            )
        moved = LazyLeaf.of(leaf)
        leaves.append((offset, moved))
        end = offset + moved.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(moved.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # As the format's own writer: the entries begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % _WORD)
    # Where the first entries lie in a block as they did, blocks may be shared.
    first = leaves[0][1].entries if leaves else None
    if isinstance(first, Filed) and first.extent.spans:
        text += b" " * ((first.extent.spans[0][0] - _WORD - len(text)) % BLOCK)
    file = File.create(path)
    begin = struct.pack("<Q", len(text)) + text
    file.extent(0, len(begin)).write(0, memoryview(begin))
    write_leaves([(len(begin) + o, leaf) for o, leaf in leaves], file, path, advance)


def write_leaves(
    leaves: list[tuple[int, LazyLeaf]], file: File, path: Path, advance: Advance
) -> None:
    """Write leaves to their places in a file, those that lie together at once."""
    waiting: tuple[Extent, Extent] | None = None
    for offset, leaf in leaves:
        out = file.extent(offset, offset + leaf.nbytes)
        if not (leaf.keeps_order and isinstance(leaf.entries, Filed)):
            leaf.write(out, path.parent, advance)
            continue
        source = leaf.entries.extent
        joined = waiting and _joined(waiting[0], source), out
        # Neighbours in both files are one copy: a model has thousands of small leaves.
        if waiting and joined[0] and (together := _joined(waiting[1], out)):
            waiting = joined[0], together
            continue
        if waiting:
            copy(*waiting, advance)
        waiting = source, out
    if waiting:
        copy(*waiting, advance)


def _joined(one: Extent, other: Extent) -> Extent | None:
    """Return two extents as one if the second begins where the first ends."""
    if one.file is not other.file or len(one.spans) != 1 or len(other.spans) != 1:
        return None
    ((start, length),), ((then, more),) = one.spans, other.spans
    return (
        Extent(one.file, ((start, length + more),)) if start + length == then else None
    )


def _dtype_name(leaf: Any) -> str | None:
    if not is_array(leaf):
        return None
    if isinstance(leaf.dtype, str):
        return leaf.dtype if leaf.dtype in _BITS else None
    return _NAMES.get(np.dtype(leaf.dtype))


def _header(
    file: File,
) -> tuple[Mapping[str, tuple[str, tuple[int, ...], int, int]], dict[str, str], int]:
    """Return each tensor's dtype, shape and place in file order, metadata and start."""
    size = file.size
    if size < _WORD:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", file.extent(0, _WORD).read(0, _WORD))
    if length > min(_LONGEST_HEADER, size - _WORD):
        raise ValueError(f"its header has {length} bytes, but the file only {size}")
    content = loads(file.extent(_WORD, _WORD + length).read(0, length))
    if not isinstance(content, dict):
        raise ValueError("the header is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its metadata does not map strings to strings")
    header = {}
    for name, entry in content.items():
        if not isinstance(entry, dict) or entry.keys() != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise ValueError(f"the entry of {name!r} is {entry!r:.80}")
        dtype, shape = entry["dtype"], whole_numbers(entry["shape"])
        offsets = whole_numbers(entry["data_offsets"])
        if dtype not in _DTYPES and dtype not in _BITS:
            raise ValueError(f"{name!r} has the unknown dtype {dtype!r:.80}")
        bits = _BITS.get(dtype) or 8 * _DTYPES[dtype].itemsize
        if len(offsets) != 2 or math.prod(shape) * bits != 8 * (
            offsets[1] - offsets[0]
        ):
            raise ValueError(
                f"{name!r} of {dtype} {shape} does not fill its bytes {offsets}"
            )
        header[name] = (dtype, shape, *offsets)
    # The format allows no holes and no overlaps, so that nothing can hide in a file.
    ordered = dict(sorted(header.items(), key=lambda item: item[1][2:]))
    end = 0
    for name, (_, _, begin, stop) in ordered.items():
        if begin != end:
            raise ValueError(
                f"{name!r} begins at {begin}, what is before ends at {end}"
            )
        end = stop
    if _WORD + length + end != size:
        raise ValueError(
            f"its header describes {_WORD + length + end} bytes, it has {size}"
        )
    return ordered, metadata, _WORD + length


FORMAT = FileFormat(
    "safetensors", ".safetensors", looks_like, open_, write, fit_flat, flat=True
)
