"""``fcconv hlo``: the two programs side by side, JSON, errors, help."""

import json
import re

import pytest

from fcconv_jax.backends import resolution
from fcconv_jax.extras import install_command

from .commands import run

MODEL = """
import flax.linen as nn


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.relu(nn.Dense(5, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(4, name="fc2")(x)
"""


@pytest.fixture(autouse=True)
def model(folder):
    (folder / "model.py").write_text(MODEL)


def test_side_by_side():
    lines = run("hlo model.py:Net fc1 --input 2,8,8,1 --backend cpu").stdout
    lines = lines.splitlines()
    assert lines[0] == "fc1: Dense, full_window, on cpu (cpu)"
    assert re.fullmatch(r"dense: \S+ ms +conv: \S+ ms", lines[1])
    assert len(re.findall(r"\bdot\b", "\n".join(lines[2:-1]))) == 2
    assert "f32[2,192]{1,0}" in "\n".join(lines)
    assert re.match(r"conv takes \d+\.\d\dx the time of dense", lines[-1])
    assert not any(line.endswith(" ") for line in lines)
    for noise in ("metadata", "backend_config", "parameter", "bitcast"):
        assert noise not in "\n".join(lines)


def test_json():
    command = "hlo model.py:Net fc2 --input 2,8,8,1 --dtype bfloat16 --json"
    found = json.loads(run(command).stdout)
    assert (found["layer"], found["dtype"]) == ("fc2", "bfloat16")
    assert found["backend"] == "cpu"
    assert found["ratio"] == pytest.approx(
        found["forms"]["conv"]["cost"] / found["forms"]["dense"]["cost"]
    )
    assert found["forms"]["conv"]["steps"][0]["result"].startswith(("bf16", "f32"))


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        ("fc3 --backend cpu", "no layer 'fc3' converts to conv; close to it: fc2", 1),
        ("conv --to dense", "'conv' is left alone, .*SAME|padd", 1),
        ("fc1 --backend npu", "--backend: no backend 'npu'", 2),
        ("fc1 --backend rocm", "rocm: .*cannot be compiled without a device", 1),
        ("fc1 --dtype float12", "--dtype 'float12' is no dtype", 2),
    ],
)
def test_errors(arguments, message, status):
    result = run(f"hlo model.py:Net {arguments} --input 2,8,8,1", status)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(resolution, "_installed", lambda module: False)
    command = "hlo model.py:Net fc1 --input 2,8,8,1 --backend tpu:v5e"
    assert install_command("tpu-aot") in run(command, 1).stderr


def test_help_and_its_examples():
    out = run("hlo --help").stdout
    assert "tpu-aot and cuda-aot" in " ".join(re.sub("[│\n]", " ", out).split())
    assert max(map(len, out.splitlines())) <= 80
    examples = re.findall(r"fcconv (hlo model.*)", out)
    assert len(examples) == 3
    for example in examples:
        if "tpu" not in example or not resolution.missing_extra("tpu"):
            run(example)
