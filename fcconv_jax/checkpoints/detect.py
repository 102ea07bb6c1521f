"""Detects the format of a path from its content, and runs no code from it."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from ..messages.errors import CheckpointError
from .folders import FOLDER, INDEX
from .formats import FILES, FOLDERS, FORMATS, FileFormat, FolderFormat
from .walk import require_regular

PathLike = str | os.PathLike[str]

_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"PK\x03\x04": "a zip archive, as NumPy (.npz) and PyTorch (.pt, .bin) write",
    b"\x93NUMPY": "a NumPy array file",
    b"\x1f\x8b": "a gzip file",
    b"\xff\xd8\xff": "a JPEG image",
}
# Other programs would take a checkpoint with this name for theirs.
_NOT_WRITTEN = frozenset(
    ".h5 .hdf5 .keras .pt .pth .bin .npz .npy .pkl .zip .gguf".split()
    + ".onnx .tflite .json .py".split()
)
_FROM_TORCH = (
    "If it is PyTorch's, save its tensors with safetensors.torch.save_file first"
)


def format_for(dst: PathLike, default: str) -> str:
    """Return the format that a name asks for: by its suffix, else the default.

    Raises:
      CheckpointError: the suffix is that of a format that isn't written, or nearly one
        that is.
    """
    suffix = Path(dst).suffix
    found = FILES.get(suffix)
    # "model.safetensor" is a slip of the pen; "step.1000" may be meant.
    slip = difflib.get_close_matches(suffix.lower(), FILES, 1, 0.75)
    if found is None and (slip or suffix.lower() in _NOT_WRITTEN):
        files = ", ".join(f"dst{each}" for each in FILES)
        raise CheckpointError(
            f"{dst}: expected a name for a checkpoint ({', '.join(FORMATS)}), got one "
            f"that ends in {suffix}. Pass {files}, or a folder's name for Orbax."
        )
    return found.name if found else default


def full_path(path: PathLike) -> Path:
    """Return an absolute path, without the ``..`` that TensorStore refuses.

    Raises:
      CheckpointError: no file can have this name.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"Expected the path of a checkpoint, got {type(path).__name__}. Pass "
            "(src, dst, plan): two paths and what make_plan returned."
        )
    if "\0" in os.fspath(path):
        raise CheckpointError(
            f"{path!r}: expected a path, got one with a NUL character. Remove it."
        )
    path = Path(path).absolute()
    # Where a folder before the ".." is a link, only the file system knows the rest.
    return path.resolve() if ".." in path.parts else path


def detect(path: PathLike) -> tuple[Path, FileFormat | FolderFormat]:
    """Return the full path of a checkpoint, and its format.

    Raises:
      CheckpointError: nothing is there, or what is there is not a checkpoint.
    """
    path = full_path(path)
    with named(path):
        if path.is_dir():
            # A folder of weights comes last: Orbax's own folders may hold such files,
            # too.
            found = [*FOLDERS, FOLDER]
            return path, next((f for f in found if f.looks_like(path)), FOLDERS[0])
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such file or directory. Pass the path of a checkpoint."
            )
        require_regular(path)
        with path.open("rb") as file:
            head = file.read(16)
    # What the name says, if the content may be it: a short msgpack frame may look like
    # a safetensors header, whose length begins like anything.
    by_name = FILES.get(path.suffix)
    if by_name and by_name.looks_like(head):
        return path, by_name
    fits = [format for format in FILES.values() if format.looks_like(head)]
    for format in fits:
        if not format.weak:
            return path, format
    for magic, what in _MAGIC.items():
        if head.startswith(magic) and "PyTorch" in what:
            raise _no_checkpoint(path, f"it is {what}", _FROM_TORCH)
        if head.startswith(magic):
            raise _no_checkpoint(path, f"it is {what}")
    # A pickle of protocol 2 or later begins with 0x80 and the protocol, 5 at most.
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        why = "it is a Python pickle, which is never loaded because it could run code"
        raise _no_checkpoint(path, why)
    if by_name and not by_name.weak:
        return path, by_name  # damaged: opening it raises the error
    if fits:
        return path, fits[0]
    if path.name.endswith(INDEX):
        raise _no_checkpoint(path, "it is the index of a folder", "Pass the folder")
    raise _no_checkpoint(path, f"it begins with {head!r}" if head else "it is empty")


def _no_checkpoint(
    path: Path, why: str, fix: str = "Pass the saved file or directory"
) -> CheckpointError:
    formats = ", ".join(FORMATS)
    return CheckpointError(
        f"{path}: expected a checkpoint ({formats}), but {why}. {fix}"
    )


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn the system's errors into ours, with the file's name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
