"""Rewrites checkpoints: to a temporary path, compared with the source, installed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..messages.errors import CheckpointError
from ..messages.flags import check_flags
from ..messages.progress import Progress, ProgressOption, shown
from .checkpoint import Checkpoint, CheckpointReport, iter_leaves
from .content import LeafDifference, differences
from .detect import PathLike, full_path, named
from .extents import Advance
from .files import (
    carried,
    described,
    open_checkpoint,
    require_headers,
    step_names,
    step_of,
    write_one,
)
from .job import Job
from .places import check_free, fresh_place, put
from .stamp import Stamp
from .walk import refuse_links_out


@dataclasses.dataclass(frozen=True)
class RewriteOptions:
    """How a checkpoint is to be rewritten."""

    overwrite: bool
    progress: ProgressOption
    check: bool
    dry_run: bool
    follow_links: bool

    def __post_init__(self) -> None:
        check_flags(
            overwrite=self.overwrite,
            check=self.check,
            dry_run=self.dry_run,
            follow_links=self.follow_links,
        )


class ByteCount:
    """Reports progress in bytes."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def advancing(self, what: str) -> Advance:
        """Return a function that is called with the bytes just done."""

        def advance(count: int) -> None:
            self.done += count
            self.progress(f"checkpoint: {what}", self.done, self.total)

        return advance


def chosen_steps(
    src: PathLike, step: str | int | None, all_steps: bool
) -> list[str | int | None]:
    """Return the steps to convert: the one that is given, or all; None is the latest.

    Raises:
      CheckpointError: the directory has no steps, or both arguments are given.
    """
    if not all_steps:
        return [step]
    if step is not None:
        raise CheckpointError("Expected step= or all_steps=, got both. Pass one.")
    names = step_names(src)
    if not names:
        raise CheckpointError(
            f"{src}: expected a directory of steps, got a checkpoint without steps. "
            "Drop all_steps (--all-steps)."
        )
    return list(names)


def rewrite(
    src: PathLike,
    dst: PathLike,
    job_for: Callable[[Checkpoint], Job],
    steps: Sequence[str | int | None],
    options: RewriteOptions,
) -> CheckpointReport:
    """Write checkpoints to a new place, as jobs say; whole or not at all.

    Raises:
      CheckpointError: as :func:`convert_checkpoint`.
    """
    # Links resolved: a link to the source is the source.
    here, final = full_path(src).resolve(), full_path(dst)
    there = final.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"{dst}: expected a destination apart from {src}, got the same path, or "
            "one inside the other. Pass another destination."
        )
    sources = [open_checkpoint(src, step) for step in steps]
    stamps = [Stamp.of(source) for source in sources]
    jobs = [job_for(source) for source in sources]
    report = _report(jobs, final, len(steps) > 1)
    beside = {at: file for job in jobs for at, file in carried(job.meant).items()}
    if here.is_dir() and not options.follow_links:
        read = [file for stamp in stamps for file in stamp.files]
        refuse_links_out(here, [*read, *beside.values()])
    check_free(final, options.overwrite, beside)
    if options.dry_run:
        # Nothing is made in a dry run, so the destination's folder may be missing.
        folder = next(p for p in final.parents if p.exists())
        free = shutil.disk_usage(folder).free
        return dataclasses.replace(report, dry=True, free=free)
    # A comparison reads as many bytes as were written.
    total = report.nbytes * (2 if options.check else 1)
    with named(final), fresh_place(final) as fresh, shown(options.progress) as bars:
        bytes_done = ByteCount(bars, total)
        _require_space(fresh.parent, report.nbytes, final)
        for job in jobs:
            write_one(fresh, job.meant, bytes_done.advancing("writing"))
        # Before the comparison, which would find other bytes and not the reason.
        for stamp in stamps:
            stamp.check()
        for job in jobs:
            written = open_checkpoint(fresh, step_of(job.meant))
            require_headers(job.meant, described(written))
            if options.check:
                advance = bytes_done.advancing("checking")
                _require_content(job.meant, written, fresh.parent, advance)
        # Once more: the comparison reads the source again.
        for stamp in stamps:
            stamp.check()
        put(fresh, final, options.overwrite, beside)
    return report


def _require_content(
    meant: Checkpoint, written: Checkpoint, scratch: Path, advance: Advance
) -> None:
    """Compare what was written with its source, entry by entry."""
    wrong: LeafDifference | None = next(
        differences(meant, written, scratch, advance), None
    )
    if wrong is not None:
        raise CheckpointError(
            f"{scratch.parent}: leaf {wrong.path!r} reads back as {wrong.what}. "
            "Nothing was kept. Check whether something else writes to the source, or "
            "the disk is failing."
        )


def _report(jobs: Sequence[Job], final: Path, several: bool) -> CheckpointReport:
    def named_in(job: Job, name: str) -> str:
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


def _require_space(folder: Path, nbytes: int, final: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{final}: needs {nbytes} bytes, but only {free} are free. Choose another "
            "disk."
        )
