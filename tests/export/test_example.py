"""The example of edge runtimes runs, and prints what the documentation shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("litert_quantizer", reason="needs: pip install -e '.[litert]'")


@pytest.mark.slow
def test_edge_digits(tmp_path):
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples/edge_digits.py")),
            *("--epochs", "6", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    right = dict(
        re.findall(r"^(\w+) .* KiB +(\S+) % correct", done.stdout, re.MULTILINE)
    )
    assert right["dense"] == right["conv"] == right["mix"]
    assert float(right["conv"]) > 90
    assert abs(float(right["int8"]) - float(right["conv"])) < 2
    assert "int8: mix and dense forms: the same bits" in done.stdout
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_the_documentation_names_every_chip_and_runtime():
    from fcconv_jax.export.chips import CHIPS
    from fcconv_jax.export.runtimes import runtimes

    text = (ROOT / "docs/howto/export.md").read_text()
    for chip in CHIPS:
        assert chip in text or chip.replace("ethos-u", "-u") in text
    for each in runtimes().values():
        assert f"| `{each.name}` | `{each.suffix}`" in text
