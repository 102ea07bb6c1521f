"""A checkpoint in memory: its tree, its plan, and reports on its contents."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ..files.strict_json import loads, whole_numbers
from ..messages.errors import CheckpointError, PlanError
from ..messages.reports import aligned
from ..plan import Plan

Parts = tuple[str, ...]

PLAN_KEY = "fcconv_plan"
LEAVES_KEY = "fcconv_leaves"


def iter_leaves(tree: PyTree, path: Parts = ()) -> Iterator[tuple[Parts, Any]]:
    """Yield the path and value of each leaf, in the order of the tree.

    Dicts, lists and tuples are nodes; everything else, None included, is a leaf.
    """
    if isinstance(tree, Mapping):
        for key, node in tree.items():
            yield from iter_leaves(node, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for index, node in enumerate(tree):
            yield from iter_leaves(node, (*path, str(index)))
    else:
        yield path, tree


def with_leaves(tree: PyTree, leaves: Iterator[Any]) -> PyTree:
    """Return a tree with the same nodes and keys, and leaves from an iterator."""
    if isinstance(tree, Mapping):
        return {key: with_leaves(node, leaves) for key, node in tree.items()}
    if isinstance(tree, list | tuple):
        return [with_leaves(node, leaves) for node in tree]
    return next(leaves)


def step_number(name: str) -> int:
    """Return the number of a step's name, such as ``20`` or ``step_20``; else -1."""
    digits = name.rpartition("_")[2]
    # isdigit is also true of superscripts, which int refuses.
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def is_array(leaf: object) -> bool:
    """Return whether a leaf (or what stands for it) has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """One leaf, as seen without loading it.

    Args:
      path: the leaf's name in the file, such as ``"params/fc/kernel"``.
      shape: its shape; ``()`` for a scalar.
      dtype: name of its dtype, or of its Python type.
      nbytes: bytes of its entries in memory; 0 if it isn't an array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @classmethod
    def of(cls, path: str, leaf: Any) -> LeafInfo:
        """Describe a leaf: an array, what has its shape and dtype, or a value."""
        if not is_array(leaf):
            return cls(path, (), type(leaf).__name__, 0)
        shape = tuple(leaf.shape)
        if isinstance(leaf.dtype, str):
            return cls(path, shape, leaf.dtype, leaf.nbytes)
        dtype = np.dtype(leaf.dtype)
        return cls(path, shape, _name(dtype), math.prod(shape) * dtype.itemsize)


@functools.cache
def _name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy composes the name each time, in 40 us


@dataclasses.dataclass(frozen=True)
class ConversionRecord:
    """The record of its conversion that a checkpoint stores.

    Args:
      plan: the plan that was applied.
      shapes: shape of every leaf that was written, by its name in the file.
    """

    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]

    def entries(self) -> dict[str, str]:
        """Return the record as entries of a checkpoint's metadata: JSON text by key."""
        shapes = {path: list(shape) for path, shape in self.shapes.items()}
        return {PLAN_KEY: self.plan.to_json(), LEAVES_KEY: json.dumps(shapes)}

    @classmethod
    def take(cls, entries: dict[str, Any], path: Path) -> ConversionRecord | None:
        """Extract the record from metadata entries; None if missing.

        Raises:
          CheckpointError: the record is damaged, or has another version.
        """
        plan, shapes = entries.pop(PLAN_KEY, None), entries.pop(LEAVES_KEY, None)
        if plan is None:
            return None
        try:
            plan, shapes = (
                text if isinstance(text, str) else json.dumps(text)
                for text in (plan, shapes)
            )
            read = {
                str(leaf): whole_numbers(shape) for leaf, shape in loads(shapes).items()
            }
            return cls(Plan.from_json(plan), MappingProxyType(read))
        except PlanError as error:
            raise CheckpointError(
                f"{path}: the stored plan is invalid: {error}"
            ) from None
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: the list of leaves stored with the plan is damaged "
                f"({error!r}). Get another copy of the file."
            ) from None


@dataclasses.dataclass(frozen=True)
class OrbaxItems:
    """Where in an Orbax directory the trees lie.

    Args:
      step: name of the step's directory, or None where the path is one step already.
      items: names of the items that hold trees; none where the tree lies in the
        directory itself, as ``StandardCheckpointer`` leaves it.
    """

    step: str | None = None
    items: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FolderFiles:
    """Which files of a folder hold the weights.

    Args:
      files: their names; the tree has a level of them on top.
      left: names of what is not carried along, as other steps.
    """

    files: tuple[str, ...]
    left: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, or lazy references into its files.

    Args:
      format: ``"orbax"``, ``"msgpack"`` or ``"safetensors"``.
      tree: nested dicts and lists with arrays (and Python scalars, strings and None,
        where the format has them): NumPy's, or lazy references to their entries. A
        safetensors file is one flat dict, with the keys of the file.
      record: what its conversion left in it; None where it was never converted.
      metadata: its other metadata, as the format keeps it.
      path: where it was read from; the other items of an Orbax step are copied
        from there.
      contents: which entries of its directory hold it.
    """

    format: str
    tree: PyTree
    record: ConversionRecord | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    contents: OrbaxItems | FolderFiles = OrbaxItems()

    @property
    def plan(self) -> Plan | None:
        """The plan that it was converted with; None where it was not."""
        return self.record.plan if self.record else None


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Contents of a checkpoint.

    Args:
      path: the file or directory.
      format: ``"orbax"``, ``"msgpack"`` or ``"safetensors"``.
      leaves: its leaves in the order of the file.
      plan: the plan that it was converted with; None where it was not.
      step: name of its step, where its directory holds several.
    """

    path: Path
    format: str
    leaves: tuple[LeafInfo, ...]
    plan: Plan | None = None
    step: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def __str__(self) -> str:
        where = f" step {self.step}" if self.step else ""
        plan = "never converted" if self.plan is None else f"converted, {self.plan}"
        rows = [
            (leaf.path, leaf.dtype, str(leaf.shape), str(leaf.nbytes))
            for leaf in self.leaves
        ]
        lines = [
            f"{self.path}: {self.format}{where}, {len(rows)} leaves, {self.nbytes} "
            "bytes",
            *aligned([("leaf", "dtype", "shape", "bytes"), *rows]),
            plan,
        ]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """Report on a conversion.

    Args:
      src: path of the checkpoint that was read.
      dst: path of the checkpoint that was written.
      format: the format of ``dst``.
      converted: path, shape before and shape after of each converted leaf, including
        the moments of an optimizer state.
      leaves: the number of leaves written.
      nbytes: bytes of all entries.
      steps: names of the converted steps, if ``src`` contains several.
      dry: whether this was a dry run, which writes nothing.
      free: in a dry run, the bytes that are free at ``dst``.
      plan_of: the step whose plan was used, if the restored one doesn't contain it.
    """

    src: Path
    dst: Path
    format: str
    converted: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    leaves: int
    nbytes: int
    steps: tuple[str, ...] = ()
    dry: bool = False
    free: int | None = None
    plan_of: str = ""

    def __str__(self) -> str:
        rows = [(path, f"{old} -> {new}") for path, old, new in self.converted]
        steps = f" of step {', '.join(self.steps)}" if self.steps else ""
        lines = [
            f"{self.dst}: {self.format}, {len(rows)} of {self.leaves} leaves{steps} "
            f"{'would be ' * self.dry}converted, {self.nbytes} bytes",
            *aligned(rows),
        ]
        if self.plan_of:
            lines.append(f"by the plan that is stored in step {self.plan_of}")
        if self.dry:
            lines.append(
                f"nothing was written; {self.nbytes} bytes are needed, {self.free} are "
                "free"
            )
        return "\n".join(lines)
