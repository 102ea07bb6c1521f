"""What converting a checkpoint costs, beside copying it, and the memory it takes.

Run `python benchmarks/checkpoints.py`, with `--gib 4` for another size and `--where`
for another disk. Every case is run in turns with `cp` of the same file (for Orbax: with
loading and saving the same tree), each followed by a flush to the disk; medians.
Memory is the most that was anonymous at a time, above what was there after the imports:
what lies in files (the page cache, mapped files) is not counted.
"""

from __future__ import annotations

import argparse
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
from fcconv_jax.kernels import kernel_rearrangement
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


def measure(src: Path, folder: Path, layers: int, rounds: int, format: str) -> dict:
    logging.getLogger("absl").setLevel(logging.ERROR)
    for needed in (plan("CHW", 1), fc.convert_checkpoint):
        assert needed  # has imported what it needs
    base_memory = anonymous()
    beside = load_and_save if format == "orbax" else copy
    cases: dict[str, Callable[[Path, Path], object]] = {"beside": beside}
    for order, name in (("HWC", "reshape"), ("CHW", "transpose")):
        made = plan(order, layers)
        conv = folder / f"conv-{format}-{order}"
        fc.convert_checkpoint(src, conv, made, check=False)
        for check in (False, True):
            what = f"{name}{', checked' if check else ''}"

            def convert(src, dst, made=made, check=check):
                fc.convert_checkpoint(src, dst, made, check=check)

            def restore(src, dst, conv=conv, check=check):
                fc.restore_checkpoint(conv, dst, check=check)

            cases[what] = convert
            cases[f"{what}, back"] = restore
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory = dict.fromkeys(cases, 0)
    for _ in range(rounds):
        for name, run in cases.items():
            dst = folder / "out"
            with Anonymous(base_memory) as watch:
                begin = time.perf_counter()
                run(src, dst)
                seconds[name].append(time.perf_counter() - begin)
            memory[name] = max(memory[name], watch.most)
            shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
    for order in ("HWC", "CHW"):
        conv = folder / f"conv-{format}-{order}"
        shutil.rmtree(conv) if conv.is_dir() else conv.unlink()
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
                folder = Path(name)
                alone(save, folder, format, layers)
                src = folder / f"dense-{format}"
                rows = alone(measure, src, folder, layers, given.rounds, format)
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
