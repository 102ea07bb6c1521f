"""Arm's Vela: compiles an int8 LiteRT file for an Ethos-U, and estimates cycles."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ..messages.errors import ExportError, MissingExtraError
from ..messages.extras import require

_LEFT = r"operator: (\w+), ofm: '([^';]*)[^']*'\nReason: (.*)"
# Rewritings that keep an operator on an Ethos-U.
INSTEAD = {
    "BATCH_MATMUL": "use layers with weights",
    "GATHER": "look embeddings up on the host",
    "GELU": "use nn.relu or nn.hard_swish",
    "LOG_SOFTMAX": "return logits or nn.softmax",
    "DIV": "multiply by the reciprocal",
    "POW": "multiply",
    "CUMSUM": "multiply by a triangular matrix",
    "TOPK_V2": "return scores",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What Vela made of a file.

    Args:
      accelerator: what it was compiled for, such as ``"ethos-u55-128"``.
      cycles: in all, as Vela estimates.
      npu: operations on the accelerator.
      cpu: operations that it leaves to the CPU.
      left: those: the operator, its tensor, and Vela's reason.
    """

    accelerator: str
    cycles: int
    npu: int
    cpu: int
    left: tuple[tuple[str, str, str], ...] = ()


def available() -> bool:
    """Return whether Vela is installed."""
    try:
        require("ethosu.vela", "vela", "compiling for an Ethos-U")
    except MissingExtraError:
        return False
    return True


def compile_file(content: bytes, accelerator: str) -> Compiled:
    """Compile an int8 file.

    Args:
      content: of the .tflite file.
      accelerator: such as ``"ethos-u55-128"``.

    Raises:
      MissingExtraError: Vela is not installed.
      ExportError: Vela refuses the file; gives its reason.
    """
    require("ethosu.vela", "vela", "compiling for an Ethos-U")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        file.write_bytes(content)
        command = [sys.executable, "-m", "ethosu.vela"]
        options = ["--accelerator-config", accelerator, "--output-dir", folder]
        done = subprocess.run(
            [*command, *options, str(file)], capture_output=True, text=True, check=False
        )
        summaries = list(Path(folder).glob("*_summary_*.csv"))
        if done.returncode or not summaries:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise ExportError(
                f"Vela refuses the file for {accelerator}: {said[-1]}. Drop chip=."
            )
        with summaries[0].open(encoding="utf-8") as lines:
            row = list(csv.DictReader(lines))[-1]
    counts = dict(re.findall(r"(CPU|NPU) operators = (\d+)", done.stdout))
    return Compiled(
        accelerator,
        int(float(row["cycles_total"])),
        int(counts.get("NPU", 0)),
        int(counts.get("CPU", 0)),
        tuple(re.findall(_LEFT, done.stdout)),
    )
