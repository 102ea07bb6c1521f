"""``fcconv --help`` and that of each command, with its examples."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcconv_jax.cli import app

from .commands import COMMANDS, run, save


def test_names_every_command():
    out = run("--help").stdout
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["40", "80"])
def test_of_a_command(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    out = run(f"{command} --help").stdout
    assert "Examples:" in out
    assert f"fcconv {command}" in out
    assert max(map(len, out.splitlines())) <= int(columns)


def test_says_defaults():
    assert "[default: VALID]" in " ".join(run("explain --help").stdout.split())


def test_examples_are_true(params, verified):
    save("ckpt", {"params": params})
    Path("run").mkdir()
    for step in (8, 9):
        save(f"run/checkpoint_{step}", {"params": params})
    Image.fromarray(np.ones((14, 12), np.uint8)).save("canvas.png")
    ran = 0
    for command in COMMANDS:
        if command in ("compare", "export"):  # elsewhere
            continue
        epilog = next(c.epilog for c in app.registered_commands if _name(c) == command)
        for line in epilog.split("\n\n")[1:]:
            if " back" in line and Path("back").exists():
                assert "--overwrite" in line
            run(line.strip().removeprefix("fcconv "))
            ran += 1
    assert ran >= 15
    assert len(verified) == 4
    assert {p.name for p in Path().iterdir()} >= {
        "plan.json",
        "report.md",
        "back",
        "heat.png",
    }


def test_version():
    assert re.fullmatch(r"fcconv \d+\.\d+\.\d+\n", run("--version").stdout)


def test_wrong_usage():
    assert run("plan", 2).stdout == ""
    assert "--inptu" in run("plan model.py:Net --inptu 1,8", 2).stderr
    assert "nonsense" in run("nonsense", 2).stderr
    assert run("convert a b --plan p --format zip", 2).stdout == ""


def _name(command):
    return command.name or command.callback.__name__
