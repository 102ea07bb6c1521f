"""Where things lie in an Orbax directory: steps, items, trees, and all other files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ...messages.errors import CheckpointError
from ..checkpoint import Checkpoint, OrbaxItems, step_number
from ..walk import regular_files
from .tensorstore import TREE

STEP = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"


def companions(checkpoint: Checkpoint) -> Mapping[Path, Path]:
    """Everything but trees: other items, metrics, and the manager's own files."""
    path, contents = checkpoint.path, checkpoint.contents
    if path is None or not isinstance(contents, OrbaxItems):
        return {}
    found: dict[Path, Path] = {}
    if contents.step:
        found |= _beside(path, Path(), {step.name for step in _steps(path)})
    if contents.items:
        found |= _beside(path, Path(contents.step or ""), {*contents.items, STEP})
    return found


def _beside(path: Path, inside: Path, leave: set[str]) -> Mapping[Path, Path]:
    folder = path / inside
    unfinished = {e.name for e in folder.iterdir() if _UNFINISHED in e.name}
    found = regular_files(folder, leave | unfinished)
    return {inside / name: file for name, file in found.items()}


# Names of Orbax's own files: in a tree's directory, and of arrays below it.
_TREE_FILES = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|descriptor\.pbtxt|"
    r"(ocdbt\.process_\d+/)?manifest\.ocdbt|(ocdbt\.process_\d+/)?d/[0-9a-f]+|"
    r"array_metadatas/process_\d+"
)
_ARRAY_FILES = re.compile(r"\.z(array|group|attrs)|zarr\.json|(c/)?\d+([./]\d+)*|c|0")
_ITEM_FILES = re.compile(r"metadata|metrics|_CHECKPOINT_METADATA|descriptor\.pbtxt")


def owns(path: Path) -> Callable[[Path], bool]:
    """Return whether a file in a directory is one that Orbax wrote."""
    steps = set(step_names(path))

    def is_own(inside: Path) -> bool:
        parts, folder = inside.parts, path
        if steps:
            if parts[0] not in steps:
                return inside == Path("metadata", "metadata")  # the manager's
            parts, folder = parts[1:], path / parts[0]
        if not (folder / TREE).exists():
            if len(parts) == 1:
                return _TREE_FILES.fullmatch(parts[0]) is not None
            folder, parts = folder / parts[0], parts[1:]
            if not (folder / TREE).exists():
                # Of an item without a tree, such as metrics.
                return len(parts) == 1 and _ITEM_FILES.fullmatch(parts[0]) is not None
        name = "/".join(parts)
        if _TREE_FILES.fullmatch(name):
            return True
        for level in range(1, len(parts)):
            array = folder.joinpath(*parts[:level])
            if any((array / kind).exists() for kind in (".zarray", "zarr.json")):
                rest = "/".join(parts[level:])
                return _ARRAY_FILES.fullmatch(rest) is not None
        return False

    return is_own


def locate(path: Path, step: str | None = None) -> tuple[OrbaxItems, dict[str, Path]]:
    """Return the contents of a directory, and where each of its trees lies."""
    # Without a name, what is saved in the directory itself comes before its steps.
    if step is None and (path / TREE).exists():
        return OrbaxItems(), {"": path}
    items = _items(path)
    if step is None and items:
        return OrbaxItems(None, tuple(items)), items
    names = step_names(path)
    if step is not None and step not in names:
        there = f"it has the steps {names}" if names else "it has no steps"
        raise CheckpointError(f"{path}: no step {step!r}; {there}")
    if names:
        directory = path / (step or names[-1])
        items = {"": directory} if (directory / TREE).exists() else _items(directory)
        return OrbaxItems(directory.name, tuple(filter(None, items))), items
    names = sorted(entry.name for entry in path.iterdir())
    if any(_UNFINISHED in name for name in names):
        raise CheckpointError(
            f"{path}: expected a finished Orbax save, got unfinished ones only "
            f"({names[:5]}). Save again."
        )
    found = f"it holds {names[:5]}" if names else "it is empty"
    raise CheckpointError(
        f"{path}: not an Orbax checkpoint: neither it, nor an item or a step in it, "
        f"has a file {TREE}; {found}. Pass the directory that was passed to save, or "
        "save again with Orbax 0.5 or later."
    )


def _items(path: Path) -> dict[str, Path]:
    # Without a step's own file, a folder named by a number is a manager's step, and not
    # an item.
    is_step = (path / STEP).exists()
    return {
        entry.name: entry
        for entry in sorted(path.iterdir())
        if (entry / TREE).exists() and (is_step or step_number(entry.name) < 0)
    }


def looks_like(path: Path) -> bool:
    """Return whether Orbax saved a tree, a step's items or steps in a directory."""
    return (path / TREE).exists() or bool(_items(path) or _steps(path))


def step_names(path: Path) -> list[str]:
    """Return the names of the steps in a manager's directory, by number."""
    # What is saved in the directory itself is not a step.
    if (path / TREE).exists() or _items(path):
        return []
    return [
        step.name
        for step in sorted(_steps(path), key=lambda step: step_number(step.name))
    ]


def _steps(path: Path) -> list[Path]:
    return [
        entry
        for entry in path.iterdir()
        if step_number(entry.name) >= 0
        and _UNFINISHED not in entry.name
        and ((entry / TREE).exists() or (entry.is_dir() and _items(entry)))
    ]
