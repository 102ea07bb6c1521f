"""``fcconv verify`` of models and of two checkpoints."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fcconv_jax.checkpoints import read_checkpoint
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.verification import layer_certificates as certificates_module

from .commands import (
    OTHER_KINDS,
    fails,
    run,
    save,
    train_state,
)


@pytest.mark.parametrize("name", ["Nnx", "function"])
def test_they_are_planned_and_verified(folder, name):
    (folder / "kinds.py").write_text(OTHER_KINDS)
    assert run(f"plan kinds.py:{name} --input 2,4").stdout.startswith("1 layer")
    command = f"verify kinds.py:{name} --input 2,4"
    assert run(command).stdout.startswith("EQUIVALENT: 1 layer to conv")
    report = json.loads(run(f"{command} --backend rocm --json").stdout)
    assert report["passed"] is True


def test_gradients_and_rules():
    result = run("verify model.py:wide --input 2,4 --rule fc=2")
    assert result.stdout.startswith("EQUIVALENT: 1 layer to conv")
    assert re.search(r"fc\s+full_window\s+proved", result.stdout)
    assert "gradients: " in result.stdout
    assert result.stderr == ""


def test_what_is_verified(verified):
    command = "verify model.py:Tokens --input 2,3:int32 --method __call__"
    for seed in (1, 1, 2):
        run(f"{command} --seed {seed} --no-gradients")
    a, b, c = (call[1]["params"]["head"]["kernel"] for call in verified)
    assert (a == b).all()
    assert (a != c).any()
    _, _, (ids,), options = verified[0]
    assert ids.shape == (2, 3)
    assert ids.dtype == jnp.int32
    assert options["method"] == "__call__"
    assert options["gradients"] is False
    assert options["plan"]["head"].case == "pointwise"
    run("verify model.py:Net --input 2,8,8,1 --kwarg train=false")
    assert verified[-1][-1]["train"] is False
    assert verified[-1][-1]["gradients"] is True


def test_backends(verified):
    command = "verify model.py:wide --input 2,4"
    run(f"{command} --backend rocm --backend CPU --timeout 7")
    _, variables, (x,), options = verified[0]
    assert [str(backend) for backend in options["backends"]] == ["rocm", "cpu"]
    assert options["timeout"] == 7
    assert isinstance(x, jax.Array)
    run(f"{command} --backend rocm")
    _, variables, (x,), _ = verified[1]
    assert isinstance(x, jax.ShapeDtypeStruct)
    assert isinstance(variables["params"]["fc"]["kernel"], jax.ShapeDtypeStruct)
    run(command)
    assert verified[2][-1]["backends"] is None
    fails(f"{command} --backend npu", "--backend: no backend 'npu'", 2)


def test_a_backend_that_is_not_present():
    result = run("verify model.py:wide --input 2,4 --backend rocm")
    assert result.stdout.startswith("LOWERED, NOT EXECUTED: 1 layer to conv")


def test_json_markdown_and_file():
    command = "verify model.py:wide --input 2,4 --no-gradients"
    report = json.loads(run(f"{command} --json --out report.md").stdout)
    assert report["passed"] is True
    assert {array["quantity"] for array in report["arrays"]} == {"outputs"}
    assert Path("report.md").read_text().startswith("**EQUIVALENT")
    assert "| fc | pointwise |" in run(f"{command} --markdown").stdout
    run(f"{command} --out report.json")
    assert json.loads(Path("report.json").read_text())["passed"] is True
    fails(f"{command} --json --markdown", "Expected --json or --markdown", 2)


@pytest.mark.parametrize("wrap", ["params", "state", "bare", "safetensors"])
def test_parameters_of_a_checkpoint(params, wrap, verified):
    if wrap == "state":
        train_state("ckpt", params)
    elif wrap == "safetensors":
        flat = {f"{k}.{n}": v for k, d in params.items() for n, v in d.items()}
        safetensors.numpy.save_file(flat, "ckpt")
    else:
        save("ckpt", {"params": params} if wrap == "params" else params)
    run("convert ckpt conv --model model.py:Net --input 1,8,8,1")
    for name in ("ckpt", "conv"):
        run(f"verify model.py:Net --input 2,8,8,1 --params {name}")
    (_, a, _, before), (_, b, _, after) = verified
    jax.tree.map(np.testing.assert_array_equal, a, {"params": params})
    jax.tree.map(np.testing.assert_array_equal, b, {"params": params})
    assert before["converted_params"] is None
    conv = after["converted_params"]["params"]
    assert conv["fc1"]["kernel"].shape == (4, 4, 3, 5)
    assert list(after["plan"]) == list(before["plan"])


def test_a_converted_checkpoint(params):
    save("ckpt", params)
    run("convert ckpt conv --rule fc2=1")
    command = "verify model.py:Net --input 2,8,8,1 --params conv"
    out = run(f"{command} --no-gradients").stdout
    assert out.startswith("EQUIVALENT: 1 layer to conv")


def test_a_conversion_that_was_changed(params):
    save("ckpt", params)
    run("convert ckpt conv.msgpack --model model.py:Net --input 1,8,8,1")
    conv = read_checkpoint("conv.msgpack")
    conv.tree["fc2"]["bias"] = np.ones(5, np.float32)
    Path("conv.msgpack").unlink()
    write_one(Path("conv.msgpack"), conv)
    command = "verify model.py:Net --input 2,8,8,1 --params conv.msgpack"
    fails(command, r"'fc2/bias' of shape \(4,\), got \(5,\)")


def test_another_order_than_the_code_is_said(params, verified):
    save("ckpt", params)
    run("convert ckpt conv --rule fc1=4x4:CHW")
    command = "verify model.py:Net --input 2,8,8,1 --params conv"
    result = run(command)
    assert "'fc1' with the window (4, 4) CHW, the model's code" in result.stderr
    fails(f"{command} --rule fc1=4x4", "with the converted checkpoint conv", status=2)


def test_exit_status_when_it_fails(monkeypatch):
    prepare = certificates_module.prepare_layer

    def differ(*arguments, **options):
        certificate = prepare(*arguments, **options)
        return lambda: dataclasses.replace(certificate(), passed=False)

    monkeypatch.setattr(certificates_module, "prepare_layer", differ)
    result = run("verify model.py:wide --input 2,4 --no-gradients", 1)
    assert result.stdout.startswith("DIFFERENT")
    result = run("verify model.py:wide --input 2,4 --no-gradients --json", 1)
    assert json.loads(result.stdout)["passed"] is False


def test_a_checkpoint_of_another_model(params):
    command = "verify model.py:Net --input 2,8,8,1 --params ckpt"
    other = {**params, "fc2": {"kernel": np.ones((5, 9)), "bias": np.ones(9)}}
    save("ckpt", other)
    shapes = r"of shape \((4,|5, 4)\), got \((9,|5, 9)\)"
    fails(command, f"ckpt is not a checkpoint of this model: .* leaf 'fc2/.*{shapes}")
    save("ckpt", {**params, "fc3": {"bias": np.ones(4)}})
    fails(command, "the leaf 'fc3/bias', which the model lacks")
    save("ckpt", {k: v for k, v in params.items() if k != "conv"})
    fails(command, "expected the leaf 'conv/(bias|kernel)' of shape")
    fails(f"{command}x", "ckptx: no such file")


def test_nothing_to_verify_is_no_success():
    result = run("verify model.py:Plain --input 2,4", 3)
    assert result.stdout.startswith("NOTHING CONVERTED: 0 layers")


def test_two_checkpoints(params):
    save("ckpt", params)
    run("convert ckpt conv --rule fc1=4x4:CHW --rule fc2=1x1 --format orbax")
    out = run("verify ckpt conv").stdout
    assert out == "SAME: 6 leaves, 1196 bytes, bit for bit; 2 of them moved to conv\n"
    content = json.loads(run("verify conv ckpt --json").stdout)
    assert (content["passed"], content["to"]) == (True, "dense")
    kernel = params["fc1"]["kernel"].copy()
    kernel[3, 2] += 1e-6
    params["fc1"]["kernel"] = kernel
    save("other", params)
    result = run("verify other conv --out report.md", 1)
    assert result.stdout.startswith("DIFFERENT: 1 of 6 leaves")
    assert "fc1/kernel" in Path("report.md").read_text()


def test_wrong_use(params):
    save("ckpt", params)
    fails("verify ckpt nothing", "nothing: no such file")
    assert "two checkpoints alone" in run("verify ckpt ckpt --input 1,8", 2).stderr


def test_transposed_layers_on_a_named_backend(tmp_path):
    file = tmp_path / "decoder.py"
    file.write_text(
        "import flax.linen as nn\n\n\n"
        "class Decoder(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        x = nn.ConvTranspose(4, (2, 2), (2, 2), name='apart')(x)\n"
        "        return nn.ConvTranspose(3, (3, 3), (2, 2), name='up')(x)\n"
    )
    model = f"{file}:Decoder --input 2,3,4,5 --to dense"
    out = run(f"verify {model} --rule *=phases --backend cpu --no-gradients").stdout
    rows = [line.split() for line in out.splitlines()]
    found = {row[0]: row[1:3] for row in rows if row and row[0].endswith("/kernel")}
    assert found == {
        "apart/kernel": ["unpatchify", "proved"],
        "up/kernel": ["phases", "proved"],
    }
