"""A checkpoint to the other form and back, as one file to another."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PlanError
from ..params.leaves import convert_leaf
from ..params.matching import Leaf, Move, find_moves
from ..plan import Plan, in_words
from ..progress import Progress, ProgressOption, shown
from .checkpoint import (
    Checkpoint,
    CheckpointReport,
    FolderLayout,
    Format,
    Record,
    is_array,
    iter_leaves,
    with_leaves,
)
from .content import ContentReport, Difference, differences
from .entries import Moved
from .extents import PIECE, File, Tell
from .files import (
    PathLike,
    check_free,
    described,
    format_for,
    fresh_place,
    merged,
    named,
    open_checkpoint,
    put,
    require_headers,
    step_names,
    step_of,
    write_one,
)
from .formats import change_format, key_separator, split_paths
from .stamp import Stamp


def convert_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: ProgressOption = None,
    format: Format | None = None,
    step: str | int | None = None,
    all_steps: bool = False,
    prefix: str | Sequence[str] = (),
    check: bool = True,
    dry_run: bool = False,
) -> CheckpointReport:
    """Writes a checkpoint in the plan's form, with the plan stored in it.

    Entries are moved, never changed; every other leaf is written as it was read. A
    plain Flax model with the converted layers loads the result without fcconv_jax.
    Nothing is whole in memory: bytes that keep their order are copied from file to
    file, others are moved a piece at a time. However it ends, ``dst`` is what it was or
    the whole new checkpoint.

    Every copy of the params moves, as in :func:`fcconv_jax.convert_params`. A
    checkpoint does not hold the optimizer, so paths and shapes show which leaves of its
    state follow a parameter: one whose path ends in a planned parameter's path (``mu``,
    ``nu``, ``trace``) moves if it has the parameter's shape, stays if it is a scalar,
    and is refused otherwise (factored statistics, moments of ``optax.flatten``).
    Optimizers that treat a parameter by its number of axes (muon) are not recognized:
    convert their state with :func:`fcconv_jax.convert_opt_state`.

    Args:
      src: Orbax directory (one tree, a step, or a manager's), Flax msgpack file,
        safetensors file, or a folder of such files with what lies beside them, as from
        the Hugging Face hub.
      dst: where to write; must not exist.
      plan: from :func:`fcconv_jax.make_plan`. Its paths are found with or without the
        levels that the checkpoint puts above them.
      overwrite: replace the checkpoint at ``dst``; it stays if anything fails. What is
        no checkpoint is never replaced.
      progress: called with what is done, the bytes done and their total; None or True
        for bars on stderr, False for none.
      format: format of ``dst``; by default what its suffix says, else that of ``src``.
        Only nested dicts of arrays travel from one format to another.
      step: which step of a directory that holds several, by name or number; the latest
        unless said.
      all_steps: convert every step of it.
      prefix: levels above the params to convert, such as ``"gen/params"``, where a
        checkpoint holds several models; one for each copy of the same model.
      check: read what was written and compare it, entry by entry, with the source.
      dry_run: write nothing; say what would be done.

    Returns:
      What was converted.

    Raises:
      CheckpointError: ``src`` is damaged, no checkpoint, converted already, or changed
        while it was read; a planned leaf is missing or has another shape; ``dst``
        exists or cannot be written. Nothing has been written then.

    Source:
      ``orbax.checkpoint``, ``flax.serialization`` and ``safetensors`` read and write.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from fcconv_jax.checkpoints import Checkpoint, write_checkpoint
      >>> from fcconv_jax.kernels import Rearrangement
      >>> from fcconv_jax.plan import LayerPlan
      >>> kernel = Rearrangement.reshape((8, 3), (2, 2, 2, 3))
      >>> fc = LayerPlan("full_window", "Dense", (2, 2), "HWC", (("kernel", kernel),),
      ...                (1, 8), (1, 1))
      >>> tree = {"fc": {"kernel": np.ones((8, 3), np.float32)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     src, dst = Path(folder, "fc.msgpack"), Path(folder, "conv.msgpack")
      ...     _ = write_checkpoint(src, Checkpoint("msgpack", tree))
      ...     convert_checkpoint(src, dst, Plan("conv", (("fc", fc),))).converted
      (('fc/kernel', (8, 3), (2, 2, 2, 3)),)
    """
    wishes = _Wishes(overwrite, progress, format, check, dry_run)
    prefixes = (prefix,) if isinstance(prefix, str) else prefix

    def job(source: Checkpoint) -> _Job:
        if source.plan is not None:
            raise CheckpointError(
                f"{src}: converted to {in_words(source.plan.to)} already (it holds the "
                "plan); restore_checkpoint (fcconv restore) takes it back"
            )
        return _job(
            source, plan, True, prefixes, format or format_for(dst, source.format)
        )

    return _rewrite(src, dst, job, _steps(src, step, all_steps), wishes)


def restore_checkpoint(
    src: PathLike,
    dst: PathLike,
    *,
    overwrite: bool = False,
    progress: ProgressOption = None,
    format: Format | None = None,
    step: str | int | None = None,
    all_steps: bool = False,
    prefix: str | Sequence[str] = (),
    check: bool = True,
    dry_run: bool = False,
) -> CheckpointReport:
    """Undoes :func:`convert_checkpoint` to the bit, with the plan stored in ``src``.

    Args:
      src: what :func:`convert_checkpoint` wrote.
      dst: where to write; must not exist.
      overwrite: replace the checkpoint at ``dst``; it stays if anything fails.
      progress: called with what is done, the bytes done and their total; None or True
        for bars on stderr, False for none.
      format: format of ``dst``; by default what its suffix says, else that of ``src``.
      step: which step of a directory that holds several; the latest unless said.
      all_steps: restore every step of it.
      prefix: as :func:`convert_checkpoint` was given it.
      check: compare what was written with ``src``, entry by entry.
      dry_run: write nothing; say what would be done.

    Returns:
      What was converted back.

    Raises:
      CheckpointError: as :func:`convert_checkpoint`; also if ``src`` holds no plan, or
        its leaves are no longer those that the conversion wrote: one is missing, added,
        or of another shape.

    Source:
      As :func:`convert_checkpoint`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fcconv_jax as fc
      >>> from fcconv_jax.checkpoints import Checkpoint, write_checkpoint
      >>> tree = {"fc": {"kernel": np.ones((4, 3), np.float32)}}
      >>> plan = fc.plan_from_params(tree, ["fc=2x2:HWC"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     src, dst = Path(folder, "fc.msgpack"), Path(folder, "conv.msgpack")
      ...     _ = write_checkpoint(src, Checkpoint("msgpack", tree))
      ...     _ = fc.convert_checkpoint(src, dst, plan)
      ...     fc.restore_checkpoint(dst, Path(folder, "again.msgpack")).converted
      (('fc/kernel', (2, 2, 1, 3), (4, 3)),)
    """
    wishes = _Wishes(overwrite, progress, format, check, dry_run)
    prefixes = (prefix,) if isinstance(prefix, str) else prefix

    def job(source: Checkpoint) -> _Job:
        if source.record is None:
            raise CheckpointError(
                f"{src}: holds no plan: it was not written by convert_checkpoint; "
                "with the plan at hand, convert_checkpoint(src, dst, plan.inverse())"
            )
        _require_same_leaves(source, source.record, src)
        plan = source.record.plan.inverse()
        return _job(
            source, plan, False, prefixes, format or format_for(dst, source.format)
        )

    return _rewrite(src, dst, job, _steps(src, step, all_steps), wishes)


def verify_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan | None = None,
    *,
    step: str | int | None = None,
    prefix: str | Sequence[str] = (),
    progress: ProgressOption = None,
) -> ContentReport:
    """Compares two checkpoints entry by entry, without the model's code.

    Args:
      src: the one.
      dst: the other: a conversion of it, in any format, or the same once more.
      plan: that leads from ``src`` to ``dst``; the one stored in either unless given.
      step: of directories that hold several; the latest unless said.
      prefix: as :func:`convert_checkpoint` was given it.
      progress: called with what is done, the bytes done and their total; None or True
        for bars on stderr, False for none.

    Returns:
      Which leaves differ, if any.

    Raises:
      CheckpointError: one is damaged or no checkpoint, the plan does not fit, or one
        changed while it was read.

    Source:
      As :func:`convert_checkpoint`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from fcconv_jax.checkpoints import Checkpoint, write_checkpoint
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     one, other = Path(folder, "a.safetensors"), Path(folder, "b.msgpack")
      ...     tree = {"fc": {"bias": np.ones(3)}}
      ...     _ = write_checkpoint(other, Checkpoint("msgpack", tree))
      ...     tree = {"fc.bias": np.ones(3)}
      ...     _ = write_checkpoint(one, Checkpoint("safetensors", tree))
      ...     print(verify_checkpoint(one, other))
      SAME: 1 leaves, 24 bytes, bit for bit; 0 of them moved
    """
    source, found = open_checkpoint(src, step), open_checkpoint(dst, step)
    stamps = [Stamp.of(checkpoint) for checkpoint in (source, found)]
    if plan is None:
        if found.plan is not None and source.plan is None:
            plan = found.plan
        elif source.plan is not None and found.plan is None:
            plan = source.plan.inverse()
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    found = merged(found)
    job = _job(source, plan or Plan("conv"), False, prefixes, found.format)
    meant = merged(job.meant)
    if isinstance(source.layout, FolderLayout) or found.format == "safetensors":
        meant, found = (_split(checkpoint) for checkpoint in (meant, found))
    with (
        named(Path(dst)),
        fresh_place(Path(os.path.abspath(dst))) as scratch,
        shown(progress) as tell,
    ):
        teller = _Teller(tell, job.nbytes)
        different = tuple(
            differences(meant, found, scratch.parent, teller.telling("comparing"))
        )
    for stamp in stamps:
        stamp.check()
    count = sum(1 for _ in iter_leaves(meant.tree))
    return ContentReport(
        Path(src),
        Path(dst),
        plan,
        count,
        len(job.converted),
        job.nbytes,
        different,
    )


@dataclasses.dataclass(frozen=True)
class _Wishes:
    """How a checkpoint is to be rewritten."""

    overwrite: bool
    progress: ProgressOption
    format: Format | None
    check: bool
    dry_run: bool


@dataclasses.dataclass(frozen=True)
class _Job:
    """One checkpoint to write.

    Args:
      source: as it lies in its files.
      meant: what is to be written.
      converted: path, shape before and shape after of each leaf that moves.
      nbytes: bytes of all entries.
    """

    source: Checkpoint
    meant: Checkpoint
    converted: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    nbytes: int


class _Teller:
    """Tells how far the work has come, in bytes.

    Args:
      progress: the function to call.
      total: bytes in all.
    """

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def telling(self, what: str) -> Tell:
        """A function that is called with the bytes just done."""

        def tell(count: int) -> None:
            self.done += count
            self.progress(f"checkpoint: {what}", self.done, self.total)

        return tell


def _steps(
    src: PathLike, step: str | int | None, all_steps: bool
) -> list[str | int | None]:
    if not all_steps:
        return [step]
    if step is not None:
        raise CheckpointError("expected step= or all_steps=, got both; pass one")
    names = step_names(src)
    if not names:
        raise CheckpointError(f"{src}: has no steps; leave out all_steps (--all-steps)")
    return list(names)


def _rewrite(
    src: PathLike,
    dst: PathLike,
    job_for: Callable[[Checkpoint], _Job],
    steps: Sequence[str | int | None],
    wishes: _Wishes,
) -> CheckpointReport:
    here, final = Path(src).resolve(), Path(os.path.abspath(dst))
    there = final.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"{dst}: is {src}, or one lies in the other; a checkpoint is converted to "
            "a new place, never in its own"
        )
    sources = [open_checkpoint(src, step) for step in steps]
    stamps = [Stamp.of(source) for source in sources]
    jobs = [job_for(source) for source in sources]
    report = _report(jobs, final, len(steps) > 1)
    check_free(final, wishes.overwrite)
    if wishes.dry_run:
        return _dry(report)
    total = report.nbytes * (2 if wishes.check else 1)
    with named(final), fresh_place(final) as fresh, shown(wishes.progress) as bars:
        teller = _Teller(bars, total)
        _require_room(fresh.parent, report.nbytes, final)
        for job in jobs:
            write_one(fresh, job.meant, teller.telling("writing"))
        for stamp in stamps:
            stamp.check()
        for job in jobs:
            written = open_checkpoint(fresh, step_of(job.meant))
            require_headers(job.meant, described(written))
            if wishes.check:
                tell = teller.telling("checking")
                _require_content(job.meant, written, fresh.parent, tell)
        for stamp in stamps:
            stamp.check()
        put(fresh, final, wishes.overwrite)
    return report


def _job(
    source: Checkpoint,
    plan: Plan,
    keep: bool,
    prefixes: Sequence[str],
    format: Format,
) -> _Job:
    """What a plan makes of a checkpoint that is open."""
    file = str(source.path)
    leaves = list(iter_leaves(source.tree))
    # The files of a folder are no level of the tree.
    lead = 1 if isinstance(source.layout, FolderLayout) else 0
    paths = [parts[lead:] for parts, _ in leaves]
    separator = "/"
    if source.format == "safetensors":
        separator = key_separator([parts[0] for parts in paths])
    split = split_paths(paths, separator, file)
    found = {
        split[parts]: Leaf(
            "/".join(parts), tuple(leaf.shape) if is_array(leaf) else None
        )
        for parts, (_, leaf) in zip(paths, leaves)
    }
    bases = [tuple(filter(None, prefix.split("/"))) for prefix in prefixes]
    try:
        moves = find_moves(found, plan, prefixes=bases, separator=separator)
    except PlanError as error:
        raise CheckpointError(f"{file}: {error}") from None
    out, converted = [], []
    for parts, (_, leaf) in zip(paths, leaves):
        move = moves.get(split[parts])
        if move is not None:
            name = "/".join(parts)
            try:
                moved = _moved(leaf, move)
            except ValueError as error:
                raise CheckpointError(f"{file}: leaf {name!r}: {error}") from None
            if not move.is_identity:
                converted.append((name, tuple(leaf.shape), moved.shape))
            leaf = moved
        out.append(leaf)
    tree = with_leaves(source.tree, iter(out))
    meant = dataclasses.replace(source, tree=tree, record=None)
    if format != source.format:
        meant = merged(meant)
        tree = change_format(meant.tree, source.format, format, file)
        meant = Checkpoint(format, tree)
    nbytes = sum(leaf.nbytes for leaf in out if is_array(leaf))
    if keep:
        meant = dataclasses.replace(meant, record=Record(plan, _shapes(meant)))
    return _Job(source, meant, tuple(converted), nbytes)


def _moved(leaf: Any, move: Move) -> Moved:
    """A leaf with its entries still to be moved.

    Raises:
      ValueError: entries smaller than a byte would have to change places.
    """
    leaf = Moved.of(leaf)
    n = len(move.stack_axes)
    if n and not all(0 <= axis <= i for i, axis in enumerate(move.stack_axes)):
        # A stack along an inner axis is moved in memory, by itself.
        return Moved.of(convert_leaf(move.rearrange, leaf.array(), move.stack_axes))
    whole = move.rearrange.stacked(leaf.shape[:n]) if n else move.rearrange
    if not leaf.itemsize and not whole.is_reshape:
        raise ValueError(
            f"entries of dtype {leaf.dtype} are smaller than a byte and would have to "
            "be transposed. Widen them first"
        )
    return dataclasses.replace(leaf, move=whole)


def _shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    return {leaf.path: leaf.shape for leaf in described(checkpoint).leaves}


def _split(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as one flat dict, by the levels of its paths."""
    leaves = dict(iter_leaves(checkpoint.tree))
    separator = "/"
    if checkpoint.format == "safetensors":
        separator = key_separator([parts[0] for parts in leaves])
    tree = {
        "/".join(level for part in parts for level in part.split(separator)): leaf
        for parts, leaf in leaves.items()
    }
    return dataclasses.replace(checkpoint, tree=tree)


def _require_same_leaves(source: Checkpoint, record: Record, src: PathLike) -> None:
    found = _shapes(source)
    for name, shape in record.shapes.items():
        if name not in found:
            raise CheckpointError(
                f"{src}: leaf {name!r} is missing; it was there when the checkpoint "
                "was converted. Restore from the file that convert_checkpoint wrote"
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{src}: leaf {name!r} has shape {found[name]}, it was written with "
                f"{shape}. Restore from the file that convert_checkpoint wrote"
            )
    for name in found.keys() - record.shapes.keys():
        raise CheckpointError(
            f"{src}: leaf {name!r} was not there when the checkpoint was converted. "
            "Restore from the file that convert_checkpoint wrote"
        )


def _require_content(
    meant: Checkpoint, written: Checkpoint, scratch: Path, tell: Tell
) -> None:
    """Compares what was written with its source, entry by entry."""
    wrong: Difference | None = next(differences(meant, written, scratch, tell), None)
    if wrong is not None:
        raise CheckpointError(
            f"{scratch.parent}: leaf {wrong.path!r} reads back as {wrong.what}; "
            "nothing was kept. Is something else writing to the source, or the disk "
            "failing?"
        )


def _report(jobs: Sequence[_Job], final: Path, several: bool) -> CheckpointReport:
    def named_in(job: _Job, name: str) -> str:
        return f"{step_of(job.source)}/{name}" if several else name

    return CheckpointReport(
        jobs[0].source.path or Path(),
        final,
        jobs[0].meant.format,
        tuple(
            (named_in(job, name), before, after)
            for job in jobs
            for name, before, after in job.converted
        ),
        sum(1 for job in jobs for _ in iter_leaves(job.meant.tree)),
        sum(job.nbytes for job in jobs),
        tuple(filter(None, (step_of(job.source) for job in jobs))),
    )


def _dry(report: CheckpointReport) -> CheckpointReport:
    """The report, with the room there is and the time that it would take."""
    folder = next(p for p in report.dst.parents if p.exists())
    begin = time.perf_counter()
    with named(folder):
        scratch = File.nameless(folder)
        scratch.extent(0, PIECE).write(0, memoryview(bytes(PIECE)))
        os.fsync(scratch.fd)
    seconds = (time.perf_counter() - begin) * report.nbytes / PIECE
    free = shutil.disk_usage(folder).free
    return dataclasses.replace(report, dry=True, free=free, seconds=seconds)


def _require_room(folder: Path, nbytes: int, final: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{final}: needs {nbytes} bytes, {free} are free there; choose another disk"
        )
