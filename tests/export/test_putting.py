"""A file takes its place when it is whole: a failed export leaves what was there."""

import pytest

import fcconv_jax as fc
from fcconv_jax.export import export as module
from fcconv_jax.messages.errors import ExportError

from .models import MODELS
from .test_files import RUNTIMES, SUFFIX, needs, write


@pytest.fixture(params=RUNTIMES)
def to(request):
    needs(request.param)
    return request.param


def content(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_there_is_replaced(to, tmp_path):
    write("mlp", to, tmp_path, "dense")
    before = content(tmp_path)
    report = write("mlp", to, tmp_path, "conv")
    assert report.passed
    assert report.path == str(tmp_path / f"model.{SUFFIX[to]}")
    assert content(tmp_path).keys() == before.keys()
    assert content(tmp_path) != before
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("step", ["reference_of", "prove"])
def test_an_error_leaves_what_was_there(step, to, tmp_path, monkeypatch):
    write("mlp", to, tmp_path, "dense")
    before = content(tmp_path)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(MemoryError):
        write("mlp", to, tmp_path, "conv")
    assert content(tmp_path) == before
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_folder_that_is_not_there_is_made(to, tmp_path):
    assert write("mlp", to, tmp_path / "new" / "folder", "conv").passed


def test_a_file_in_the_place_of_the_folder(to, tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(ExportError, match=r"can't be written: .* Pass another path"):
        write("mlp", to, tmp_path / "folder", "conv")


def test_a_folder_in_the_place_of_the_file(to, tmp_path):
    (tmp_path / f"model.{SUFFIX[to]}").mkdir()
    model, params, inputs = MODELS["mlp"]()
    path = tmp_path / f"model.{SUFFIX[to]}"
    with pytest.raises(ExportError, match=r"can't be replaced: .* Pass another path"):
        fc.export(model, params, *inputs, path=path, progress=False)


def test_a_form_that_there_is_not(to, tmp_path):
    with pytest.raises(ExportError, match="Expected to= one of conv, dense, mix"):
        write("mlp", to, tmp_path, "both")
