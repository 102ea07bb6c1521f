"""The record of a run over tiles: what it was of, and what each tile held.

A stopped run may be continued by the same run only. The record has a digest of each
thing that decides the result, and for each finished tile those of the pixels that it
read and of the result that was written. They are compared before the run resumes: the
image and the output may be files, and no array alone shows that it is the same one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..files.install import replacing
from ..messages.errors import ImageError
from ..tracing.jaxprs import AnyJaxpr, opened, subjaxprs
from .program import AllCrops
from .tiles import LazyArray

_FIELD = "fcconv_jax.slide"
Tile = tuple[str, str]


def identity(
    program: AllCrops, args: PyTree, images: LazyArray, tile: Sequence[int]
) -> dict[str, str]:
    """Return digests of all that decides a run's result, named as in errors.

    Args:
      program: on one window of the images.
      args: the function's arguments besides the images.
      images: their shape and dtype are of the identity; their entries are compared
        tile by tile.
      tile: positions of a tile along each axis.

    Raises:
      ImageError: the function calls Python code, which no digest covers.
    """
    jaxpr = program.jaxpr
    if called := _callbacks(jaxpr):
        raise ImageError(
            f"resume: expected a function that JAX traces, got one with {called[0]}, "
            "whose Python code can't be identified in a later run. Drop resume=."
        )
    # Functions in a trace are printed with their addresses, which differ in the next.
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))
    return {
        "model or scaling": digest([text.encode(), *map(_bytes, _constants(jaxpr))]),
        "params": digest(map(_bytes, jax.tree.leaves(args))),
        "image": digest([f"{images.shape} {images.dtype}".encode()]),
        "window": digest([str(program.window).encode()]),
        "stride": digest([str(program.stride).encode()]),
        "axes": digest([str(program.axes).encode()]),
        # Finished tiles are known by number, which stands for a place with this size
        # only.
        "tile size (memory=)": digest([str(list(tile)).encode()]),
    }


def _constants(jaxpr: AnyJaxpr) -> Iterator[Any]:
    """Yield the arrays that a function closes over."""
    body, consts = opened(jaxpr)
    yield from consts
    for eqn in body.eqns:
        for _, inner in subjaxprs(eqn):
            yield from _constants(inner)


def _callbacks(jaxpr: AnyJaxpr) -> list[str]:
    """Return the primitives by which a program gets values from Python."""
    found = []
    for eqn in opened(jaxpr)[0].eqns:
        name = eqn.primitive.name
        if name in ("pure_callback", "io_callback"):
            found.append(name)
        for _, inner in subjaxprs(eqn):
            found += _callbacks(inner)
    return found


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 of some bytes, each with its length.

    Example:
      >>> digest([b"ab", b""]) == digest([b"a", b"b"])
      False
    """
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{memoryview(part).nbytes}:".encode())
        found.update(part)
    return found.hexdigest()


def _bytes(leaf: Any) -> bytes:
    # NumPy has no dtype for random keys.
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not hasattr(leaf, "dtype"):
        return repr(leaf).encode()
    array = np.asarray(leaf)
    return f"{array.shape} {array.dtype} ".encode() + array.tobytes()


class FinishedTiles:
    """The tiles that are finished, kept in a file.

    Args:
      file: replaced whole after each tile; read if it exists.
      run: the run's :func:`identity`.
      count: how many tiles the run has.

    Raises:
      ImageError: the file is of another run, or isn't such a record.
    """

    def __init__(self, file: Path, run: Mapping[str, str], count: int):
        self.file = file
        self._run = dict(run)
        self.tiles: dict[int, Tile] = {}
        # Now, since the record is first written once a tile has been computed.
        if not file.parent.is_dir():
            raise ImageError(f"resume: {file.parent} doesn't exist. Create it first.")
        if not file.exists():
            return
        found, tiles = _parsed(file)
        other = [name for name in self._run if found.get(name) != self._run[name]]
        if other or set(found) != set(self._run):
            self._refuse(other or sorted(set(found) ^ set(self._run)))
        if not all(0 <= number < count for number in tiles):
            raise _not_a_record(file)
        self.tiles = tiles

    def check(
        self, number: int, evidence: Sequence[Any], written: Sequence[Any]
    ) -> None:
        """Compare a finished tile with the image and the output as they are now.

        Args:
          number: of the tile.
          evidence: the pixels that it reads, and its part of the mask, if there is one.
          written: its part of each output.

        Raises:
          ImageError: the image or the output is another one.
        """
        read, made = self.tiles[number]
        if digest(map(_bytes, evidence)) != read:
            self._refuse(["image" if len(evidence) == 1 else "image or mask"])
        if digest(map(_bytes, written)) != made:
            self._refuse(["output (out=)"])

    def add(self, number: int, evidence: Sequence[Any], written: Sequence[Any]) -> None:
        """Note that a tile is written; the result must be on disk by now."""
        made = digest(map(_bytes, written))
        self.tiles[number] = digest(map(_bytes, evidence)), made
        kept = {"format": _FIELD, "run": self._run, "tiles": self.tiles}
        with replacing(self.file) as fresh:
            fresh.write_text(json.dumps(kept), encoding="utf-8")

    def remove(self) -> None:
        """Forget the run, which is over."""
        self.file.unlink(missing_ok=True)

    def _refuse(self, other: Sequence[str]) -> None:
        raise ImageError(
            f"resume: {self.file} is the record of another run, with other "
            f"{', '.join(other)}. Pass the same as in that run, or remove the file to "
            "start again."
        )


def _parsed(file: Path) -> tuple[dict[str, str], dict[int, Tile]]:
    """Return the run and the tiles in a record, each value of its type."""
    if not file.is_file():  # reading a pipe would never end
        raise _not_a_record(file)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] != _FIELD:
            raise _not_a_record(file)
        run = {str(name): str(value) for name, value in kept["run"].items()}
        tiles = {}
        for number, (read, made) in kept["tiles"].items():
            tiles[int(number)] = str(read), str(made)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _not_a_record(file) from None
    return run, tiles


def _not_a_record(file: Path) -> ImageError:
    return ImageError(
        f"resume: expected {file} to be the record of a stopped run, got something "
        "else. Pass another path, or remove it."
    )
