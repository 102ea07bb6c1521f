"""Orbax directories: one tree, the items of a step, or a manager's latest step."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import inspect
import json
import logging
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ...files.strict_json import loads
from ...messages.errors import CheckpointError
from ..checkpoint import (
    Checkpoint,
    ConversionRecord,
    OrbaxItems,
    is_array,
    iter_leaves,
    with_leaves,
)
from ..entries import LazyLeaf, raw_dtype
from ..extents import LARGE, Advance, File, give_back_memory
from ..nesting import fit_nested
from .base import FolderFormat
from .orbax_folder import STEP, companions, locate, looks_like, owns, step_names
from .tensorstore import Storage, damaged, is_stored


def open_(path: Path, step: str | None = None) -> Checkpoint:
    """Read the metadata and the leaves other than arrays; entries stay in the files.

    The template is the checkpoint's own metadata, so that lists, None, empty nodes,
    strings and scalars stay what they are, and 64-bit arrays keep their bits.

    Raises:
      CheckpointError: no Orbax directory, an unfinished save, no such step, or damaged
        metadata.
    """
    contents, directories = locate(path, step)
    trees = {item: _open_tree(directory) for item, directory in directories.items()}
    metadata = _custom(path, contents)
    record = ConversionRecord.take(metadata, path)
    tree = trees if len(trees) > 1 else next(iter(trees.values()))
    return Checkpoint("orbax", tree, record, metadata, path, contents)


def _open_tree(directory: Path) -> Any:
    """Return a directory's tree, with lazy references to the arrays' entries."""
    import orbax.checkpoint as ocp
    from etils import epath

    described = _describe(directory)
    storage = Storage.of(directory)
    storage.check(described)
    # What TensorStore has is not read by Orbax: see _forget_reads.
    placeholders = with_leaves(
        described,
        (... if is_stored(leaf) else leaf for _, leaf in iter_leaves(described)),
    )
    args = with_leaves(described, (ocp.RestoreArgs() for _ in iter_leaves(described)))
    restore = ocp.args.PyTreeRestore(item=placeholders, restore_args=args)
    try:
        with _quiet(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.restore(epath.Path(directory), args=restore)
    except Exception as error:  # whatever damaged files make TensorStore raise
        _forget_reads(error)
        raise CheckpointError(damaged(directory, described, error)) from None
    pairs = zip(iter_leaves(described), iter_leaves(tree), strict=True)
    return with_leaves(
        described,
        (
            storage.leaf(d, "/".join(parts)) if is_stored(d) else x
            for (parts, d), (_, x) in pairs
        ),
    )


def write(path: Path, checkpoint: Checkpoint, advance: Advance) -> None:
    """Write a directory with the contents that the checkpoint was read from.

    What opened the original opens this one: one tree, a step with its items, or a
    manager's directory with that one step. Other items of the step are copied. Arrays
    are stored as NumPy's, so they load without the devices they were saved from; a few
    are in memory at a time, a large one is not.

    Raises:
      CheckpointError: Orbax cannot store a leaf, or would store two under one name.
    """
    import orbax.checkpoint as ocp

    contents = checkpoint.contents
    if not isinstance(contents, OrbaxItems):
        contents = OrbaxItems()
    record = checkpoint.record.entries() if checkpoint.record else {}
    custom = {
        **checkpoint.metadata,
        **{key: json.loads(value) for key, value in record.items()},
    }
    target = path / contents.step if contents.step else path
    scratch = path.parent
    one = len(contents.items) < 2
    trees = {(*contents.items, "")[0]: checkpoint.tree} if one else checkpoint.tree
    for item, tree in trees.items():
        _check_names(tree, path, item)
    saves = {
        item: ocp.args.PyTreeSave(
            with_leaves(tree, (_as_lazy(leaf) for _, leaf in iter_leaves(tree)))
        )
        for item, tree in trees.items()
    }
    like = Storage()
    if checkpoint.path is not None:
        like = Storage.of(_directory(checkpoint.path, contents))
    handler, args = _handler(scratch, like, advance), next(iter(saves.values()))
    if contents.items:
        handlers = {item: _handler(scratch, like, advance) for item in saves}
        handler = ocp.CompositeCheckpointHandler(**handlers)
        args = ocp.args.Composite(**saves)
    target.parent.mkdir(exist_ok=True)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(target, args=args, custom_metadata=custom)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name}: Orbax can't store it: {error}") from None
    for inside, source in companions(checkpoint).items():
        (path / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path / inside)
    # Orbax rewrites this file with the items that it gets.
    described = _step_file(checkpoint.path, contents) if checkpoint.path else None
    if contents.items and described and described.exists():
        content = loads(File.read(described).content())
        content["custom_metadata"] = custom
        (target / STEP).write_text(json.dumps(content))


def _check_names(tree: PyTree, path: Path, item: str) -> None:
    """Refuse leaves that Orbax would store under one name: it joins levels by dots."""
    seen: dict[str, str] = {}
    for parts, _ in iter_leaves(tree):
        stored, name = ".".join(parts), "/".join(filter(None, (item, *parts)))
        if stored in seen:
            raise CheckpointError(
                f"{path.name}: leaves {seen[stored]!r} and {name!r} would both be "
                f"called {stored!r} in Orbax. Keep the format, or rename one."
            )
        seen[stored] = name


def _directory(path: Path, contents: OrbaxItems) -> Path:
    """Return where the first tree lies."""
    return path.joinpath(*filter(None, (contents.step, *contents.items[:1])))


def _as_lazy(leaf: Any) -> Any:
    """Return an array as its handler takes it; other leaves stay as they are."""
    return (
        LazyLeaf.of(leaf)
        if is_array(leaf) and not isinstance(leaf, np.generic)
        else leaf
    )


def _handler(scratch: Path, like: Storage, advance: Advance) -> Any:
    """Return a handler that knows arrays whose entries are still to be moved."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers as th

    class Streaming(th.NumpyHandler):
        """Stores arrays as NumPy's, some at a time."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            args = args or [th.SaveArgs()] * len(values)
            for batch in _batches(values):
                arrays = [_materialised(values[i], scratch) for i in batch]
                # A chunk is written and read whole: one for all of a large array would
                # be in memory.
                restore_args = [
                    dataclasses.replace(args[i], chunk_byte_size=LARGE)
                    if values[i].nbytes > LARGE
                    else args[i]
                    for i in batch
                ]
                for future in await super().serialize(
                    arrays, [infos[i] for i in batch], restore_args
                ):
                    await asyncio.to_thread(future.result)
                del arrays
                give_back_memory()
                advance(sum(values[i].nbytes for i in batch))
            return []

    # A copy of each array would double the memory; Orbax before 0.12.5 has no option.
    known = inspect.signature(th.NumpyHandler).parameters
    options: Any = {n: False for n in ("deepcopy_host_arrays",) if n in known}
    registry = th.create_type_handler_registry(
        (int, th.ScalarHandler()),
        (float, th.ScalarHandler()),
        (np.number, th.ScalarHandler()),
        (str, th.StringHandler()),
        (LazyLeaf, Streaming(**options)),
    )
    with _quiet():
        return ocp.PyTreeCheckpointHandler(
            use_ocdbt=like.ocdbt, use_zarr3=like.zarr3, type_handler_registry=registry
        )


def _batches(leaves: Sequence[LazyLeaf]) -> Iterator[list[int]]:
    """Yield the numbers of leaves that are in memory together."""
    batch, size = [], 0
    for index, leaf in enumerate(leaves):
        # A large leaf is a batch of its own.
        if batch and size + leaf.nbytes > LARGE:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += leaf.nbytes
    if batch:
        yield batch


def _materialised(leaf: LazyLeaf, scratch: Path) -> np.ndarray:
    """Return the moved array: in memory, or if it is large in a file without a name."""
    if leaf.nbytes <= LARGE:
        return leaf.array()
    file = File.nameless(scratch)
    array = file.mapped(leaf.entries.shape, np.dtype(leaf.dtype))
    if leaf.keeps_order:
        leaf.entries.read_into(array.view(raw_dtype(leaf.itemsize)))
    else:
        leaf.write(file.extent(0, leaf.nbytes), scratch)
    return array.reshape(leaf.shape)


def _step_file(path: Path, contents: OrbaxItems) -> Path:
    return path / (contents.step or "") / STEP


def _describe(directory: Path) -> Any:
    """Return the tree of a directory with what Orbax knows of each leaf."""
    import orbax.checkpoint as ocp
    from etils import epath

    try:
        with _quiet(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.metadata(epath.Path(directory)).tree
    except Exception as error:  # damaged JSON, missing files, TensorStore's errors
        _forget_reads(error)
        raise CheckpointError(damaged(directory, None, error)) from None


def _custom(path: Path, contents: OrbaxItems) -> dict[str, Any]:
    """Return the custom metadata; for an item, that of the step it lies in."""
    root = path / contents.step if contents.step else path
    places = [root / STEP]
    if not contents.items and not places[0].exists():
        places.append(root.parent / STEP)
    for place in places:
        if place.exists():
            try:
                custom = dict(
                    loads(File.read(place).content())["custom_metadata"] or {}
                )
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise CheckpointError(
                    f"{place}: damaged ({error!r}). Get another copy of the directory."
                ) from None
            return custom
    return {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax's notes on shardings and timing from the caller's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _forget_reads(error: Exception) -> None:
    """Silence the reads that Orbax abandons when another one fails.

    Those that have begun end later, report to an event loop that is closed by then, and
    CPython prints that; coroutines that have not begun warn when they are freed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    before = sys.unraisablehook
    if isinstance(before, _LateReads):
        return
    sys.unraisablehook = _LateReads(before)


@dataclasses.dataclass(frozen=True)
class _LateReads:
    """A ``sys.unraisablehook`` that hides the end of an abandoned read."""

    before: Callable[[Any], object]

    def __call__(self, unraisable: Any) -> None:
        late = unraisable.object is None and str(unraisable.exc_value) == (
            "Event loop is closed"
        )
        if not late:
            self.before(unraisable)


FORMAT = FolderFormat(
    "orbax", looks_like, open_, write, fit_nested, step_names, companions, owns
)
