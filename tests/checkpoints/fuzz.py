"""Damages small checkpoints in every way, and looks at what comes out.

`python tests/checkpoints/fuzz.py --cases 1000000` keeps a record of its run in
fuzz_record.json. Nothing but the package's own errors may come out, in no long time and
without more memory than the file is worth. What breaks that is kept in corpus/, which
test_bad_input.py goes through each time, with some thousand fresh cases.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import platform
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.messages.errors import CheckpointError, PlanError
from fcconv_jax.plan import LayerPlan, Plan

HERE = Path(__file__).parent
CORPUS, RECORD = HERE / "corpus", HERE / "fuzz_record.json"

KERNEL = kernel_rearrangement((12, 5), (2, 2), order="CHW")
FC = LayerPlan(
    *("full_window", "Dense", (2, 2), "CHW", (("kernel", KERNEL),), (1, 12), (1, 1))
)
PLAN = Plan("conv", (("fc", FC),), (("x", "why"),), (("option", True),))
# Seconds that no case may take, and memory that none may ask for.
LONGEST, MEMORY = 20, 1 << 30

EVIL = [
    *("0", "-1", "1", "2", "65", "255", "256", "65535", "4294967295"),
    *("9223372036854775807", "18446744073709551616", "1e999", "-1e999", "1.5"),
    *("null", "true", '""', '"x"', "[]", "{}", "[[]]", "[1,[2]]", '{"a":1}'),
    *("NaN", "Infinity", "9" * 400, "9" * 5000, "[" * 2000, '{"a":' * 2000),
]
BYTES = bytes.fromhex("00017f80818f9093a0c0c1c4c6c7c9d4d9dbdddfff")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file to damage.

    Args:
      make: writes a whole checkpoint to a place.
      files: patterns of the files in it that are damaged; none where it is a file.
      as_text: whether numbers in the files are replaced, and not only bytes.
    """

    make: Callable[[Path], object]
    files: tuple[str, ...] = ()
    as_text: bool = True


TREE = {
    "params": {
        "fc": {"kernel": np.arange(60, dtype=np.float32).reshape(12, 5)},
        "norm": {"scale": np.ones(3, np.float16), "step": np.int32(4)},
    },
    "step": 7,
    "name": "abc",
    "list": [1, 2.5, None, True, 1j],
}


def safetensors(path: Path) -> None:
    flat = {"fc.kernel": TREE["params"]["fc"]["kernel"], "n": np.ones((0, 2), np.int8)}
    metadata = {"format": "flax"}
    write_one(path, Checkpoint("safetensors", flat, metadata=metadata))


def msgpack(path: Path) -> None:
    path.write_bytes(serialization.msgpack_serialize(TREE))


def converted(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def convert(path: Path) -> None:
        src = path.with_name("src-of-it")
        make(src)
        convert_checkpoint(src, path, PLAN)
        shutil.rmtree(src) if src.is_dir() else src.unlink()

    return convert


def orbax(ocdbt: bool, zarr3: bool) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        import orbax.checkpoint as ocp

        tree = {"params": {"fc": TREE["params"]["fc"]}, "step": 7, "name": "abc"}
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    return make


def folder(path: Path) -> None:
    path.mkdir()
    safetensors(path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"fc.kernel": "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def plan(path: Path) -> None:
    path.write_text(PLAN.to_json())


METADATA = ("_METADATA", "_CHECKPOINT_METADATA", "*/.zarray", "*/zarr.json")
KINDS = {
    "safetensors": Kind(safetensors),
    "safetensors converted": Kind(converted(safetensors)),
    "msgpack": Kind(msgpack, as_text=False),
    "msgpack converted": Kind(converted(msgpack)),
    "plan": Kind(plan),
    "folder": Kind(folder, ("*.json", "*.safetensors")),
    "orbax": Kind(orbax(False, False), METADATA),
    "orbax zarr3": Kind(orbax(False, True), METADATA),
    "orbax ocdbt": Kind(orbax(True, False), (*METADATA, "manifest.ocdbt", "**/d/*")),
    "orbax converted": Kind(converted(orbax(True, False)), METADATA),
}
# How many of a hundred cases, 20 for a new kind; those of Orbax take a hundred times as
# long.
SHARE = {"safetensors": 24, "safetensors converted": 20, "msgpack": 24}
SHARE |= {"msgpack converted": 14, "plan": 17.5, "folder": 0.46}
SHARE |= dict.fromkeys(("orbax", "orbax zarr3", "orbax ocdbt", "orbax converted"), 0.01)


def damage(content: bytes, rng: random.Random, as_text: bool) -> bytes:
    """The same with one to four faults."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 1, 2, 4, 8, 40))
        how = rng.randrange(9 if as_text else 6)
        if how == 0:
            out[at : at + 1] = bytes([rng.choice(BYTES)])
        elif how == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del out[at : at + size]
        elif how == 3:
            out[at:at] = rng.randbytes(size)
        elif how == 4:
            out[at:at] = out[rng.randrange(len(out) + 1) :][:size]
        elif how == 5 and rng.random() < 0.2:
            del out[at:]
        else:
            places = list(re.finditer(rb'-?\d+|"[^"]*"|\[[^\[\]]*\]', out))
            if places:
                place = rng.choice(places)
                out[place.start() : place.end()] = rng.choice(EVIL).encode()
        if not out:
            break
    return bytes(out)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends what takes too long, and refuses what asks for too much memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, old[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


def look(place: Path, kind: str, deep: bool) -> bool:
    """Does what users do with a checkpoint; whether it was taken."""
    out = place.with_name("out-of-it")
    try:
        if kind == "plan":
            made = Plan.from_json(place.read_bytes())
            str(made), made.inverse(), Plan.from_json(made.to_json())
            return True
        str(inspect_checkpoint(place))
        read_checkpoint(place)
        if deep:
            work = restore_checkpoint if "converted" in kind else convert_checkpoint
            work(place, out, *(() if "converted" in kind else (PLAN,)))
    except (CheckpointError, PlanError):
        return False
    finally:
        if deep and out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return True


class HarmError(Exception):
    """Something else than an error of the package came out."""


def one_case(whole: Path, kind: str, rng: random.Random, folder: Path) -> bool:
    """Damages a copy of a checkpoint and looks at it; whether it was taken.

    Raises:
      HarmError: it did harm; the files that did are kept.
    """
    place = folder / ("case folder" if whole.is_dir() else "case")
    made = KINDS[kind]
    if whole.is_dir():
        shutil.copytree(whole, place)
        files = [p for pattern in made.files for p in sorted(place.glob(pattern))]
        target = rng.choice(files)
    else:
        target = place
    source = whole / target.relative_to(place) if whole.is_dir() else whole
    target.write_bytes(damage(source.read_bytes(), rng, made.as_text))
    try:
        signal.alarm(LONGEST)
        return look(place, kind, whole.is_dir() or rng.random() < 0.02)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise HarmError(f"{kind}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        if whole.is_dir():
            shutil.rmtree(place, ignore_errors=True)


def run(cases: int, seed: int, keep: Path | None = None) -> tuple[Counter, Counter]:
    """Cases and those that were taken, by kind.

    Args:
      cases: how many, of all kinds together.
      seed: of the faults.
      keep: folder for the files that did harm; None to stop at the first.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    counts, taken = Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, made in KINDS.items():
            made.make(folder / f"whole {kind}")
            assert look(folder / f"whole {kind}", kind, True), kind
        with limits():
            for kind in KINDS:
                rng = random.Random(f"{seed} {kind}")
                for _ in range(max(1, round(cases * SHARE.get(kind, 20) / 100))):
                    whole = folder / f"whole {kind}"
                    counts[kind] += 1
                    try:
                        taken[kind] += one_case(whole, kind, rng, folder)
                    except HarmError as found:
                        if keep is None or whole.is_dir():
                            raise
                        content = (folder / "case").read_bytes()
                        digest = hashlib.sha256(content).hexdigest()[:8]
                        suffix = "json" if kind == "plan" else kind.split()[0]
                        (keep / f"{digest}.{suffix}").write_bytes(content)
                        print(f"{digest}: {found}"[:300], flush=True)
                    if counts[kind] % 100_000 == 0:
                        print(f"{kind}: {counts[kind]}", flush=True)
    return counts, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    CORPUS.mkdir(exist_ok=True)
    before = set(CORPUS.iterdir())
    begin = time.time()
    counts, taken = run(given.cases, given.seed, CORPUS)
    harm = len(set(CORPUS.iterdir()) - before)
    record = {
        "date": datetime.date.today().isoformat(),
        "seed": given.seed,
        "cases": sum(counts.values()),
        "by kind": dict(counts),
        "taken all the same": dict(taken),
        "did harm": harm,
        "seconds": round(time.time() - begin),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if not harm:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
