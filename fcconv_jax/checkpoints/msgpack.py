"""Flax msgpack files: flax.serialization's bytes, with the plan in a file beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import (
    LEAVES_KEY,
    PLAN_KEY,
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    LeafInfo,
    Record,
    iter_leaves,
    with_leaves,
)


def plan_path(path: Path) -> Path:
    """The file beside a msgpack file that holds its plan.

    Example:
      >>> plan_path(Path("model.msgpack")).name
      'model.msgpack.plan.json'
    """
    return path.with_name(path.name + ".plan.json")


def looks_like(head: bytes) -> bool:
    """Whether a file that begins so holds a msgpack map, as a Flax state dict does."""
    if not head:
        return False
    return 0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)


def read(path: Path) -> Checkpoint:
    """Reads the whole file into memory; its entries are views of its bytes.

    Raises:
      CheckpointError: the file is truncated, is damaged, or is no state dict.
    """
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes make msgpack and NumPy raise
        raise CheckpointError(
            f"{path}: no valid Flax msgpack file: {type(error).__name__}: {error}; it "
            "is truncated or damaged, get another copy"
        ) from None
    _refuse_unknown(tree, path, "")
    return Checkpoint("msgpack", tree, _read_record(path), path=path)


def inspect(path: Path) -> CheckpointInfo:
    """Describes the leaves. The format has no index: the whole file is read."""
    checkpoint = read(path)
    leaves = tuple(
        LeafInfo.of("/".join(parts), leaf)
        for parts, leaf in iter_leaves(checkpoint.tree)
    )
    return CheckpointInfo(path, "msgpack", leaves, checkpoint.record)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the tree, and beside it the record, where there is one.

    The format packs a tree as one string of bytes: this takes the memory of two more
    copies of the tree.

    Raises:
      CheckpointError: a leaf is of a type that Flax does not pack.
    """
    from flax import serialization

    leaves = (
        np.asarray(leaf) if hasattr(leaf, "__array__") and np.ndim(leaf) else leaf
        for _, leaf in iter_leaves(checkpoint.tree)
    )
    # Rebuilt from plain dicts, and packed in place, because a copy by jax.tree would
    # sort the keys.
    tree = with_leaves(checkpoint.tree, iter(leaves))
    try:
        content = serialization.msgpack_serialize(tree, in_place=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path.name}: Flax cannot pack it: {error}") from None
    with path.open("xb") as file:
        file.write(content)
    if checkpoint.record:
        entries = checkpoint.record.entries()
        text = json.dumps({key: json.loads(value) for key, value in entries.items()})
        plan_path(path).write_text(text, encoding="utf-8")


def _refuse_unknown(node: Any, path: Path, name: str) -> None:
    """Refuses extension types that Flax has not defined and hands on unread."""
    import msgpack

    if isinstance(node, msgpack.ExtType):
        raise CheckpointError(
            f"{path}: leaf {name!r} is a msgpack extension of type {node.code}, which "
            "Flax does not write; the file is damaged, or another program's"
        )
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            _refuse_unknown(value, path, f"{name}/{key}" if name else str(key))


def _read_record(path: Path) -> Record | None:
    beside = plan_path(path)
    if not beside.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        entries = {key: content[key] for key in (PLAN_KEY, LEAVES_KEY)}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{beside}: damaged, no plan of {path.name} can be read from it "
            f"({error!r}); get another copy, or remove it if it does not belong there"
        ) from None
    return Record.take(entries, beside)
