"""The frame of a Flax msgpack file, parsed without reading the entries of arrays."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from ...files.strict_json import whole_numbers
from ..checkpoint import LEAVES_KEY, PLAN_KEY
from ..entries import Filed, LazyLeaf
from ..extents import Extent, File

# flax.serialization's extension types, and the mark of an array in several chunks.
ARRAY, COMPLEX, SCALAR = 1, 2, 3
CHUNKED = "__msgpack_chunked_array__"
# Deeper than any tree of variables and optimizer states.
_DEEPEST = 100
# Bytes that are read ahead.
_AHEAD = 1 << 16


class FrameError(ValueError):
    """The file isn't msgpack, or not as Flax writes it."""


class FrameReader:
    """Reads the nodes of a file from its begin on."""

    def __init__(self, file: File):
        self.file, self.size, self.at = file, file.size, 0
        self.record: dict[str, Any] = {}
        self._ahead, self._from = b"", 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.size - self.at:
            raise FrameError(f"{count} bytes are declared at {self.at}")
        start = self.at - self._from
        if start < 0 or start + count > len(self._ahead):
            stop = min(self.size, self.at + max(count, _AHEAD))
            self._ahead = bytes(self.file.extent(self.at, stop).read(0, stop - self.at))
            self._from, start = self.at, 0
        self.at += count
        return self._ahead[start : start + count]

    def number(self, code: str) -> int:
        """Return the next number, in the code of :mod:`struct`."""
        return struct.unpack(f">{code}", self.take(struct.calcsize(code)))[0]

    def node(self, path: tuple[str, ...]) -> Any:
        """Return the next node: a dict, a list, an array's entries or a value."""
        if len(path) > _DEEPEST:
            raise FrameError(f"more than {_DEEPEST} levels at {'/'.join(path[:5])!r}")
        kind, size = self.head()
        if kind == "map":
            return self._map(size, path)
        if kind == "list":
            self._check_count(size, 1)
            return [self.node((*path, str(index))) for index in range(size)]
        if kind == "ext":
            return self._extension(size, path)
        if kind in ("str", "bin"):
            return self._text(kind, size)
        return size

    def head(self) -> tuple[str, Any]:
        """Kind of the next node, and its size or its value."""
        byte = self.take(1)[0]
        if byte < 0x80 or byte >= 0xE0:
            return "value", byte if byte < 0x80 else byte - 0x100
        if byte < 0xC0:
            kinds = (("map", 0x80, 0x0F), ("list", 0x90, 0x0F), ("str", 0xA0, 0x1F))
            kind, _, mask = kinds[min((byte - 0x80) >> 4, 2)]
            return kind, byte & mask
        if byte in _VALUES:
            return "value", _VALUES[byte]
        if byte in _NUMBERS:
            return "value", self.number(_NUMBERS[byte])
        if byte in _SIZED:
            kind, code = _SIZED[byte]
            return kind, self.number(code)
        if 0xD4 <= byte <= 0xD8:
            return "ext", 1 << (byte - 0xD4)
        raise FrameError(f"no msgpack has the byte {byte:#x} at {self.at - 1}")

    def _map(self, count: int, path: tuple[str, ...]) -> Any:
        self._check_count(count, 2)
        out: dict[Any, Any] = {}
        names = set()
        for _ in range(count):
            kind, key = self.head()
            if kind in ("str", "bin"):
                key = self._text(kind, key)
            elif kind != "value":
                raise FrameError(f"a {kind} for a key below {'/'.join(path)!r}")
            # Keys 1 and "1" would be one level in a path.
            if str(key) in names:
                raise FrameError(f"the key {key!r:.80} occurs twice")
            names.add(str(key))
            out[key] = self.node((*path, str(key)))
        return _unchunked(out, self.record, path) if CHUNKED in out else out

    def _extension(self, size: int, path: tuple[str, ...]) -> Any:
        code, end = self.number("b"), self.at + size
        name = "/".join(path)
        if end > self.size:
            raise FrameError(f"leaf {name!r} ends at {end}, the file at {self.size}")
        if code == COMPLEX:
            real, imag = self._list(name, 2)
            value: Any = complex(self._float(real, name), self._float(imag, name))
        elif code in (ARRAY, SCALAR):
            value = self._array(name, end)
            if code == SCALAR:
                value = value.array()[()]
        else:
            raise FrameError(
                f"leaf {name!r} is a msgpack extension of type {code}, which Flax "
                "does not write"
            )
        if self.at != end:
            raise FrameError(f"leaf {name!r} ends at {self.at}, not at {end}")
        return value

    def _array(self, name: str, end: int) -> LazyLeaf:
        """Return shape, dtype and bytes, and move the reader past them."""
        kind, count = self.head()
        if (kind, count) != ("list", 3):
            raise FrameError(f"leaf {name!r} is not an array")
        kind, rank = self.head()
        # NumPy has at most 64 axes (32 before 2.0).
        if kind != "list" or rank > 64:
            raise FrameError(f"leaf {name!r} has no shape")
        shape = tuple(self._size(name) for _ in range(rank))
        kind, length = self.head()
        if kind not in ("str", "bin"):
            raise FrameError(f"leaf {name!r} has no dtype")
        dtype = _dtype(str(self._text("str", length)), name)
        kind, nbytes = self.head()
        if kind not in ("bin", "str") or self.at + nbytes != end:
            raise FrameError(f"leaf {name!r} has no bytes")
        if math.prod(shape) * dtype.itemsize != nbytes:
            raise FrameError(
                f"leaf {name!r} of {dtype} {shape} does not fill {nbytes} bytes"
            )
        extent = self.file.extent(self.at, end)
        self.at = end
        return LazyLeaf(Filed(shape, dtype.itemsize, extent), dtype)

    def _size(self, name: str) -> int:
        kind, size = self.head()
        if kind != "value" or type(size) is not int or not 0 <= size < 1 << 48:
            raise FrameError(f"leaf {name!r} has no shape")
        return size

    def _list(self, name: str, count: int) -> list[Any]:
        if self.head() != ("list", count):
            raise FrameError(f"leaf {name!r} has no {count} parts")
        return [self.head()[1] for _ in range(count)]

    def _float(self, value: Any, name: str) -> float:
        if type(value) not in (int, float):
            raise FrameError(f"leaf {name!r} is not a complex number")
        return float(value)

    def _text(self, kind: str, size: int) -> str | bytes:
        content = self.take(size)
        if kind == "bin":
            return content
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise FrameError(str(error)) from None

    def _check_count(self, count: int, least: int) -> None:
        # A node takes a byte at least: a damaged count is refused before it is
        # believed.
        if count * least > self.size - self.at:
            raise FrameError(f"{count} nodes are declared at {self.at}")


_VALUES = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCA: "f", 0xCB: "d"} | dict(zip(range(0xCC, 0xD4), "BHIQbhiq"))
_SIZED = {
    byte: (kind, code)
    for kind, first, codes in (
        ("bin", 0xC4, "BHI"),
        ("ext", 0xC7, "BHI"),
        ("str", 0xD9, "BHI"),
        ("list", 0xDC, "HI"),
        ("map", 0xDE, "HI"),
    )
    for byte, code in enumerate(codes, first)
}


def _dtype(name: str, leaf: str) -> np.dtype:
    import ml_dtypes

    try:
        # As Flax does: bfloat16 and the like are known by name alone.
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if (
        dtype is None
        or dtype.hasobject
        or dtype.kind in "USMm"
        or dtype.type is np.void
    ):
        raise FrameError(f"leaf {leaf!r} has the dtype {name!r:.80}")
    return dtype


def _unchunked(node: dict[str, Any], record: dict[str, Any], path: Any) -> LazyLeaf:
    """Return an array that Flax stored in chunks, and the record, if present."""
    name = "/".join(path)
    shape, chunks = node.get("shape"), node.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise FrameError(f"leaf {name!r} is not an array in chunks")
    try:
        sizes = whole_numbers([shape[str(axis)] for axis in range(len(shape))])
        parts = [chunks[str(index)].entries for index in range(len(chunks))]
        (dtype,) = {chunk.dtype for chunk in chunks.values()}
    except (KeyError, ValueError, AttributeError):
        raise FrameError(f"leaf {name!r} is not an array in chunks") from None
    spans = tuple(span for part in parts for span in part.extent.spans)
    extent = Extent(parts[0].extent.file, spans)
    if math.prod(sizes) * dtype.itemsize != extent.nbytes:
        raise FrameError(f"leaf {name!r} of {dtype} {sizes} has {extent.nbytes} bytes")
    for key in (PLAN_KEY, LEAVES_KEY):
        if key in node:
            record[key] = node[key]
    return LazyLeaf(Filed(sizes, dtype.itemsize, extent), dtype)
