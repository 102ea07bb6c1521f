"""A checkpoint to the other form and back, as one file to another; and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..messages.errors import CheckpointError
from ..messages.flags import check_flags
from ..messages.progress import ProgressOption, shown
from ..plan import Plan, in_words
from .checkpoint import (
    Checkpoint,
    CheckpointReport,
    ConversionRecord,
    FolderFiles,
    iter_leaves,
)
from .content import ContentReport, differences
from .detect import PathLike, format_for, named
from .files import merged, open_checkpoint, step_names
from .formats import FORMATS
from .job import Job, make_job, shapes_of, split_tree
from .rewrite import ByteCount, RewriteOptions, chosen_steps, rewrite
from .stamp import Stamp


def convert_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: ProgressOption = None,
    format: str | None = None,
    step: str | int | None = None,
    all_steps: bool = False,
    prefix: str | Sequence[str] = (),
    check: bool = True,
    dry_run: bool = False,
    follow_links: bool = False,
) -> CheckpointReport:
    """Write a checkpoint in the plan's form, and store the plan in it.

    Entries are rearranged, never changed, and other leaves are copied. A plain Flax
    model with the converted layers loads the result without fcconv_jax. Arrays stream
    through a bounded buffer: those whose entries keep their order are copied from file
    to file, the others are rearranged piece by piece. Whenever a run ends, ``dst`` is
    either unchanged or the complete new checkpoint.

    Every copy of the params is converted, as in :func:`fcconv_jax.convert_params`. A
    checkpoint doesn't contain the optimizer, so paths and shapes must show which leaves
    of its state belong to a parameter. If a leaf's path ends in that of a planned
    parameter (``mu``, ``nu``, ``trace``), it is converted if it has the parameter's
    shape, and copied if it is a scalar. Other shapes are an error (factored statistics,
    moments of ``optax.flatten``). Optimizers whose update depends on a parameter's
    number of axes (muon) can't be recognized: convert their state with
    :func:`fcconv_jax.convert_opt_state`.

    Args:
      src: an Orbax directory (one tree, a step, or a manager's), a Flax msgpack file, a
        safetensors file, or a folder of such files and others, as from the Hugging Face
        hub.
      dst: path of the new checkpoint; must not exist.
      plan: from :func:`fcconv_jax.make_plan`. The checkpoint may put any levels above
        the plan's paths.
      overwrite: replace the checkpoint at ``dst``; if anything fails, the old one is
        kept. A folder that contains other files, too, is never replaced.
      progress: called with a phase, the bytes done and the bytes in all; None or True
        for bars on stderr, False for none.
      format: format of ``dst``; by default that of its suffix, or else that of ``src``.
        Only nested dicts of arrays can be written in another format.
      step: the step to convert, by name or number, if the directory contains several;
        by default the latest.
      all_steps: convert every step of the directory.
      prefix: path of the params to convert, such as ``"gen/params"``, if the checkpoint
        contains several models; a sequence for several copies of the same model.
      check: read the result back and compare it with ``src``, entry by entry.
      dry_run: write nothing; report what would be done.
      follow_links: copy files that links out of the folder ``src`` lead to. By default,
        such links are an error, except those into the Hugging Face hub's cache.

    Returns:
      A report on the converted leaves.

    Raises:
      CheckpointError: ``src`` is damaged, not a checkpoint, converted already, or
        changed while it was read; a planned leaf is missing or has another shape;
        ``dst`` exists or cannot be written. Nothing has been written then.

    Source:
      The formats of ``orbax.checkpoint``, ``flax.serialization`` and ``safetensors``.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fcconv_jax as fc
      >>> from flax import serialization
      >>> tree = {"fc": {"kernel": np.ones((8, 3), np.float32)}}
      >>> plan = fc.plan_from_params(tree, ["fc=2x2:HWC"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     src, dst = Path(folder, "fc.msgpack"), Path(folder, "conv.msgpack")
      ...     _ = src.write_bytes(serialization.msgpack_serialize(tree))
      ...     convert_checkpoint(src, dst, plan).converted
      (('fc/kernel', (8, 3), (2, 2, 2, 3)),)
    """
    check_flags(all_steps=all_steps)
    options = RewriteOptions(overwrite, progress, check, dry_run, follow_links)

    def job(source: Checkpoint) -> Job:
        if source.plan is not None:
            raise CheckpointError(
                f"{src}: expected a checkpoint that isn't converted yet, got one "
                f"converted to {in_words(source.plan.to)}. restore_checkpoint (fcconv "
                "restore) converts it back."
            )
        return make_job(
            source, plan, True, prefix, format or format_for(dst, source.format)
        )

    return rewrite(src, dst, job, chosen_steps(src, step, all_steps), options)


def restore_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressOption = None,
    format: str | None = None,
    step: str | int | None = None,
    all_steps: bool = False,
    prefix: str | Sequence[str] = (),
    check: bool = True,
    dry_run: bool = False,
    follow_links: bool = False,
) -> CheckpointReport:
    """Undo :func:`convert_checkpoint`, bit for bit, with the plan stored in ``src``.

    Args:
      src: a checkpoint that :func:`convert_checkpoint` wrote, or one that was saved
        later in the converted form.
      dst: path of the restored checkpoint; must not exist.
      plan: the plan of the conversion, if ``src`` doesn't contain it. By default, a
        step without a plan uses that of other steps in its directory.
      overwrite: replace the checkpoint at ``dst``; if anything fails, the old one is
        kept.
      progress: called with a phase, the bytes done and the bytes in all; None or True
        for bars on stderr, False for none.
      format: format of ``dst``; by default that of its suffix, or else that of ``src``.
      step: the step to restore, if the directory contains several; by default the
        latest.
      all_steps: restore every step of the directory.
      prefix: the same as for :func:`convert_checkpoint`.
      check: read the result back and compare it with ``src``, entry by entry.
      dry_run: write nothing; report what would be done.
      follow_links: copy files that links out of the folder ``src`` lead to. By default,
        such links are an error, except those into the Hugging Face hub's cache.

    Returns:
      A report on the restored leaves.

    Raises:
      CheckpointError: as :func:`convert_checkpoint`; also if the plan is missing, or if
        the leaves of ``src`` aren't those of the converted checkpoint: one is missing,
        was added, or has another shape.

    Source:
      As :func:`convert_checkpoint`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import fcconv_jax as fc
      >>> from flax import serialization
      >>> tree = {"fc": {"kernel": np.ones((4, 3), np.float32)}}
      >>> plan = fc.plan_from_params(tree, ["fc=2x2:HWC"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     src, dst = Path(folder, "fc.msgpack"), Path(folder, "conv.msgpack")
      ...     _ = src.write_bytes(serialization.msgpack_serialize(tree))
      ...     _ = fc.convert_checkpoint(src, dst, plan)
      ...     fc.restore_checkpoint(dst, Path(folder, "again.msgpack")).converted
      (('fc/kernel', (2, 2, 1, 3), (4, 3)),)
    """
    check_flags(all_steps=all_steps)
    options = RewriteOptions(overwrite, progress, check, dry_run, follow_links)

    taken_from = ""

    def job(source: Checkpoint) -> Job:
        nonlocal taken_from
        found, taken_from = plan, ""
        if source.record is not None:
            # A leaf that was added since would be restored in the wrong form, silently.
            _require_same_leaves(source, source.record, src)
            if plan not in (None, source.record.plan):
                raise CheckpointError(
                    f"{src}: expected the plan stored in the checkpoint, got another "
                    "one. Drop plan= (--plan)."
                )
            found = source.record.plan
        elif found is None:
            found, taken_from = _plan_of_the_run(src)
        target = format or format_for(dst, source.format)
        return make_job(source, found.inverse(), False, prefix, target)

    report = rewrite(src, dst, job, chosen_steps(src, step, all_steps), options)
    return dataclasses.replace(report, plan_of=taken_from)


def verify_checkpoint(
    src: PathLike,
    dst: PathLike,
    plan: Plan | None = None,
    *,
    step: str | int | None = None,
    prefix: str | Sequence[str] = (),
    progress: ProgressOption = None,
) -> ContentReport:
    """Compare two checkpoints entry by entry, without the model's code.

    Nothing is written. Files are compared piece by piece; arrays in an Orbax directory
    are read one at a time, each as a whole.

    Args:
      src: a checkpoint.
      dst: the converted checkpoint, in any format, or a copy of ``src``.
      plan: the plan that converts ``src`` to ``dst``; by default the one that is stored
        in either.
      step: the step to compare, if a directory contains several; by default the latest.
      prefix: the same as for :func:`convert_checkpoint`.
      progress: called with a phase, the bytes done and the bytes in all; None or True
        for bars on stderr, False for none.

    Returns:
      A report on the leaves that differ.

    Raises:
      CheckpointError: one is damaged or not a checkpoint, the plan does not fit, or one
        changed while it was read.

    Source:
      As :func:`convert_checkpoint`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from flax import serialization
      >>> from safetensors.numpy import save_file
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     one, other = Path(folder, "a.safetensors"), Path(folder, "b.msgpack")
      ...     save_file({"fc.bias": np.ones(3)}, one)
      ...     tree = {"fc": {"bias": np.ones(3)}}
      ...     _ = other.write_bytes(serialization.msgpack_serialize(tree))
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
    found = merged(found)
    # An empty plan moves nothing: two checkpoints of one form compare as they are.
    job = make_job(source, plan or Plan("conv"), False, prefix, found.format)
    meant = merged(job.meant)
    # Formats join levels of names in their own ways: levels are what compares.
    if isinstance(source.contents, FolderFiles) or FORMATS[found.format].flat:
        meant, found = (split_tree(checkpoint) for checkpoint in (meant, found))
    with named(Path(dst)), shown(progress) as show:
        advance = ByteCount(show, job.nbytes).advancing("comparing")
        different = tuple(differences(meant, found, None, advance))
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


def _plan_of_the_run(src: PathLike) -> tuple[Plan, str]:
    """Return the plan of a directory's other steps, and the latest of them.

    Training resumed from a converted checkpoint saves steps without a plan.
    """
    plans = {}
    for name in step_names(src):
        plan = open_checkpoint(src, name).plan
        if plan is not None:
            plans[plan] = name
    if len(plans) != 1:
        raise CheckpointError(
            f"{src}: expected one stored plan, got {'several' if plans else 'none'}: "
            "convert_checkpoint didn't write it. Pass the plan that converted its "
            "params: restore_checkpoint(src, dst, plan) or fcconv restore --plan."
        )
    return next(iter(plans.items()))


def _require_same_leaves(
    source: Checkpoint, record: ConversionRecord, src: PathLike
) -> None:
    found = shapes_of(source)
    for name, shape in record.shapes.items():
        if name not in found:
            raise CheckpointError(
                f"{src}: expected leaf {name!r}, which the converted checkpoint had, "
                "got none. Restore from the file that convert_checkpoint wrote."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{src}: expected leaf {name!r} of shape {shape}, as it was written, "
                f"got {found[name]}. Restore from the file that convert_checkpoint "
                "wrote."
            )
    for name in found.keys() - record.shapes.keys():
        raise CheckpointError(
            f"{src}: got leaf {name!r}, which the converted checkpoint didn't have. "
            "Restore from the file that convert_checkpoint wrote."
        )
