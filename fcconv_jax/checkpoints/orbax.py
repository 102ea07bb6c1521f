"""Orbax directories: one tree, the items of a step, or a manager's latest step."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    LeafInfo,
    OrbaxLayout,
    Record,
    iter_leaves,
    with_leaves,
)

_TREE = "_METADATA"
_STEP = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"


def read(path: Path) -> Checkpoint:
    """Reads every leaf into NumPy, whatever device or mesh it was saved from.

    The template is the checkpoint's own metadata, so that lists, None, empty nodes,
    strings and scalars stay what they are, and 64-bit arrays keep their bits.

    Raises:
      CheckpointError: no Orbax directory, an unfinished save, or damaged arrays.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    layout, directories = _locate(path)
    trees = {}
    for item, directory in directories.items():
        described = _describe(directory)
        args = with_leaves(
            described,
            (
                ocp.RestoreArgs(restore_type=np.ndarray)
                if _is_array(leaf)
                else ocp.RestoreArgs()
                for _, leaf in iter_leaves(described)
            ),
        )
        restore = ocp.args.PyTreeRestore(item=described, restore_args=args)
        try:
            with _quiet(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                tree = handler.restore(epath.Path(directory), args=restore)
        except Exception as error:  # whatever damaged files make TensorStore raise
            raise CheckpointError(_damaged(directory, described, error)) from None
        pairs = zip(iter_leaves(described), iter_leaves(tree), strict=True)
        trees[item] = with_leaves(described, (_typed(d, x) for (_, d), (_, x) in pairs))
    metadata = _custom(path, layout)
    record = Record.take(metadata, path)
    tree = trees if len(trees) > 1 else next(iter(trees.values()))
    return Checkpoint("orbax", tree, record, metadata, path, layout)


def inspect(path: Path) -> CheckpointInfo:
    """Describes the leaves from the metadata; no array is read.

    Raises:
      CheckpointError: no Orbax directory, an unfinished save, or damaged metadata.
    """
    layout, directories = _locate(path)
    trees = {item: _describe(directory) for item, directory in directories.items()}
    tree = trees if len(trees) > 1 else next(iter(trees.values()))
    leaves = tuple(
        LeafInfo.of("/".join(parts), leaf) for parts, leaf in iter_leaves(tree)
    )
    metadata = _custom(path, layout)
    record = Record.take(metadata, path)
    return CheckpointInfo(path, "orbax", leaves, record, metadata, layout)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a directory of the layout that the checkpoint was read from.

    What opened the original opens this one: one tree, a step with its items, or a
    manager's directory with that one step. Other items of the step are copied. Arrays
    are stored as NumPy's, so they load without the devices they were saved from.

    Raises:
      CheckpointError: Orbax cannot store a leaf.
    """
    import orbax.checkpoint as ocp

    layout = checkpoint.layout
    record = checkpoint.record.entries() if checkpoint.record else {}
    custom = {
        **checkpoint.metadata,
        **{key: json.loads(value) for key, value in record.items()},
    }
    target = path / layout.step if layout.step else path
    args: Any
    if layout.items:
        one = len(layout.items) == 1
        trees = {layout.items[0]: checkpoint.tree} if one else checkpoint.tree
        saves = {item: ocp.args.PyTreeSave(tree) for item, tree in trees.items()}
        handler, args = ocp.CompositeCheckpointHandler(), ocp.args.Composite(**saves)
    else:
        handler, args = (
            ocp.PyTreeCheckpointHandler(),
            ocp.args.PyTreeSave(checkpoint.tree),
        )
    target.parent.mkdir(exist_ok=True)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(target, args=args, custom_metadata=custom)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: Orbax cannot store it: {error}") from None
    if checkpoint.path is not None and layout != OrbaxLayout():
        _copy_others(checkpoint.path, path, layout, custom)


def _copy_others(src: Path, dst: Path, layout: OrbaxLayout, custom: Any) -> None:
    """Copies what is no tree: other items, metrics, and the manager's own files."""
    source, target = src, dst
    if layout.step:
        source, target = src / layout.step, dst / layout.step
        steps = {step.name for step in _steps(src)}
        _copy(src, dst, steps)
    if not layout.items:
        return
    _copy(source, target, {*layout.items, _STEP})
    if (source / _STEP).exists():
        content = json.loads((source / _STEP).read_text())
        content["custom_metadata"] = custom
        (target / _STEP).write_text(json.dumps(content))


def _copy(src: Path, dst: Path, leave: set[str]) -> None:
    for entry in src.iterdir():
        if entry.name in leave or _UNFINISHED in entry.name:
            continue
        if entry.is_dir():
            shutil.copytree(entry, dst / entry.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(entry, dst / entry.name)


def _locate(path: Path) -> tuple[OrbaxLayout, dict[str, Path]]:
    """The layout of a directory, and where each of its trees lies."""
    if (path / _TREE).exists():
        return OrbaxLayout(), {"": path}
    items = _items(path)
    if items:
        return OrbaxLayout(None, tuple(items)), items
    steps = _steps(path)
    if steps:
        step = max(steps, key=_number)
        items = {"": step} if (step / _TREE).exists() else _items(step)
        return OrbaxLayout(step.name, tuple(item for item in items if item)), items
    names = sorted(entry.name for entry in path.iterdir())
    if any(_UNFINISHED in name for name in names):
        raise CheckpointError(
            f"{path}: holds only unfinished Orbax saves ({names[:5]}); save again"
        )
    found = f"it holds {names[:5]}" if names else "it is empty"
    raise CheckpointError(
        f"{path}: no Orbax checkpoint: neither it, nor an item or a step in it, has a "
        f"file {_TREE}; {found}. Name the directory that was passed to save, or save "
        "again with Orbax 0.5 or later"
    )


def _items(path: Path) -> dict[str, Path]:
    is_step = (path / _STEP).exists()
    return {
        entry.name: entry
        for entry in sorted(path.iterdir())
        if (entry / _TREE).exists() and (is_step or _number(entry) < 0)
    }


def _steps(path: Path) -> list[Path]:
    return [
        entry
        for entry in path.iterdir()
        if _number(entry) >= 0
        and _UNFINISHED not in entry.name
        and ((entry / _TREE).exists() or (entry.is_dir() and _items(entry)))
    ]


def _number(path: Path) -> int:
    """The number of a step's directory, such as ``20`` or ``step_20``; else -1."""
    digits = path.name.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _describe(directory: Path) -> Any:
    """The tree of a directory with what Orbax knows of each leaf."""
    import orbax.checkpoint as ocp
    from etils import epath

    try:
        with _quiet(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.metadata(epath.Path(directory)).tree
    except Exception as error:  # damaged JSON, missing files, TensorStore's errors
        raise CheckpointError(_damaged(directory, None, error)) from None


def _is_array(described: Any) -> bool:
    from orbax.checkpoint.metadata import ArrayMetadata, ScalarMetadata

    return isinstance(described, ArrayMetadata) and not isinstance(
        described, ScalarMetadata
    )


def _typed(described: Any, value: Any) -> Any:
    """Gives a NumPy scalar its dtype back, which Orbax restores as Python's."""
    dtype = getattr(described, "dtype", None)
    if dtype is None or _is_array(described) or isinstance(value, bool):
        return value
    native = np.dtype(dtype).name in ("int64", "float64", "bool")
    return value if native else np.dtype(dtype).type(value)


def _damaged(directory: Path, described: Any, error: Exception) -> str:
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


def _custom(path: Path, layout: OrbaxLayout) -> dict[str, Any]:
    """The custom metadata; for an item, that of the step it lies in."""
    root = path / layout.step if layout.step else path
    places = [root / _STEP]
    if not layout.items and not places[0].exists():
        places.append(root.parent / _STEP)
    for place in places:
        if place.exists():
            try:
                custom = dict(json.loads(place.read_text())["custom_metadata"] or {})
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise CheckpointError(
                    f"{place}: damaged ({error!r}); get another copy of the directory"
                ) from None
            return custom
    return {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's notes on shardings and timing from the caller's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
