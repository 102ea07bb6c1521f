"""Killed, failing, raced: a place holds what it held, or the new whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import one_in

from fcconv_jax.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    places,
    read_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.checkpoints.formats import FORMATS
from fcconv_jax.files import install
from fcconv_jax.messages.errors import CheckpointError

HERE = Path(__file__).parent
sys.path.append(str(HERE))


@pytest.fixture(scope="session")
def interpose(tmp_path_factory):
    """The library that counts the calls that write."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler on Linux here, to stop a process at a system call")
    library = tmp_path_factory.mktemp("interpose") / "interpose.so"
    source = HERE / "interpose.c"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
    )
    return library


@pytest.mark.parametrize("place", one_in(2, ["overwrite", "fresh"]))
@pytest.mark.parametrize("how", one_in(2, ["before", "after", "full", "quota"]))
@pytest.mark.parametrize(
    "format",
    ["safetensors", "msgpack", pytest.param("orbax", marks=pytest.mark.slow)],
)
def test_at_every_call_that_writes(interpose, format, how, place):
    if format == "orbax" and (how, place) not in {
        ("before", "overwrite"),
        ("after", "fresh"),
        ("full", "overwrite"),
    }:
        pytest.skip("half a minute each: one of a kind will do")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "crash.py"), format, how, place],
        env={**os.environ, "LD_PRELOAD": str(interpose), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    # A few calls make the difference, many come before.
    assert outcome["calls"] >= {"safetensors": 10, "msgpack": 13, "orbax": 60}[format]
    assert outcome["old"] >= 7
    assert outcome["new"] >= 1


CONVERT = """
import sys
from crash import PLAN, Scene
from pathlib import Path
scene = Scene(Path(sys.argv[1]), sys.argv[2] == "overwrite")
print("ready", flush=True)
sys.stdin.readline()
scene.convert()
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_at_random_moments(format, tmp_path):
    from crash import Scene, listing

    made = Scene(tmp_path / "made", True)
    made.folder.mkdir()
    made.make(format)
    before = listing(made.folder)
    rng = random.Random(0)
    for number in range(10):
        scene = Scene(tmp_path / str(number), True)
        shutil.copytree(made.folder, scene.folder)
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                CONVERT,
                str(scene.folder),
                "overwrite",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(rng.random() * (2.0 if format == "orbax" else 0.05))
        process.kill()
        process.communicate()
        scene.check(before, False)
        shutil.rmtree(scene.folder)


def litter(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".fcconv-" in p.name]


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_has_is_not(
    case, save, tmp_path
):
    src, dst = save(case.dense, "safetensors"), tmp_path / "conv"
    dead = tmp_path / ".conv.fcconv-dead"
    dead.mkdir()
    (dead / "conv").write_text("half")
    (tmp_path / ".conv2.fcconv-other").mkdir()
    with install.workspace(dst) as alive:
        assert not dead.exists()
        convert_checkpoint(src, dst, case.plan)
        assert alive.exists()
    assert litter(tmp_path) == [".conv2.fcconv-other"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("without", ["", "renameat2"])
def test_a_place_that_is_taken_meanwhile_is_left_alone(
    case, save, tmp_path, monkeypatch, format, without
):
    if without:
        monkeypatch.setattr(install, "_rename", lambda *_: False)
    src, dst = save(case.dense, format), tmp_path / "conv"
    sync = places.sync

    def taken(fresh):
        dst.write_text("precious")
        sync(fresh)

    monkeypatch.setattr(places, "sync", taken)
    for overwrite in (False, True):
        dst.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match="conv: exists already"):
            convert_checkpoint(src, dst, case.plan, overwrite=overwrite)
        assert dst.read_text() == "precious"
        assert not litter(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_where_nothing_can_be_exchanged(case, save, tmp_path, monkeypatch, format):
    monkeypatch.setattr(install, "_rename", lambda *_: False)
    src, dst = save(case.dense, format), tmp_path / "conv"
    convert_checkpoint(src, dst, case.plan)
    assert verify_checkpoint(src, dst).passed
    if format == "orbax":
        with pytest.raises(CheckpointError, match="conv: cannot be replaced in one"):
            convert_checkpoint(src, dst, case.plan, overwrite=True)
    else:
        convert_checkpoint(src, dst, case.plan, overwrite=True)
    assert verify_checkpoint(src, dst).passed
    assert not litter(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_to_one_place(case, save, tmp_path, format, overwrite):
    """One of them wins, or one after the other; what is there is whole."""
    src, dst = save(case.dense, format), tmp_path / "conv"
    other = save({**case.dense, "extra": {"x": np.ones(3)}}, format, "other")
    wait, refused = threading.Barrier(2), []

    def run(source):
        wait.wait()
        try:
            convert_checkpoint(source, dst, case.plan, overwrite=overwrite)
        except CheckpointError as error:
            refused.append(str(error))

    if overwrite:
        convert_checkpoint(src, dst, case.plan)
    threads = [threading.Thread(target=run, args=(s,)) for s in (src, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == (0 if overwrite else 1)
    assert all("exists already" in why for why in refused)
    assert verify_checkpoint(src, dst).passed != verify_checkpoint(other, dst).passed
    assert not litter(tmp_path)


def rewrite_in_place(path):
    with path.open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\x01" * 40)


def cut(path):
    os.truncate(path, path.stat().st_size - 40)


def replace(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("how", [rewrite_in_place, cut, replace, Path.unlink])
@pytest.mark.parametrize("check", [True, False])
def test_a_source_that_changes_is_an_error(case, save, tmp_path, format, how, check):
    src = save({**case.dense, "z": {"big": np.zeros(5000)}}, format)
    largest = max((p for p in [src, *src.rglob("*")] if p.is_file()), key=_size)
    done = []

    def change(*_):
        if not done:
            done.append(how(largest))

    with pytest.raises(CheckpointError, match=r"changed|is gone|shorter|damaged|reads"):
        convert_checkpoint(
            src, tmp_path / "conv", case.plan, progress=change, check=check
        )
    assert done
    assert not (tmp_path / "conv").exists()
    assert not litter(tmp_path)


def _size(path):
    return path.stat().st_size


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_is_read_only(case, save, tmp_path):
    src = save(case.dense, "safetensors")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="conv: Permission denied"):
        convert_checkpoint(src, tmp_path / "locked" / "conv", case.plan)


def test_a_disk_that_is_too_small(case, save, tmp_path, monkeypatch):
    src = save(case.dense, "safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        CheckpointError, match="conv: needs 1100 bytes, but only 100 are free"
    ):
        convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert {p.name for p in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("after", [0.05, 0.3, 0.8, 1.5])
def test_ctrl_c_says_no_more_than_that(case, save, tmp_path, after):
    """During the imports, too."""
    src = save(case.dense, "orbax")
    (tmp_path / "plan.json").write_text(case.plan.to_json())
    # Python itself, when it is interrupted while it starts, exits with other statuses.
    run = "import fcconv_jax.__main__ as m; print('started', flush=True); m.main()"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", run, "convert", str(src)),
            *(str(tmp_path / "conv"), "--plan", str(tmp_path / "plan.json")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode:
        assert process.returncode in (130, -signal.SIGINT)
        assert "fcconv_jax/cli" not in err, err
    if not process.returncode or (tmp_path / "conv").exists():
        assert read_checkpoint(tmp_path / "conv").plan == case.plan
    assert not litter(tmp_path)
    assert inspect_checkpoint(src).plan is None
