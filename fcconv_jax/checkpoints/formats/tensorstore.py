"""Arrays where Orbax keeps them: TensorStore's, read chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...files.strict_json import loads
from ...messages.errors import CheckpointError
from ..checkpoint import LeafInfo, iter_leaves
from ..entries import LazyLeaf
from ..extents import File
from ..walk import regular_files

TREE = "_METADATA"
# A run of one byte, the most that zstd packs: 128 KiB in 4 bytes.
_MOST_PACKED = 1 << 16


def is_stored(described: object) -> bool:
    """Return whether Orbax describes a leaf as an array or a number of TensorStore."""
    from orbax.checkpoint.metadata import ArrayMetadata

    return isinstance(described, ArrayMetadata)


def damaged(directory: Path, described: Any, error: Exception) -> str:
    """Return the error for a directory that can't be read, with the leaf's name."""
    text = " ".join(str(error).split())
    leaf = ""
    if described is not None:
        # TensorStore names the leaf as it does files, with dots for slashes.
        for parts, _ in iter_leaves(described):
            if ".".join(parts) in text:
                leaf = f" leaf {'/'.join(parts)!r}"
    return (
        f"{directory}: damaged Orbax checkpoint:{leaf} {type(error).__name__}: "
        f"{text[:400]}; get another copy of the directory"
    )


@dataclasses.dataclass(frozen=True)
class Storage:
    """How TensorStore finds the arrays of a directory.

    Args:
      ocdbt: whether they lie in one key-value store, not in a folder each.
      zarr3: the version of their format.
      whole: whether entries that are zero are stored as well.
      nbytes: of all files.
    """

    ocdbt: bool = True
    zarr3: bool = False
    whole: bool = False
    nbytes: int = 0

    @classmethod
    def of(cls, directory: Path) -> Storage:
        """Read it from the metadata of a tree."""
        try:
            content = loads(File.read(directory / TREE).content())
            zarr3 = bool(content.get("use_zarr3"))
            whole = bool(content.get("store_array_data_equal_to_fill_value"))
        except (ValueError, AttributeError) as error:
            raise CheckpointError(damaged(directory, None, error)) from None
        files = regular_files(directory).values()  # before TensorStore opens a pipe
        nbytes = sum(file.stat().st_size for file in files)
        ocdbt = (directory / "manifest.ocdbt").exists()
        return cls(ocdbt, zarr3, whole, nbytes)

    def check(self, described: Any) -> None:
        """Refuse what cannot be true before anything is allocated.

        Raises:
          CheckpointError: the arrays are larger than any codec packs into the files,
            or a chunk, which is read whole, larger than the machine's memory.
        """
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total = 0
        for parts, leaf in iter_leaves(described):
            if not is_stored(leaf):
                continue
            info = LeafInfo.of("/".join(parts), leaf)
            itemsize = np.dtype(leaf.dtype).itemsize
            chunk = leaf.storage.chunk_shape if leaf.storage else None
            chunk_bytes = math.prod(chunk or leaf.shape) * itemsize
            total += info.nbytes
            too_large = self.whole and total > _MOST_PACKED * (self.nbytes + 1024)
            if chunk_bytes > memory or too_large:
                raise CheckpointError(
                    f"{leaf.directory}: leaf {info.path!r} claims to have "
                    f"{info.nbytes} bytes, {chunk_bytes} in a chunk: more than "
                    f"{'its files can hold' if too_large else 'this machine has'}. The "
                    "directory is damaged; get another copy."
                )

    def leaf(self, described: Any, name: str) -> Any:
        """Return a lazy reference to an array, or a number as it was saved.

        Raises:
          CheckpointError: a number cannot be read.
        """
        from orbax.checkpoint.metadata import ScalarMetadata

        entries = self._entries(described, name)
        if not isinstance(described, ScalarMetadata):
            return entries
        value = entries.array()[()]
        native = entries.dtype in (np.int64, np.float64, np.bool_)  # Python's own
        return value.item() if native else value

    def _entries(self, described: Any, name: str) -> LazyLeaf:
        where: dict[str, Any] = {
            "driver": "file",
            "path": f"{described.directory}/",
        }
        if self.ocdbt:
            where = {"driver": "ocdbt", "base": where, "path": f"{described.name}/"}
        else:
            where["path"] += f"{described.name}/"
        spec = {"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": where}
        dtype = np.dtype(described.dtype)
        stored = Stored(tuple(described.shape), dtype, spec, name)
        return LazyLeaf(stored, dtype)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Entries in a TensorStore."""

    shape: tuple[int, ...]
    dtype: np.dtype
    spec: Any = dataclasses.field(repr=False)
    name: str

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.itemsize

    def read_into(self, out: np.ndarray) -> None:
        """Decode it, a chunk or two at a time.

        Raises:
          CheckpointError: it cannot be read.
        """
        import tensorstore as ts

        # No cache: each chunk is read once.
        limits = ts.Context({"data_copy_concurrency": {"limit": 2}})
        try:
            store = ts.open(ts.Spec(self.spec), open=True, context=limits).result()
            ts.array(out.view(self.dtype)).write(store).result()
        except (ValueError, OSError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"leaf {self.name!r} can't be read: {text[:400]}. The directory is "
                "damaged; get another copy."
            ) from None
