"""The line that installs an extra works where the package came from."""

import os
import shlex
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

import fcconv_jax as fc
from fcconv_jax.messages.errors import MissingExtraError
from fcconv_jax.messages.extras import _command, install_command, require

ROOT = Path(__file__).parents[2]
HOME = "https://example.org/fcconv"
GIT = {
    "url": "https://example.org/fork.git",
    "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "abc123"},
}


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        ({}, "pip install 'fcconv-jax[onnx]'"),
        (
            GIT,
            "pip install 'fcconv-jax[onnx] @ git+https://example.org/fork.git@abc123'",
        ),
        (
            {"url": "file:///w/fcconv_jax-1.0.whl", "archive_info": {}},
            "pip install 'fcconv-jax[onnx] @ file:///w/fcconv_jax-1.0.whl'",
        ),
        (
            {"url": ROOT.as_uri(), "dir_info": {"editable": True}},
            f"pip install -e {shlex.quote(f'{ROOT}[onnx]')}",
        ),
        (
            {"url": ROOT.as_uri(), "dir_info": {}},
            f"pip install {shlex.quote(f'{ROOT}[onnx]')}",
        ),
        (
            {"url": "file:///a/clone/that/is/gone", "dir_info": {}},
            f"pip install 'fcconv-jax[onnx] @ git+{HOME}'",
        ),
    ],
)
def test_the_line_names_the_place_that_the_package_came_from(origin, line):
    assert _command(origin, "onnx", HOME) == line


def test_a_folder_with_a_space_stays_one_argument(tmp_path):
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    origin = {"url": clone.as_uri(), "dir_info": {}}
    line = shlex.split(_command(origin, "onnx", HOME))
    assert line == ["pip", "install", f"{clone}[onnx]"]


def test_a_missing_module_is_an_error_with_the_line():
    with pytest.raises(MissingExtraError) as error:
        require("no_such_module", "litert", "Writing LiteRT files")
    assert install_command("litert") in str(error.value)
    assert isinstance(error.value, fc.FcconvError | ImportError)


def _wheel(folder, name, files, metadata=""):
    """A small wheel, as an index or a folder of packages has it."""
    info = f"{name}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": head + metadata, f"{info}/WHEEL": wheel}
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("place", ["index", "file"])
def test_the_line_runs(tmp_path, place):
    """pip runs what the message says, in a fresh environment without network."""
    modules = [f"fcconv_jax/messages/{name}.py" for name in ("extras", "errors")]
    packages = ["fcconv_jax/__init__.py", "fcconv_jax/messages/__init__.py"]
    files = {file: (ROOT / file).read_text() for file in modules}
    files |= dict.fromkeys(packages, "")
    extra = "Provides-Extra: images\nRequires-Dist: leaf; extra == 'images'\n"
    wheel = _wheel(tmp_path, "fcconv_jax", files, extra)
    _wheel(tmp_path, "leaf", {"leaf.py": ""})
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    env = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
    }

    def run(*command, **options):
        return subprocess.run(
            command, env=env, cwd=scripts, text=True, check=True, **options
        )

    run("pip", "install", "-q", "fcconv-jax" if place == "index" else str(wheel))
    code = "from fcconv_jax.messages import extras; print(extras.install_command('%s'))"
    code %= "images"
    line = run("python", "-c", code, capture_output=True).stdout
    run(*shlex.split(line), "-q")
    run("python", "-c", "import leaf")
