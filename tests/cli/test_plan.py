"""``fcconv plan``: tables, JSON, models of every kind, errors."""

import re
import sys
from pathlib import Path

import pytest

import fcconv_jax as fc

from .commands import BRANCHES, fails, run


def test_table():
    out = run("plan model.py:Net --input 1,8,8,1").stdout
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert lines[0] == ["2 layers to conv"]
    assert lines[1] == ["path", "layer", "case", "kernel", "order"]
    kernel = "(48, 5) -> (4, 4, 3, 5)"
    assert lines[2] == ["fc1", "Dense", "full_window", kernel, "HWC"]


def test_is_not_folded_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = run("plan model.py:Net --input 1,8,8,1").stdout
    assert "(48, 5) -> (4, 4, 3, 5)" in out


def test_is_folded_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    out = run("plan model.py:Net --input 1,8,8,1").stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= 40
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", out)


def test_json_and_file_are_the_plan():
    result = run("plan model.py:Net --input 1,8,8,1 --json --out plan.json")
    import_model = fc.Plan.from_json(result.stdout)
    assert list(import_model) == ["fc1", "fc2"]
    assert fc.Plan.from_json(Path("plan.json").read_text()) == import_model
    assert result.stderr == "wrote plan.json\n"


def test_layouts_for_a_backend():
    out = run("plan model.py:Net --input 1,8,8,1 --for cuda:h100").stdout
    assert "(48, 5) -> (5, 4, 4, 3) OHWI flat" in out
    out = run("plan model.py:Net --input 1,8,8,1 --rule '*<100=skip'").stdout
    assert "fc2   excluded by rule '*<100'" in out
    fails(
        "plan model.py:Net --input 1,8,8,1 --for xpu",
        "--for: no backend 'xpu'",
        status=2,
    )


def test_rules_direction_kwargs_and_method():
    rules = "--rule fc1=2x2:CHW --rule 'fc2=skip' --kwarg train=false"
    made = fc.Plan.from_json(
        run(f"plan model.py:Net --input 1,8,8,1 {rules} --json").stdout
    )
    assert made["fc1"].window == (2, 2)
    assert made["fc1"].order == "CHW"
    assert made.skipped["fc2"] == "excluded by rule 'fc2'"
    out = run("plan model.py:Net --input 1,8,8,1 --to dense").stdout
    assert "0 layers to dense" in out
    assert re.search(r"conv\s+Padding", out)
    out = run("plan model.py:Tokens --input 2,3:int32 --method encode").stdout
    assert "0 layers" in out


@pytest.mark.parametrize(
    "name", ["model:make_wide", "model:wide", "model:Holder.wide", "model.py:wide"]
)
def test_what_a_name_may_be(name, monkeypatch):
    monkeypatch.delitem(sys.modules, "model", raising=False)
    assert "1 layer to conv" in run(f"plan {name} --input 2,4").stdout


def test_in_a_folder_with_neighbours(folder):
    (folder / "nets").mkdir()
    (folder / "nets" / "parts.py").write_text("features = 6\n")
    (folder / "nets" / "whole.py").write_text(
        "import flax.linen as nn\nimport parts\nnet = nn.Dense(parts.features)\n"
    )
    assert "(4, 6)" in run("plan nets/whole.py:net --input 2,4").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model.py --input 1", "Expected MODULE:NAME, .* got 'model.py'"),
        ("model.py: --input 1", "Expected MODULE:NAME"),
        (
            "model.py:Nte --input 1",
            "model.py has no 'Nte'. Pass one of .*: Net, Wide, Tokens, .*make_wide, ",
        ),
        ("nowhere.py:Net --input 1", "nowhere.py: no such file. Pass the path"),
        ("nowhere.at:Net --input 1", "No module 'nowhere' in .* its suffix"),
        ("os.nowhere:Net --input 1", "No module 'os.nowhere'"),
        ("model.py:Wide --input 1", "Wide can't be called .*'features'"),
        ("model.py:NUMBER --input 1", "NUMBER, a int. Pass a linen or NNX"),
        ("model.py:make_number --input 1", "returns a int. Pass a linen or NNX"),
        ("model.py:Net --input 1,8,eight", "expected SHAPE.* got '1,8,eight'"),
        ("model.py:Net --input 1,8:floaty", "expected SHAPE.* got '1,8:floaty'"),
        ("model.py:Net --input 1,8:float64", "JAX_ENABLE_X64=1"),
        ("model.py:Net --kwarg train", "--kwarg: expected NAME=VALUE.* got 'train'"),
        ("model.py:Net --input 1 --kwarg trian=1", "of model.py:Net, got 'trian'. Pas"),
        ("model.py:Net --input 1,8:object", "expected SHAPE.* got '1,8:object'"),
        ("things:Net --input 1", "got the folder things. Pass the file"),
    ],
)
def test_wrong_arguments(arguments, message):
    Path("things").mkdir(exist_ok=True)
    fails(f"plan {arguments}", message, status=2)


@pytest.mark.parametrize("command", ["tune", "compare model.py:Net"])
def test_a_call_without_inputs(command):
    fails(f"{command} model.py:Net", "Pass the shapes of the model's inputs: --in", 2)


def test_an_unknown_method():
    fails("plan model.py:Net --input 1 --method run", "method's name of Net, got 'run'")


def test_wrong_rules():
    fails("plan model.py:wide --input 2,4 --rule f=2", r"'f' matches no.*\['fc'\]")
    fails(
        "plan model.py:wide --input 2,4 --rule fc",
        "Expected a rule PATTERN=.* got 'fc'",
    )
    fails("plan model.py:wide --input 2,4 --rule fc=3", "divides the 4 .* got 3")


def test_errors_of_the_model_are_one_line_with_its_own(folder, monkeypatch):
    (folder / "broken.py").write_text("import no_such_library\n")
    line = "broken.py:1: import no_such_library: ModuleNotFoundError: "
    fails("plan broken.py:Net", line)
    fails("plan broken:Net", line)
    (folder / "broken.py").write_text("raise ValueError('mine')\n")
    fails("plan broken.py:Net", "broken.py:1: .* ValueError: mine")
    fails("plan model.py:Net --kwarg trian=true --input 1,8,8,1", "trian", 2)
    fails("plan model.py:Net", "shapes of the model's inputs: --input", status=2)
    fails("plan model.py:Net --input 1,8,8", r"on inputs of shape \(1, 8, 8\)")
    (folder / "broken.py").write_text(BRANCHES)
    fails("plan broken.py:Net --input 1,4", r"broken.py:4: if .*: .*jax.lax.cond")
    (folder / "broken.py").write_text("raise ValueError('mine')\n")
    monkeypatch.setenv("FCCONV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mine"):
        run("plan broken.py:Net")


def test_a_wrapper_of_a_module_and_its_params(folder):
    """As Hugging Face has them: the call and the params are named by a function."""
    (folder / "wrapped.py").write_text(WRAPPER)
    message = r"wraps a Module and its params: pass a function that returns its call"
    for name in ("wrapper", "Wrapper"):
        fails(f"plan wrapped.py:{name} --input 2,4", message, status=2)
    assert run("plan wrapped.py:make --input 2,4").stdout.startswith("1 layer to conv")


WRAPPER = """
import flax.linen as nn, jax, jax.numpy as jnp

class Wrapper:
    def __init__(self):
        self.module = nn.Dense(3)
        self.params = self.module.init(jax.random.key(0), jnp.ones((1, 4)))

    def __call__(self, x, params=None):
        return self.module.apply(params or self.params, x)

wrapper = Wrapper()

def make():
    return (lambda params, x: wrapper(x, params=params)), wrapper.params
"""
