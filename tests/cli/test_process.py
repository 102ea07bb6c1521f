"""Real processes: the two ways to start it, exit status, what goes where."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from .commands import save


def start(*command, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False
    )


def test_as_a_module():
    done = start(sys.executable, "-m", "fcconv_jax", "--help", TERM="dumb")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "explain" in done.stdout
    assert "\x1b" not in done.stdout


def test_help_does_not_wait_for_jax():
    code = """
        import runpy, sys
        sys.argv = ["fcconv", "--help"]
        try:
            runpy.run_module("fcconv_jax", run_name="__main__")
        except SystemExit as stop:
            assert not stop.code
        slow = {"jax", "flax", "numpy", "optax", "orbax"} & set(sys.modules)
        assert not slow, slow
    """
    done = start(sys.executable, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert "explain" in done.stdout


def test_entry_point():
    script = Path(sys.executable).with_name("fcconv")
    sizes = ("--input", "7x7", "--kernel", "7")
    done = start(script, "explain", *sizes, "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["case"] == "full_window"


def test_a_reader_that_has_read_enough_is_no_error(folder):
    """As in ``fcconv inspect ckpt | head -1``."""
    tree = {f"layer{n:05}": {"kernel": np.zeros(1)} for n in range(5000)}
    save("ckpt", tree)
    command = [sys.executable, "-m", "fcconv_jax", "inspect", "ckpt"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline().startswith("leaf ")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_status_and_streams_of_a_failure():
    done = start(
        sys.executable, "-m", "fcconv_jax", "convert", "a", "b", "--rule", "c=1"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    said = r"error: .*/a: no such file or directory\. Pass the path of a checkpoint\.\n"
    assert re.fullmatch(said, done.stderr)


def test_an_error_of_the_model_is_one_line(folder):
    (folder / "broken.py").write_text("1 / 0\n")
    done = start(sys.executable, "-m", "fcconv_jax", "plan", "broken.py:Net")
    assert done.returncode == 1
    assert done.stderr.startswith("error: broken.py:1: 1 / 0: ZeroDivisionError")
    assert len(done.stderr.splitlines()) == 1
