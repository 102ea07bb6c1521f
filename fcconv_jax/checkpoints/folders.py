"""Folders of weight files: those of the Hugging Face hub, and Flax's old steps.

A folder holds one file of weights, or several that an index lists, and others beside
them (``config.json``, a tokenizer) that are carried along.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from jaxtyping import PyTree

from ..files.strict_json import loads
from ..messages.errors import CheckpointError
from .checkpoint import Checkpoint, ConversionRecord, FolderFiles, iter_leaves
from .extents import Advance, File
from .formats import FILES, FORMATS, FolderFormat
from .nesting import fit_nested
from .walk import regular_files

INDEX = ".index.json"
# What flax.training.checkpoints left, one msgpack file a step, without a suffix.
_STEPS = FILES[".msgpack"]


def holds_weights(path: Path) -> bool:
    """Return whether a folder holds files of weights, by their names."""
    has_weights = any(entry.suffix in FILES for entry in path.iterdir())
    return has_weights or bool(step_names(path))


def open_(path: Path, step: str | None = None) -> Checkpoint:
    """Open every file of weights; the tree has a level of their names on top.

    Raises:
      CheckpointError: there are weights in two formats, a file that the index names is
        missing, or only some are converted.
    """
    steps = step_names(path)
    if step is not None and step not in steps:
        there = f"it has the steps {steps}" if steps else "it has no steps"
        raise CheckpointError(f"{path}: no step {step!r}; {there}")
    if steps:
        name = step or steps[-1]
        part = _STEPS.open(path / name)
        contents = FolderFiles((name,), tuple(n for n in steps if n != name))
        return dataclasses.replace(
            part, tree={name: part.tree}, metadata={}, path=path, contents=contents
        )
    names = sorted(e.name for e in path.iterdir() if e.suffix in FILES)
    formats = {Path(name).suffix for name in names}
    if len(formats) > 1:
        raise CheckpointError(
            f"{path}: expected weights in one format, got two: {names[:5]}. Pass the "
            "file to convert, or remove the others."
        )
    indexes = sorted(e.name for e in path.iterdir() if e.name.endswith(INDEX))
    for index in indexes:
        listed = _listed(path / index)
        missing = sorted(listed - set(names))
        if missing:
            raise CheckpointError(
                f"{path / index}: lists {missing[:5]}, which {path} doesn't contain. "
                "Get the missing files."
            )
    opened = {name: FILES[Path(name).suffix].open(path / name) for name in names}
    records = {name: part.record for name, part in opened.items()}
    # Shards of one model: one that was converted alone has another form than the rest.
    plans = {record and record.plan for record in records.values()}
    if len(plans) > 1:
        none = [name for name, record in records.items() if record is None]
        raise CheckpointError(
            f"{path}: its files were converted by different plans, or only in part "
            f"({none[:5]} weren't). Get another copy of the folder."
        )
    (plan,) = plans
    shapes: dict[str, tuple[int, ...]] = {}
    for record in records.values():
        shapes |= record.shapes if record else {}
    return Checkpoint(
        next(iter(opened.values())).format,
        {name: part.tree for name, part in opened.items()},
        ConversionRecord(plan, MappingProxyType(shapes)) if plan else None,
        {name: part.metadata for name, part in opened.items()},
        path,
        FolderFiles(tuple(names)),
    )


def write(path: Path, checkpoint: Checkpoint, advance: Advance) -> None:
    """Write every file of weights, each with its part of the record."""
    path.mkdir(exist_ok=True)
    for name, tree in checkpoint.tree.items():
        part = dataclasses.replace(
            checkpoint,
            tree=tree,
            record=_part(checkpoint.record, tree),
            metadata=checkpoint.metadata.get(name, {}),
        )
        FORMATS[part.format].write(path / name, part, advance)
    for inside, source in companions(checkpoint).items():
        if not (path / inside).exists():  # a step that was written before
            (path / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path / inside)


def companions(checkpoint: Checkpoint) -> Mapping[Path, Path]:
    """Return the other files, such as ``config.json``; links are copied as files."""
    path, contents = checkpoint.path, checkpoint.contents
    if path is None or not isinstance(contents, FolderFiles):
        return {}
    return regular_files(path, {*contents.files, *contents.left})


def owns(path: Path) -> Callable[[Path], bool]:
    """Return whether a file in a folder holds weights, or lists those that do."""
    steps = set(step_names(path))

    def is_own(inside: Path) -> bool:
        name = inside.name
        weights = inside.suffix in FILES or name.endswith(INDEX) or name in steps
        return weights and len(inside.parts) == 1

    return is_own


def step_names(path: Path) -> list[str]:
    """Return the names of the msgpack files of flax.training.checkpoints, by step."""
    found = {}
    for entry in path.iterdir():
        number = re.fullmatch(r"(?:.*_)?(\d+)", entry.name)
        if number and entry.is_file():
            with entry.open("rb") as file:
                if _STEPS.looks_like(file.read(1)):
                    found[entry.name] = int(number[1])
    return sorted(found, key=found.__getitem__)


def _part(record: ConversionRecord | None, tree: PyTree) -> ConversionRecord | None:
    if record is None:
        return None
    names = {"/".join(parts) for parts, _ in iter_leaves(tree)}
    shapes = {name: shape for name, shape in record.shapes.items() if name in names}
    return ConversionRecord(record.plan, shapes)


def _listed(index: Path) -> set[str]:
    content = File.read(index).content()
    try:
        weights = loads(content)["weight_map"]
        return {str(name) for name in weights.values()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: damaged: it has no list of files ({error!r}). Get another copy."
        ) from None


FOLDER = FolderFormat(
    "folder", holds_weights, open_, write, fit_nested, step_names, companions, owns
)
