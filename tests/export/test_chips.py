"""The chips' tables decide: per layer, legal first, then preferred; and Vela."""

import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import pytest

import fcconv_jax as fc
from fcconv_jax.export.chips import CHIPS, chip_of
from fcconv_jax.export.forms import as_layer, place_of, plan_of_form
from fcconv_jax.frontends.bind import bind_planned
from fcconv_jax.messages.errors import ExportError

from .models import MODELS, normal


class Vision(nn.Module):
    """Patches, tokens, a window on the rest, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (16, 16), (16, 16), padding="VALID", name="embed")(x)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + nn.Dense(16, name="tokens")(x)
        x = x.reshape(x.shape[0], 4, 4, 16)
        x = nn.relu(nn.Dense(8, name="window")(x.reshape(x.shape[0], -1)))
        return nn.Dense(4, name="head")(x)


def mix(chip, model=None, x=None):
    model, x = model or Vision(), normal(1, 64, 64, 3) if x is None else x
    bound = bind_planned(model, (x,), {})
    return plan_of_form(bound, "mix", (), "last", chip_of(chip))


def forms(chip):
    plan = mix(chip)
    kinds = {"embed": "conv", "tokens": "dense", "window": "dense", "head": "dense"}
    return {path: plan[path].to if path in plan else own for path, own in kinds.items()}


def test_every_chip_of_the_table_has_its_sources():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.how in ("run", "read", "inferred")
        assert all(rule.source and rule.says for rule in chip.rules)


def test_places():
    plan = fc.make_plan(Vision(), normal(1, 64, 64, 3))
    patches = fc.make_plan(Vision(), normal(1, 64, 64, 3), to="dense")
    assert {path: place_of(layer) for path, layer in (plan | patches).items()} == {
        "embed": "patchify",
        "tokens": "tokens",
        "window": "full_window",
        "head": "head",
    }


def test_an_unpatchify_is_judged_by_its_own_shapes():
    """One row for each input, and outputs larger than the input."""
    model = nn.ConvTranspose(3, (16, 16), (16, 16))
    (layer,) = fc.make_plan(model, normal(1, 2, 4, 20), to="dense").values()
    assert place_of(layer) == "tokens"
    dense, conv = (as_layer("up", layer, form) for form in ("dense", "conv"))
    assert (dense.input_shape, dense.output_shape) == ((1, 2, 4, 20), (1, 2, 4, 768))
    assert dense.kernel_shape == (20, 768)
    assert (conv.input_shape, conv.output_shape) == ((1, 2, 4, 20), (1, 32, 64, 3))
    assert conv.kernel_shape == (16, 16, 20, 3)
    assert conv.options["spread"] == (16, 16)


# Of embed, tokens, window and head.
CHOICES = {
    **dict.fromkeys(
        ("ethos-u55", "ethos-u65", "ethos-u85"), ("dense", "conv", "dense", "dense")
    ),
    "edgetpu": ("conv", "conv", "dense", "dense"),
    "artpec-8": ("conv", "dense", "dense", "dense"),
    "artpec-9": ("dense", "conv", "conv", "conv"),
    "hexagon": ("conv", "conv", "conv", "conv"),
    "ane": ("conv", "conv", "conv", "conv"),
    "dpu": ("dense", "conv", "conv", "conv"),
    "k210": ("dense", "dense", "dense", "dense"),
    # Sixteen rows of tokens are no FULLY_CONNECTED there.
    "mdla": ("dense", "conv", "dense", "dense"),
    "tidl": ("dense", "dense", "conv", "dense"),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_the_mix(chip):
    assert tuple(forms(chip).values()) == CHOICES[chip]


def test_every_chip_has_its_row_in_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "howto" / "export.md"
    table = page.read_text().partition("| chip |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    # Generations share a row: `ethos-u55`, `-u65`.
    found = [name for row in rows for name in re.findall(r"`-?(.*?)`", row)]
    assert len(found) == len(CHIPS)
    assert all(name.endswith(shown) for name, shown in zip(CHIPS, found))


def test_a_window_that_a_chip_lacks_is_said_as_1x1():
    # 4x4 is none of ARTPEC-9's kernels, nor of TIDL's.
    for chip in ("artpec-9", "tidl"):
        assert mix(chip)["window"].window == (1, 1)
        assert not chip_of(chip).breaks(as_layer("w", mix(chip)["window"], "conv"))
    assert mix("hexagon")["window"].window == (4, 4)


def test_what_no_form_makes_legal_is_named(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")
    model = Vision()
    x = normal(1, 64, 64, 3)
    params = model.init(jax.random.key(0), x)
    report = fc.export(
        *(model, params, x),
        path=tmp_path / "m.tflite",
        to="mix",
        chip="mdla",
        progress=False,
    )
    assert report.passed
    assert [path for path, _ in report.broken] == ["embed"]
    # A stride of 16 rules out a convolution there, and 16 rows a FULLY_CONNECTED.
    assert "FULLY_CONNECTED has 1, 2, 4 or 8 rows (read: MediaTek" in str(report)
    assert "mdla doesn't support embed: " in str(report)


def test_a_mix_needs_a_chip(tmp_path):
    model, params, inputs = MODELS["mlp"]()
    options = {"path": tmp_path / "m.tflite", "to": "mix"}
    with pytest.raises(ExportError, match="Pass chip='ethos-u55'"):
        fc.export(model, params, *inputs, **options)
    with pytest.raises(ExportError, match="Expected chip= one of ethos-u55, "):
        fc.export(model, params, *inputs, chip="abacus", **options)


@pytest.mark.parametrize("accelerator", ["ethos-u55", "ethos-u65", "ethos-u85"])
@pytest.mark.parametrize("name", ["vision", "digits", "mobile"])
def test_velas_mix_is_no_slower_than_either_form(name, accelerator, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")
    pytest.importorskip("ethosu.vela", reason="needs: pip install -e '.[vela]'")
    if name == "vision":
        model, inputs = Vision(), (normal(1, 64, 64, 3),)
        params = model.init(jax.random.key(0), *inputs)
    else:
        model, params, inputs = MODELS[name]()
        inputs = tuple(x[:1] for x in inputs)
    report = fc.export(
        *(model, params, *inputs),
        path=tmp_path / "m.tflite",
        to="mix",
        chip=accelerator,
        compare=True,
        progress=False,
    )
    assert report.passed
    cycles = {row.form: next(iter(row.cycles.values())) for row in report.figures}
    assert cycles["mix"] <= min(cycles["dense"], cycles["conv"])
    if name == "vision":  # patches of 16x16
        assert cycles["conv"] > 1.5 * cycles["mix"]


@pytest.mark.parametrize("form", ["mix", "conv"])
def test_a_form_that_vela_refuses(form, tmp_path, monkeypatch):
    """The file is written all the same, and the report quotes Vela."""
    from fcconv_jax.export import vela

    def refuse(content, accelerator):
        raise ExportError(f"Vela refuses the file for {accelerator}: too wide")

    monkeypatch.setattr(vela, "available", lambda: True)
    monkeypatch.setattr(vela, "compile_file", refuse)
    pytest.importorskip("litert_quantizer", reason="needs: pip install -e '.[litert]'")
    model, params, inputs = MODELS["mlp"]()
    options = {"path": tmp_path / "m.tflite", "progress": False}
    report = fc.export(model, params, *inputs, to=form, chip="ethos-u55", **options)
    assert report.passed
    assert f"no cycles of the {form} form: Vela refuses the file" in str(report)


def test_operators_that_vela_leaves_to_the_cpu(tmp_path):
    """Named after the layer in front of them; a division by a number is a product."""
    pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")
    pytest.importorskip("ethosu.vela", reason="needs: pip install -e '.[vela]'")

    class Gates(nn.Module):
        act: Callable[[jax.Array], jax.Array]

        @nn.compact
        def __call__(self, x):
            x = nn.hard_sigmoid(nn.Conv(8, (3, 3), name="first")(x))
            return self.act(nn.Conv(5, (3, 3), name="second")(x))

    x = normal(1, 8, 8, 3)
    params = Gates(nn.relu).init(jax.random.key(0), x)
    options = {"path": tmp_path / "m.tflite", "chip": "ethos-u55", "progress": False}
    text = str(fc.export(Gates(nn.relu), params, x, **options))
    assert "ethos-u55-128" in text
    assert "CPU" not in text
    text = str(fc.export(Gates(nn.log_softmax), params, x, **options))
    assert "ethos-u55-128's CPU runs LOG_SOFTMAX at second/log_softmax: " in text
    assert "return logits or nn.softmax" in text
