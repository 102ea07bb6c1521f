"""What converting a checkpoint costs, beside copying it, and the memory it takes.

Run `python benchmarks/checkpoints.py`, with `--gib 4` for another size and `--where`
for another disk. Every case is run in turns with `cp` of the same file (for Orbax: with
loading and saving the same tree), each followed by a flush to the disk, and with its
source in memory; medians.
Memory is the most that was anonymous at a time, above what was there after the imports:
what lies in files (the page cache, mapped files) is not counted.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from safetensors.numpy import save_file

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.plan import LayerPlan, Plan

ROWS, COLUMNS, WINDOW = 16384, 1024, (4, 4)


def plan(order: str, layers: int) -> Plan:
    kernel = kernel_rearrangement((ROWS, COLUMNS), WINDOW, order=order)
    layer = LayerPlan(
        *("full_window", "Dense", WINDOW, order, (("kernel", kernel),)),
        *((1, ROWS), (1, 1)),
    )
    return Plan("conv", tuple((f"layer_{i}", layer) for i in range(layers)))


def save(folder: Path, format: str, layers: int) -> Path:
    """Writes kernels of 64 MiB, with each format's own library."""
    rng = np.random.default_rng(0)
    tree = {
        f"layer_{i}": {"kernel": rng.random((ROWS, COLUMNS), np.float32)}
        for i in range(layers)
    }
    path = folder / f"dense-{format}"
    if format == "orbax":
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    elif format == "msgpack":
        path.write_bytes(serialization.msgpack_serialize(tree, in_place=True))
    else:
        flat = {f"{name}.kernel": leaf["kernel"] for name, leaf in tree.items()}
        save_file(flat, path)
    return path


def flush(path: Path) -> None:
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        fd = os.open(entry, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def warm(path: Path) -> None:
    """Reads files, so that each case finds its source in memory as the others do."""
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if entry.is_file():
            with entry.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def copy(src: Path, dst: Path) -> None:
    subprocess.run(["cp", "-r", src, dst], check=True)
    flush(dst)


def load_and_save(src: Path, dst: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(dst, checkpointer.restore(src))
    flush(dst)


class Anonymous:
    """The most anonymous memory while it is open, above a base, in MiB."""

    def __init__(self, base: int):
        self.base, self.most, self._done = base, 0, threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, anonymous() - self.base)


def anonymous() -> int:
    """Anonymous memory of this process, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) >> 10


def cases(format: str) -> dict[str, tuple[str, str, bool]]:
    """What is measured: how, the order of the flatten, and whether it is checked."""
    found = {"beside": ("load_and_save" if format == "orbax" else "copy", "", False)}
    for order, name in (("HWC", "reshape"), ("CHW", "transpose")):
        for check in (False, True):
            what = f"{name}{', checked' if check else ''}"
            found[what] = ("convert", order, check)
            found[f"{what}, back"] = ("restore", order, check)
    return found


def one(how: str, order: str, check: bool, src: Path, dst: Path) -> tuple[float, int]:
    """Seconds and MiB of one case."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    layers = int((src.parent / "layers").read_text())
    made = plan(order or "HWC", layers)
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(src, dst),
        "load_and_save": lambda: load_and_save(src, dst),
        "convert": functools.partial(
            fc.convert_checkpoint, src, dst, made, check=check
        ),
        "restore": functools.partial(fc.restore_checkpoint, src, dst, check=check),
    }
    warm(src)
    with Anonymous(anonymous()) as watch:
        begin = time.perf_counter()
        work[how]()
        seconds = time.perf_counter() - begin
    return seconds, watch.most


def measure(folder: Path, layers: int, rounds: int, format: str) -> dict[str, Any]:
    """Every case in turns, each in a process of its own."""
    alone(save, folder, format, layers)
    (folder / "layers").write_text(str(layers))
    src, dst = folder / f"dense-{format}", folder / "out"
    for order in ("HWC", "CHW"):
        alone(one, "convert", order, False, src, folder / order)
    seconds: dict[str, list[float]] = {name: [] for name in cases(format)}
    memory = dict.fromkeys(seconds, 0)
    for _ in range(rounds):
        for name, (how, order, check) in cases(format).items():
            source = folder / order if how == "restore" else src
            took, most = alone(one, how, order, check, source, dst)
            seconds[name].append(took)
            memory[name] = max(memory[name], most)
            shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
    base = statistics.median(seconds["beside"])
    return {
        name: {
            "seconds": round(statistics.median(times), 2),
            "ratio": round(statistics.median(times) / base, 2),
            "MiB": memory[name],
        }
        for name, times in seconds.items()
    }


def alone(work: Callable[..., Any], *args: object) -> Any:
    """Works in a process of its own, whose memory is not another's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, default=None, help="folder on the disk")
    parser.add_argument(
        "--formats", nargs="*", default=["safetensors", "msgpack", "orbax"]
    )
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    given = parser.parse_args()
    found: dict[str, dict] = {}
    for gib in given.gib:
        layers = (gib << 30) // (ROWS * COLUMNS * 4)
        for format in given.formats:
            with tempfile.TemporaryDirectory(dir=given.where) as name:
                rows = measure(Path(name), layers, given.rounds, format)
            found[f"{format} {gib} GiB"] = rows
            print(f"{format} {gib} GiB")
            for case, row in rows.items():
                print(
                    f"  {case:28} {row['seconds']:7.2f} s {row['ratio']:5.2f}x"
                    f" {row['MiB']:5d} MiB",
                    flush=True,
                )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
