"""What it costs to verify on backends that are not present: seconds and memory.

    pip install '.[examples,tpu-aot,cuda-aot]'
    python benchmarks/backends.py

Runs ``fcconv verify`` as a user does, and samples the memory of all its processes. Each
line ends with the bound and whether it holds; the exit status is 1 if one does not.
Wall time counts, so that nothing else should run meanwhile: the first line tells how
busy the machine was, and each line the CPU time of all processes too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax

TPUS = ("tpu:v4", "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:7x")
GPUS = ("cuda:a100", "cuda:h100")
MEMORY = 4  # GiB
_SAMPLE = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Block(nn.Module):
    """A pre-norm encoder layer of ViT-B: 12 heads of 64, an MLP of 3072."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, T, 768)`` to the same shape."""
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(12, name="attention")(h)
        h = nn.gelu(nn.Dense(3072, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(768, name="down")(h)


class Vit(nn.Module):
    """ViT-B/16: patches of 16x16, 12 layers, 1000 classes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``(N, 224, 224, 3)`` to logits ``(N, 1000)``."""
        x = nn.Conv(768, (16, 16), (16, 16), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 768)
        initial = nn.initializers.normal(0.02)
        x = x + self.param("positions", initial, (1, *x.shape[1:]))
        for number in range(12):
            x = Block(name=f"block{number}")(x)
        return nn.Dense(1000, name="head")(nn.LayerNorm()(x).mean(1))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
      seconds: wall time from start to end.
      cpu_seconds: CPU time of all its processes together.
      bytes: most resident memory of all its processes together.
    """

    seconds: float
    cpu_seconds: float
    bytes: int


def measure(command: list[str]) -> Cost:
    """Runs a command and watches it.

    Raises:
      SystemExit: it failed; with what it said.
    """
    start, cpu, peak = time.perf_counter(), cpu_seconds(), 0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            peak = max(peak, sum(map(resident, descendants(process.pid))))
            time.sleep(_SAMPLE)
        seconds = time.perf_counter() - start
        said.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{said.read()[-3000:]}")
    return Cost(seconds, cpu_seconds() - cpu, peak)


def cpu_seconds() -> float:
    """CPU time of the processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def descendants(root: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (stat := read(folder / "stat")):
            # The command's name, in brackets, may hold anything.
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for process in found:  # grows
        found += [child for child, parent in parents.items() if parent == process]
    return found


def resident(process: int) -> int:
    """Resident bytes of a process; what it shares with others counts in each."""
    statm = read(Path(f"/proc/{process}/statm"))
    return int(statm.split()[1]) * _PAGE if statm else 0


def read(file: Path) -> str:
    """The text of a file; '' where its process has ended."""
    try:
        return file.read_text()
    except OSError:
        return ""


def verify(model: str, shape: str, backends: tuple[str, ...]) -> Cost:
    """The cost of ``fcconv verify``."""
    named = [word for backend in backends for word in ("--backend", backend)]
    command = [sys.executable, "-m", "fcconv_jax", "verify", model, "--input", shape]
    return measure([*command, *named])


def main() -> None:
    """Prints one line for each bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--tpu", choices=TPUS, default="tpu:v5e", help="for ViT-B; default: %(default)s"
    )
    options = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        sys.exit("the memory of processes is read from /proc: Linux only")
    failed = False

    def show(text: str, cost: Cost, seconds: float) -> None:
        """A line for the time, one for the memory."""
        nonlocal failed
        size = cost.bytes / 2**30
        for holds, found in (
            (
                cost.seconds < seconds,
                f"{cost.seconds:6.1f} s ({cost.cpu_seconds:.0f} s CPU) < {seconds:g} s",
            ),
            (size < MEMORY, f"{size:6.2f} GiB < {MEMORY:g} GiB"),
        ):
            failed |= not holds
            print(f"{text:46}{found:32}{'PASS' if holds else 'FAIL'}", flush=True)

    root = Path(__file__).parent.parent
    load = os.getloadavg()[0]
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {load:.1f}")
    every = ("cpu", *TPUS, *GPUS)
    digits = verify(f"{root / 'examples' / 'digits.py'}:Digits", "4,8,8,1", every)
    text = f"digits on cpu, {len(TPUS)} TPUs and {len(GPUS)} GPUs"
    show(text, digits, 60)
    vit = verify(f"{__file__}:Vit", "8,224,224,3", (options.tpu,))
    show(f"ViT-B, 8 images, on {options.tpu}", vit, 120)
    sys.exit(failed)


if __name__ == "__main__":
    main()
