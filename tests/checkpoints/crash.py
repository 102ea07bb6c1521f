"""Converts a checkpoint again and again, killed or failing at each call that writes.

Run by test_crash.py with the library of interpose.c loaded before libc:
`python crash.py FORMAT HOW OVERWRITE`. A process is forked for each call that changes a
file; what it left is looked at in another. Prints the number of calls.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    read_checkpoint,
    restore_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import FORMATS
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.messages.errors import CheckpointError
from fcconv_jax.plan import LayerPlan, Plan

KERNEL = kernel_rearrangement((12, 5), (2, 2), order="CHW")
FC = LayerPlan(
    *("full_window", "Dense", (2, 2), "CHW", (("kernel", KERNEL),), (1, 12), (1, 1))
)
PLAN = Plan("conv", (("fc", FC),))
MODES = {"before": 1, "after": 2, "full": 3, "quota": 3}
ERRORS = {"full": 28, "quota": 122}
# How many runs in a row end before no call is left to try, in Orbax's threads.
_ENDS = 4


def in_a_fork(work: Callable[[], None]) -> int:
    """Works in a process of its own: 0, 1 where it raised, or minus the signal."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder with a checkpoint to convert, and perhaps one that is replaced."""

    folder: Path
    overwrite: bool

    @property
    def src(self) -> Path:
        return self.folder / "src"

    @property
    def dst(self) -> Path:
        return self.folder / "dst"

    def make(self, format: Any) -> None:
        rng = np.random.default_rng(0)
        tree: Any = {
            "fc": {"kernel": rng.normal(size=(12, 5)), "bias": rng.normal(size=5)},
            "norm": {"scale": rng.normal(size=3)},
        }
        other = {"fc": {"kernel": -tree["fc"]["kernel"]}}
        if FORMATS[format].flat:
            tree = {f"{a}.{b}": leaf for a, d in tree.items() for b, leaf in d.items()}
            other = {"fc.kernel": other["fc"]["kernel"]}
        write_one(self.src, Checkpoint(format, tree))
        if self.overwrite:
            write_one(self.folder / "other", Checkpoint(format, other))
            convert_checkpoint(self.folder / "other", self.dst, PLAN)

    def convert(self) -> None:
        convert_checkpoint(self.src, self.dst, PLAN, overwrite=self.overwrite)

    def check(self, before: dict[str, bytes], failed: bool) -> None:
        """Check that the place is old or new, and that the next run cleans up."""
        now = listing(self.folder)
        rest = {name for name in now if name.startswith(".dst.fcconv-")}
        assert not (failed and rest), f"left behind: {rest}"
        kept = {name: content for name, content in now.items() if name not in rest}
        if kept != before:
            here, there = (
                {name: x for name, x in found.items() if name.split("/")[0] != "dst"}
                for found in (kept, before)
            )
            assert here == there, f"neither old nor new: {sorted(kept)}"
            self.check_new()
        convert_checkpoint(
            self.src, self.dst, PLAN, overwrite=os.path.lexists(self.dst)
        )
        self.check_new()
        names = {name.split("/")[0] for name in listing(self.folder)}
        assert names == {"src", "dst", *(["other"] if self.overwrite else [])}, names

    def check_new(self) -> None:
        assert verify_checkpoint(self.src, self.dst).passed
        with tempfile.TemporaryDirectory() as folder:
            back = Path(folder, "back")
            restore_checkpoint(self.dst, back)
            assert verify_checkpoint(self.src, back).passed
            assert read_checkpoint(back).plan is None


def main() -> None:
    format, how, overwrite = sys.argv[1], sys.argv[2], sys.argv[3] == "overwrite"
    library = ctypes.CDLL(None)
    root = Path(tempfile.mkdtemp())
    (root / "made").mkdir()
    assert not in_a_fork(lambda: Scene(root / "made", overwrite).make(format))
    before = listing(root / "made")
    # Orbax makes many calls, at half a second each: every fourth of those that change
    # nothing yet is tried, from another one on in each mode, then all that remain.
    step, ends_wanted = (4, _ENDS) if format == "orbax" else (1, 1)
    first = MODES[how] if step > 1 else 1
    n, ends, outcomes = first - step, 0, {"old": 0, "new": 0}
    # Threads make a run shorter or longer: the last calls are past when several ended.
    while ends < ends_wanted:
        n += step
        shutil.rmtree(root / "place", ignore_errors=True)
        shutil.copytree(root / "made", root / "place")
        scene = Scene(root / "place", overwrite)

        def work(scene=scene, n=n) -> None:
            library.arm(ctypes.c_long(n), MODES[how], ERRORS.get(how, 0))
            try:
                scene.convert()
            except CheckpointError:
                if how not in ERRORS:
                    raise
                os._exit(3)

        code = in_a_fork(work)
        failed, ended = code == 3, code == 0
        assert failed or ended or code == -signal.SIGKILL, (
            f"call {n}: ended with {code}"
        )
        now = {k: x for k, x in listing(scene.folder).items() if k[:4] != ".dst"}
        if step > 1 and (ended or now != before):
            n, step = n - step, 1  # go back to the calls that were passed over
            continue
        if ended:
            ends += 1
            assert now != before
        else:
            ends = 0
            outcomes["old" if now == before else "new"] += 1
        bad = in_a_fork(lambda scene=scene, f=failed: scene.check(before, f))
        assert not bad, f"after call {n}, {how}"
    shutil.rmtree(root)
    print(json.dumps({"calls": n - ends, **outcomes}))


if __name__ == "__main__":
    main()
