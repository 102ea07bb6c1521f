"""Files are installed whole or not at all, and killed runs leave nothing."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from fcconv_jax.files import install
from fcconv_jax.files.install import replacing, updating


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    final = tmp_path / "m.onnx"
    final.write_text("old")
    with replacing(final) as fresh:
        fresh.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"
    assert names(tmp_path) == ["m.onnx"]


def test_what_lies_beside_is_installed_first(tmp_path, monkeypatch):
    order, move = [], install.install
    monkeypatch.setattr(
        install, "install", lambda f, to, may: (order.append(to.name), move(f, to, may))
    )
    with replacing(tmp_path / "m.xml") as fresh:
        fresh.write_text("graph")
        fresh.with_suffix(".bin").write_text("weights")
        fresh.with_suffix(".zzz").write_text("more")
    assert order[-1] == "m.xml"
    assert names(tmp_path) == ["m.bin", "m.xml", "m.zzz"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "m").write_text("old")

    def fail():
        with replacing(tmp_path / "m") as fresh:
            fresh.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "m").read_text() == "old"
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("how", ["folder", "fifo", "dangling link"])
@pytest.mark.parametrize("system", ["renameat2", "link"])
def test_only_a_regular_file_is_replaced(tmp_path, how, system, monkeypatch):
    if system == "link":
        monkeypatch.setattr(install, "_rename", lambda *_: False)
    final = tmp_path / "m"
    if how == "folder":
        final.mkdir()
        (final / "thesis.tex").write_text("precious")
    elif how == "fifo":
        os.mkfifo(final)
    else:
        final.symlink_to("nowhere")
    with pytest.raises(FileExistsError), replacing(final) as fresh:
        fresh.write_text("new")
    assert names(tmp_path) == ["m"]
    assert final.is_dir() or final.is_fifo() or final.is_symlink()


def test_a_folder_replaces_a_folder_where_it_may(tmp_path):
    final = tmp_path / "m.mlpackage"
    final.mkdir()
    (final / "old").touch()
    with install.workspace(final) as folder:
        fresh = folder / final.name
        fresh.mkdir()
        (fresh / "new").touch()
        install.install(fresh, final, lambda there: there.is_dir())
    assert names(final) == ["new"]
    assert names(tmp_path) == ["m.mlpackage"]


@pytest.mark.parametrize("system", ["posix_fallocate", "none"])
@pytest.mark.parametrize("nbytes", [0, 5, (1 << 20) + 3])
def test_the_size_is_allocated(tmp_path, nbytes, system, monkeypatch):
    if system == "none":
        monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "m").open("wb") as file:
        install.allocate(file.fileno(), nbytes)
    stat = (tmp_path / "m").stat()
    assert stat.st_size == nbytes
    assert stat.st_blocks * 512 >= nbytes
    assert (tmp_path / "m").read_bytes() == bytes(nbytes)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from fcconv_jax.files.install import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as fresh:\n"
        "    fresh.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    final = tmp_path / ("ä" * 127)  # 254 bytes: its prefix must be cut
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(final)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with replacing(final) as fresh:  # a live one stays
        fresh.write_text("first")
    assert len(names(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with replacing(final) as fresh:
        fresh.write_text("second")
    assert names(tmp_path) == [final.name]
    assert final.read_text() == "second"


def test_a_workspace_that_another_run_removes_is_made_anew(tmp_path, monkeypatch):
    made, make = [], install.tempfile.mkdtemp

    def make_and_lose(**where):
        made.append(make(**where))
        if len(made) == 1:
            assert install.remove_leftovers(tmp_path / "conv")
        return made[-1]

    monkeypatch.setattr(install.tempfile, "mkdtemp", make_and_lose)
    with install.workspace(tmp_path / "conv") as folder:
        assert str(folder) == made[1]
    assert names(tmp_path) == []


def test_without_locks_a_file_is_installed_and_a_leftover_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "fcntl", None)
    (tmp_path / ".m.fcconv-x").mkdir()
    with updating(tmp_path / "m"), replacing(tmp_path / "m") as fresh:
        fresh.write_text("new")
    assert names(tmp_path) == [".m.fcconv-x", "m"]
    shutil.rmtree(tmp_path / ".m.fcconv-x")


def test_updates_of_several_processes_are_all_kept(tmp_path):
    final = tmp_path / "number"
    final.write_text("0")
    code = (
        "import pathlib, sys, time\n"
        "from fcconv_jax.files.install import replacing, updating\n"
        "final = pathlib.Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with updating(final):\n"
        "        number = int(final.read_text())\n"
        "        time.sleep(0.001)\n"
        "        with replacing(final) as fresh:\n"
        "            fresh.write_text(str(number + 1))\n"
    )
    command = [sys.executable, "-c", code, str(final)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert final.read_text() == "60"
    assert names(tmp_path) == ["number"]
