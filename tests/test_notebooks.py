"""The notebooks: without outputs in git, and running from top to bottom on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def _ids(path):
    return path.stem


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "colab_edge",
        "colab_gpu",
        "colab_slide",
        "colab_tpu",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_ids)
def test_outputs_are_stripped(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=_ids)
def test_runs_on_a_cpu(path, tmp_path):
    if path.stem == "colab_edge":
        for package in ("ai_edge_litert", "ethosu.vela"):
            why = "needs: pip install -e '.[vela]'"
            pytest.importorskip(package, reason=why)
    command = [
        *(sys.executable, "-m", "nbconvert", "--execute", "--to", "markdown"),
        *("--output-dir", str(tmp_path), str(path)),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / f"{path.stem}.md").read_text()
    assert list(tmp_path.rglob("*.png"))
    if path.stem == "colab_edge":
        assert "digits_int8.tflite" in text
        assert "layer 'fc1': its kernel has other bits" in text
        return
    if path.stem == "colab_slide":
        assert "185x185 crops of 8x8, 1x1 apart" in text
        error = re.search(r"largest difference: (\d\S*)", text)
        assert error
        assert float(error[1]) < 1e-5
        assert "DIFFERENT FUNCTIONS" in text
        change = re.search(r"largest change of an output: (\d\S*)", text)
        assert change
        assert float(change[1]) < 1e-5
        return
    assert "EQUIVALENT: 2 layers to conv" in text
    # Both models, and the same accuracy in both forms.
    before, after = re.findall(r"accuracy.*: (\S+%)", text)
    assert before == after
    assert float(after[:-1]) > 85
    assert "to dense: 1 layers, equivalent: True" in text
    # The table of `tune`: each kind of layer, and which form it took.
    assert re.search(r"^ *\d\.\d\dx: .* -> .* on ", text, re.MULTILINE)
    assert "<- chosen" in text


@pytest.mark.parametrize("stem", ["colab_tpu", "colab_gpu"])
def test_rendered_with_the_same_code(stem):
    path = ROOT / "examples" / f"{stem}.ipynb"
    rendered = ROOT / "docs" / "gallery" / f"{path.stem}.md"
    text = rendered.read_text()
    for cell in json.loads(path.read_text())["cells"]:
        assert "".join(cell["source"]).strip() in text, (
            f"{rendered.name} is older than the notebook; see CONTRIBUTING.md to "
            "render it"
        )
    assert not re.search(r"/(?:tmp|home|work|root|usr|opt)/", text)
    pictures = list(rendered.parent.glob(f"{path.stem}_files/*.png"))
    assert pictures
    assert rendered.stat().st_size + sum(p.stat().st_size for p in pictures) < 2**20
