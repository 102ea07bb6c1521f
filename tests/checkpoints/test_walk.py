"""Folders that were made to harm: links, pipes, devices, and files beside a dst."""

import contextlib
import os
import signal

import pytest

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.messages.errors import CheckpointError


@contextlib.contextmanager
def at_most(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def hub(case, save, tmp_path):
    """A folder with one file of weights and one beside it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    save(case.dense, "safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def loops(folder):
    for name in "ab":
        (folder / name).symlink_to(".")


def two_ways(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    for name in "ab":
        (folder / name).symlink_to("deep")


def device(folder):
    (folder / "tok.json").symlink_to("/dev/zero")


def pipe_beside(folder):
    os.mkfifo(folder / "notes.txt")


def pipe_as_index(folder):
    os.mkfifo(folder / "model.safetensors.index.json")


def pipe_as_weights(folder):
    os.mkfifo(folder / "more.safetensors")


def link_to_nowhere(folder):
    (folder / "vocab.txt").symlink_to("nowhere")


@pytest.mark.parametrize(
    "harm",
    [
        loops,
        two_ways,
        device,
        pipe_beside,
        pipe_as_index,
        pipe_as_weights,
        link_to_nowhere,
    ],
)
@pytest.mark.parametrize("follow_links", [False, True])
def test_what_is_not_a_file_is_refused_in_a_moment(
    case, hub, tmp_path, harm, follow_links
):
    harm(hub)
    with at_most(20), pytest.raises(CheckpointError, match=r"hub/"):
        convert_checkpoint(hub, tmp_path / "c", case.plan, follow_links=follow_links)
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("where", ["", "d", "extra"])
def test_a_pipe_in_an_orbax_directory_is_refused(case, save, tmp_path, where):
    src = save(case.dense, "orbax")
    (src / where).mkdir(exist_ok=True)
    os.mkfifo(src / where / "0123")
    with at_most(30), pytest.raises(CheckpointError, match="0123: expected a regular"):
        read_checkpoint(src)


@pytest.mark.parametrize("name", ["x.msgpack", "x.safetensors", "x"])
def test_a_pipe_as_a_checkpoint_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with at_most(20), pytest.raises(CheckpointError, match="expected a regular file"):
        inspect_checkpoint(tmp_path / name)


@pytest.mark.parametrize("what", ["beside", "weights", "folder"])
def test_links_that_leave_the_folder_are_listed_and_followed_when_asked(
    case, hub, tmp_path, what
):
    away = tmp_path / "away"
    away.mkdir()
    if what == "beside":
        (away / "secret").write_text("key")
        (hub / "vocab.txt").symlink_to(away / "secret")
    elif what == "weights":
        (hub / "model.safetensors").rename(away / "blob")
        (hub / "model.safetensors").symlink_to(away / "blob")
    else:
        (away / "secret").write_text("key")
        (hub / "docs").symlink_to(away)
    inspect_checkpoint(hub)  # which copies nothing
    with pytest.raises(CheckpointError, match=r"1 links leave .*away.*--follow-links"):
        convert_checkpoint(hub, tmp_path / "conv", case.plan)
    convert_checkpoint(hub, tmp_path / "conv", case.plan, follow_links=True)
    assert verify_checkpoint(hub, tmp_path / "conv").passed
    assert not any(p.is_symlink() for p in (tmp_path / "conv").rglob("*"))


def test_a_link_inside_the_folder_is_copied_as_a_file(case, hub, tmp_path):
    (hub / "also.json").symlink_to("config.json")
    convert_checkpoint(hub, tmp_path / "conv", case.plan)
    assert (tmp_path / "conv" / "also.json").read_text() == "{}"


@pytest.mark.parametrize("place", ["src", "dst"])
def test_a_nul_in_a_path_is_named(case, hub, tmp_path, place):
    src, dst = (f"{tmp_path}/hub\0", "x") if place == "src" else (hub, "a\0b")
    with pytest.raises(CheckpointError, match="NUL"):
        convert_checkpoint(src, dst, case.plan)


@pytest.mark.parametrize("format", ["orbax", "msgpack", "safetensors"])
def test_dots_in_paths(case, save, tmp_path, format, monkeypatch):
    save(case.dense, format)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    convert_checkpoint("../dense", "../sub/../conv", case.plan)
    assert verify_checkpoint("../dense", "../conv").passed


# ------------------------------------------------------------ overwriting


def project(folder):
    (folder / "thesis.tex").write_text("precious")
    (folder / "src").mkdir()
    (folder / "src" / "train.py").write_text("precious")


@pytest.mark.parametrize("format", ["orbax", "hub", "safetensors"])
@pytest.mark.parametrize("source", ["orbax", "hub", "safetensors"])
def test_a_folder_with_more_than_a_checkpoint_is_not_replaced(
    case, save, hub, tmp_path, listing, format, source
):
    def saved(kind, name):
        return hub if kind == "hub" else save(case.dense, kind, name)

    src, old = saved(source, "new"), saved(format, "old")
    dst = tmp_path / "dst"
    convert_checkpoint(old, dst, case.plan)
    if dst.is_file():  # a lone file of weights in someone's folder
        dst.rename(tmp_path / "w.safetensors")
        dst.mkdir()
        (tmp_path / "w.safetensors").rename(dst / "w.safetensors")
    project(dst)
    before = listing()
    with pytest.raises(
        CheckpointError, match=r"holds more than .*src/train\.py.*thesis\.tex"
    ):
        convert_checkpoint(src, dst, case.plan, overwrite=True)
    assert listing() == before


@pytest.mark.parametrize("format", ["orbax", "hub"])
def test_a_converted_folder_is_replaced(case, save, hub, tmp_path, format):
    src = hub if format == "hub" else save(case.dense, "orbax", "o")
    for _ in range(2):
        convert_checkpoint(src, tmp_path / "conv", case.plan, overwrite=True)
    assert verify_checkpoint(src, tmp_path / "conv").passed
    if format == "hub":
        (tmp_path / "conv" / "config.json").write_text('{"edited": 1}')
        with pytest.raises(CheckpointError, match=r"more than .*config\.json"):
            convert_checkpoint(src, tmp_path / "conv", case.plan, overwrite=True)


# ------------------------------------------------------------ the way back


def test_a_plan_goes_back_where_none_is_stored(case, save, tmp_path):
    src = save(case.dense, "msgpack")
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    tree = read_checkpoint(tmp_path / "conv").tree
    write_one(tmp_path / "on", Checkpoint("msgpack", tree))
    with pytest.raises(
        CheckpointError, match=r"on: expected one stored plan.*restore --plan"
    ):
        restore_checkpoint(tmp_path / "on", tmp_path / "back")
    report = restore_checkpoint(tmp_path / "on", tmp_path / "back", case.plan)
    assert len(report.converted) == 2
    assert verify_checkpoint(src, tmp_path / "back").passed
    with pytest.raises(CheckpointError, match=r"conv: expected the plan stored"):
        restore_checkpoint(tmp_path / "conv", tmp_path / "b", case.plan.inverse())
