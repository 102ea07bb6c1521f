"""safetensors files: mapped when read, written one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    LeafInfo,
    Record,
    is_array,
)

_DTYPES = {
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
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_WORD = 8


def looks_like(head: bytes) -> bool:
    """Whether a file begins with a length and a JSON header."""
    return head[_WORD : _WORD + 1] == b"{"


def read(path: Path) -> Checkpoint:
    """Reads a file into a flat dict of arrays mapped from it, in the file's order.

    Entries are read from the disk when they are used, so this takes no memory.

    Raises:
      CheckpointError: the file is truncated, its header is damaged, or it holds a
        dtype that NumPy and ml_dtypes lack.
    """
    header, metadata, start = _header(path)
    data = np.memmap(path, np.uint8, "r") if start < path.stat().st_size else None
    tree = {}
    for name, (dtype, shape, (begin, end)) in header.items():
        raw = (
            np.zeros(0, np.uint8) if data is None else data[start + begin : start + end]
        )
        tree[name] = raw.view(np.ndarray).view(dtype).reshape(shape)
    record = Record.take(metadata, path)
    return Checkpoint("safetensors", tree, record, metadata, path)


def inspect(path: Path) -> CheckpointInfo:
    """Reads the header alone. Raises what :func:`read` raises."""
    header, metadata, _ = _header(path)
    leaves = tuple(
        LeafInfo(name, shape, dtype.name, end - begin)
        for name, (dtype, shape, (begin, end)) in header.items()
    )
    record = Record.take(metadata, path)
    return CheckpointInfo(path, "safetensors", leaves, record, metadata)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a flat dict of arrays, in its order, with the record in the metadata.

    Needs the memory of one tensor besides the arrays: each is made contiguous by
    itself, and not at all where it is contiguous already.

    Raises:
      CheckpointError: a leaf is no array, or of a dtype that the format lacks.
    """
    record = checkpoint.record.entries() if checkpoint.record else {}
    metadata = {**checkpoint.metadata, **record}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, leaf in checkpoint.tree.items():
        info = LeafInfo.of(name, leaf)
        if not is_array(leaf) or np.dtype(leaf.dtype) not in _NAMES:
            raise CheckpointError(
                f"{path.name}: leaf {name!r} is of type {info.dtype}, safetensors "
                f"holds arrays of {', '.join(sorted(d.name for d in _NAMES))}; "
                "write the checkpoint as Orbax or msgpack"
            )
        end = offset + info.nbytes
        header[name] = {
            "dtype": _NAMES[np.dtype(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _WORD)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for leaf in checkpoint.tree.values():
            array = np.ascontiguousarray(leaf)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(little.reshape(-1).view(np.uint8).data)


def _header(
    path: Path,
) -> tuple[
    Mapping[str, tuple[np.dtype, tuple[int, ...], tuple[int, int]]],
    dict[str, str],
    int,
]:
    """Dtype, shape and place of each tensor in the order of the file, and the rest."""
    import safetensors

    try:
        # The library checks the sizes, the offsets and that nothing is left over.
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: no valid safetensors file: {error}; it is truncated or damaged, "
            "get another copy"
        ) from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(_WORD))
        content = json.loads(file.read(length))
    # The library hands the metadata back in any order; the file has the true one.
    metadata = {k: metadata[k] for k in content.pop("__metadata__", {}) or {}}
    header = {}
    for name, entry in sorted(
        content.items(), key=lambda item: item[1]["data_offsets"]
    ):
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: leaf {name!r} has dtype {entry['dtype']}, which NumPy and "
                f"ml_dtypes cannot hold as it stands; readable are {list(_DTYPES)}"
            )
        header[name] = (
            np.dtype(_DTYPES[entry["dtype"]]),
            tuple(entry["shape"]),
            tuple(entry["data_offsets"]),
        )
    return header, metadata, _WORD + length
