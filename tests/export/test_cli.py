"""fcconv export, and fcconv verify of a file."""

import json
from pathlib import Path

import flax.serialization
import numpy as np
import pytest
from typer.testing import CliRunner

from fcconv_jax.cli import app

from .models import MODELS

pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")

CODE = """
import flax.linen as nn

class Digits(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="fc2")(x)
"""
MODEL = ["model.py:Digits", "--input", "1,8,6,1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(CODE)
    _, params, _ = MODELS["digits"]()
    for name, tree in (("a", params), ("other", _moved(params))):
        content = flax.serialization.msgpack_serialize(
            flax.serialization.to_state_dict(tree)
        )
        (tmp_path / f"{name}.msgpack").write_bytes(content)
    data = np.random.default_rng(0).normal(size=(12, 8, 6, 1)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=data)
    return tmp_path


def _moved(params):
    kernel = params["params"]["fc2"]["kernel"]
    fc2 = {**params["params"]["fc2"], "kernel": kernel.at[2, 3].add(1e-6)}
    return {"params": {**params["params"], "fc2": fc2}}


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_export_then_verify(folder):
    done = run(
        *("export", *MODEL, "--params", "a.msgpack", "--runtime", "litert"),
        *("--out", "net.tflite", "--report", "report.md"),
    )
    assert done.exit_code == 0, done.output
    assert "PROVED: net.tflite, conv form, LiteRT" in done.output
    assert (folder / "report.md").read_text().startswith("**PROVED")
    done = run("verify", "net.tflite", "--against", "a.msgpack")
    assert done.exit_code == 0, done.output
    assert "the outputs were not compared: that needs the model" in done.output
    done = run(
        *("verify", "net.tflite", "--against", "a.msgpack"),
        *("--model", "model.py:Digits", "--input", "1,8,6,1", "--json"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["proof"]["outputs"]
    done = run("verify", "net.tflite", "--against", "other.msgpack")
    assert done.exit_code == 1
    assert "FAILED: layer 'fc2': its kernel has other bits" in done.output


def test_a_converted_checkpoint(folder):
    done = run(
        *("convert", "a.msgpack", "conv.msgpack", "--model", "model.py:Digits"),
        *("--input", "1,8,6,1"),
    )
    assert done.exit_code == 0, done.output
    for params in ("a.msgpack", "conv.msgpack"):
        out = ("--out", "net.tflite")
        done = run("export", *MODEL, "--params", params, *out)
        assert done.exit_code == 0, done.output
        for against in ("a.msgpack", "conv.msgpack"):
            done = run("verify", "net.tflite", "--against", against)
            assert done.exit_code == 0, done.output


def test_int8_for_a_chip(folder):
    done = run(
        *("export", *MODEL, "--params", "a.msgpack", "--int8"),
        *("--calibrate", "data.npz", "--chip", "edgetpu", "--out", "net.tflite"),
    )
    assert done.exit_code == 0, done.output
    assert "PROVED: net.tflite, mix form for edgetpu" in done.output
    assert "int8: weights: 4 layers, the parameters rounded" in done.output
    done = run("verify", "net.tflite", "--against", "other.msgpack")
    # A millionth is less than half a step of an int8 scale.
    assert done.exit_code == 0, done.output


def test_calibration_data_that_are_damaged(folder):
    content = bytearray(Path("data.npz").read_bytes())
    # Behind the entry's signature and versions: a compression that zipfile lacks.
    content[content.index(b"PK\1\2") + 10] = 99
    Path("data.npz").write_bytes(content)
    given = "--int8", "--calibrate", "data.npz", "--out", "net.tflite"
    done = run("export", *MODEL, "--params", "a.msgpack", *given)
    assert done.exit_code == 2
    assert "Write the inputs with np.savez(file, *inputs)" in done.output


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ["export", *MODEL, "--runtime", "litert", "--out", "net.onnx"],
            "ends in .tflite",
        ),
        (["export", *MODEL, "--out", "net.h5"], ".onnx (onnx)"),
        (
            ["export", *MODEL, "--out", "a.tflite", "--int8"],
            "Expected --int8 and --calibrate together",
        ),
        (
            ["export", *MODEL, "--out", "a.tflite", "--chip", "abacus"],
            "Expected chip= one of ethos-u55",
        ),
        (["verify", "net.tflite"], "Pass --against CKPT"),
        (
            ["verify", "net.tflite", "--against", "a.msgpack"],
            "net.tflite: no such file",
        ),
    ],
)
def test_errors(arguments, what, folder):
    done = run(*arguments)
    assert done.exit_code in (1, 2)
    assert what in done.output.replace("\n", " ")


def test_a_file_by_others(folder):
    (folder / "net.tflite").write_bytes(b"\0" * 64)
    done = run("verify", "net.tflite", "--against", "a.msgpack")
    assert done.exit_code == 1
    assert "is not a LiteRT file" in done.output
