"""Ten models of transformers 5, planned, converted, verified, slid and exported."""

import re
from pathlib import Path

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

torch = pytest.importorskip("torch", reason=install_command("torch"))
pytest.importorskip("torchax", reason=install_command("torch"))
transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("needs transformers 5", allow_module_level=True)

from frontends.torch.models import CASES, made  # noqa: E402

PAGES = Path(__file__).parents[3] / "docs"
# Layers to conv, layers to dense: what the gallery says.
PLANNED = {
    row[1]: (int(row[3]), int(row[4]))
    for line in (PAGES / "gallery/pytorch.md").read_text("utf-8").splitlines()
    if len(row := [cell.strip() for cell in line.split("|")]) > 5 and row[3].isdigit()
}


def close(got, want):
    want = want.detach()
    scale = float(want.abs().max())
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5 * scale)


@pytest.mark.parametrize("name", CASES)
def test_planned_converted_verified(name):
    case = CASES[name]
    model = made(case)
    want = model(**case.inputs)
    plans = [fc.make_plan(model, to=to, **case.inputs) for to in ("conv", "dense")]
    assert tuple(map(len, plans)) == PLANNED[name]
    plan = plans[0] | plans[1]
    got = fc.convert_model(model, plan)(**case.inputs)
    for key, value in got.items():
        close(value, want[key])
    state = model.state_dict()
    moved = fc.convert_params(state, plan)
    back = fc.restore_params(moved, plan)
    model.load_state_dict(back, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    report = fc.verify(model, plan=plan, gradients=False, progress=False, **case.inputs)
    assert report.passed, report
    assert report.digits is not None
    assert report.digits > 12


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].slide])
def test_slide(name):
    case = CASES[name]
    model = Logits(made(case)).eval()
    size = case.slide or 0
    image = torch.randn(1, 3, size + 32, size, generator=torch.manual_seed(2))
    grid = fc.slide(model, window=(size, size), stride=32)(image)
    assert grid.shape == (1, 2, 1, 5)
    for row in range(2):
        close(grid[:, row, 0], model(image[:, :, 32 * row : 32 * row + size]))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].export])
def test_export(name, tmp_path):
    pytest.importorskip("flatbuffers", reason=install_command("stablehlo"))
    case = CASES[name]
    model = Logits(made(case)).eval()
    x = case.inputs["pixel_values"]
    file = fc.export(model, x, path=tmp_path / "m.stablehlo", progress=False)
    assert file.passed


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (PAGES / "howto/pytorch.md").read_text("utf-8")
    names: dict[str, object] = {}
    for cell in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(cell, names)
