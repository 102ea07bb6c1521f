"""A tree of one format as a tree of another, where nothing gets lost on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from ..messages.errors import CheckpointError
from ..plan.paths import BOXES
from .checkpoint import Parts, is_array, iter_leaves


def split_paths(leaves: list[Parts], separator: str, file: str) -> dict[Parts, Parts]:
    """Return the levels that each leaf's path has for a plan.

    Keys are split at the separator: those of a nested tree at ``/``, as Flax and
    transformers flatten dicts. A box around a parameter's array isn't a level.

    Raises:
      CheckpointError: two leaves have one path.

    Example:
      >>> split_paths([("fc.kernel",), ("fc.bias",)], ".", "file")[("fc.bias",)]
      ('fc', 'bias')
    """
    out: dict[Parts, Parts] = {}
    seen: dict[Parts, Parts] = {}
    for parts in leaves:
        split = tuple(level for part in parts for level in part.split(separator))
        if len(split) > 1 and split[-1] in BOXES:
            split = split[:-1]
        if split in seen:
            raise CheckpointError(
                f"{file}: leaves {'/'.join(seen[split])!r} and {'/'.join(parts)!r} "
                "have the same path. Rename one."
            )
        out[parts], seen[split] = split, parts
    return out


def key_separator(keys: list[str]) -> str:
    """Return the separator between levels in the keys of a safetensors file.

    Example:
      >>> key_separator(["params/fc.0/kernel"]), key_separator(["fc.kernel", "bias"])
      ('/', '.')
    """
    return "/" if any("/" in key for key in keys) else "."


def nested(flat: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return a flat dict as nested ones, levels split at the separator.

    Raises:
      CheckpointError: a name lies below another, or a dtype is smaller than a byte.

    Example:
      >>> import numpy as np
      >>> nested({"fc.bias": np.ones(2)}, "file")
      {'fc': {'bias': array([1., 1.])}}
    """
    separator = key_separator(list(flat))
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        if isinstance(leaf.dtype, str):
            found = f"leaf {name!r} has dtype {leaf.dtype}, smaller than a byte"
            raise _cannot(file, found)
        *levels, last = name.split(separator)
        node = tree
        for level in levels:
            node = node.setdefault(level, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"{file}: leaf {name!r} is below another leaf, which only safetensors "
                "supports. Keep that format."
            )
        node[last] = leaf
    return tree


def fit_nested(tree: PyTree, file: str) -> PyTree:
    """Return a tree of another format, where it is nested dicts with strings for keys.

    Raises:
      CheckpointError: the tree has lists, or keys that are not strings.
    """
    _check_nodes(tree, file, "", empty=True)
    return tree


def fit_flat(tree: PyTree, file: str) -> dict[str, Any]:
    """Return a nested tree as one dict of arrays, levels joined by ``/``.

    Raises:
      CheckpointError: the tree has lists, keys that are not strings, empty levels, or
        leaves that are not arrays.

    Example:
      >>> import numpy as np
      >>> fit_flat({"fc": {"bias": np.ones(2)}}, "file")
      {'fc/bias': array([1., 1.])}
    """
    _check_nodes(tree, file, "", empty=False)
    flat = {"/".join(parts): leaf for parts, leaf in iter_leaves(tree)}
    for name, leaf in flat.items():
        if not is_array(leaf):
            raise _cannot(file, f"leaf {name!r} is {leaf!r}, not an array")
    # Widest dtypes first, as the format's own writer does: every tensor is aligned.
    return dict(sorted(flat.items(), key=lambda item: -item[1].dtype.itemsize))


def _check_nodes(tree: PyTree, file: str, path: str, empty: bool) -> None:
    if isinstance(tree, list | tuple):
        found = f"{path or 'the root'!r} is a list"
    elif not isinstance(tree, Mapping):
        return
    elif any(not isinstance(key, str) or "/" in key for key in tree):
        found = f"{path or 'the root'!r} has the keys {list(tree)[:5]}"
    # A flat dict has no place for an empty level, so it would be lost.
    elif not tree and not empty:
        found = f"{path or 'the root'!r} is empty"
    else:
        for key, node in tree.items():
            _check_nodes(node, file, f"{path}/{key}" if path else key, empty)
        return
    raise _cannot(file, found)


def _cannot(file: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot change its format without loss: {found}. Keep the format, or "
        "save the params alone"
    )
