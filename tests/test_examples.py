"""Every example runs, and prints the numbers that the documentation names."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_every_example_is_run():
    tests = Path(__file__).parent.rglob("test_example*.py")
    run_here = "".join(file.read_text() for file in tests)
    names = [file.name for file in EXAMPLES.glob("*.py")]
    assert [name for name in names if name not in run_here] == []


def test_book():
    done = run("book.py")
    assert done.returncode == 0, done.stderr
    # The chapter's printed numbers.
    assert "fully connected: [-0.47746772 -2.146881  ]" in done.stdout
    for row in (
        " -0.127387  -0.187159  -0.812602",
        "  0.266289  -0.477468  -1.717037",
        " -0.266257  -0.861359  -1.131496",
        " -0.171074  -0.932015  -0.500394",
        " -0.599594  -2.146881  -2.079289",
        "  1.326013   0.414452  -1.477663",
    ):
        assert row in done.stdout
    assert "position (1, 1) of it is the Dense's value" in done.stdout
    assert "lost: the stride skips the center" in done.stdout
    if importlib.util.find_spec("torch") is not None:
        assert "PyTorch Conv2d: [-0.47746772 -2.146881  ]" in done.stdout


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    done = run("digits.py", "--epochs", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "fc1 Dense full_window (512, 64) -> (4, 4, 32, 64) HWC" in rows
    assert "EQUIVALENT: 2 layers to conv" in done.stdout
    assert "2 dots, 2 convolutions -> 0 dots, 4 convolutions" in done.stdout
    assert "All predictions agree." in done.stdout
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.md").read_text().startswith("**EQUIVALENT")


@pytest.mark.slow
def test_detect_digits(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "found.png"
    done = run("detect_digits.py", "--epochs", "3", "--size", "96", "--out", picture)
    assert done.returncode == 0, done.stderr
    assert "89x89 crops of 8x8, 1x1 apart" in done.stdout
    found, placed = re.search(r"(\d+) of (\d+) digits found", done.stdout).groups()
    assert int(found) > int(placed) / 2
    error = re.search(r"largest difference from a batch of crops: (.*)", done.stdout)
    assert float(error[1]) < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resume_training(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "run"
    done = run("resume_training.py", "--steps", "30", "--budget", "0", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "opt_state/0/nu/conv/kernel (2, 2, 1, 32) -> (4, 32)" in rows
    assert "optimizer/opt_state/0/nu/conv/kernel (2, 2, 1, 32) -> (4, 32)" in rows
    assert sum("ms per step" in row for row in rows) == 4
    assert any(row.startswith("given back: outputs") for row in rows)
    for name in ("linen, TrainState", "NNX, nnx.Optimizer"):
        (row,) = (row for row in rows if re.match(rf"{name} \d", row))
        first, last, apart = map(float, row.split()[-3:])
        assert last < first
        assert apart < 1e-5
    picture = (tmp_path / "run" / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_digits_help():
    done = run("digits.py", "--help")
    assert done.returncode == 0
    assert "--epochs" in done.stdout
