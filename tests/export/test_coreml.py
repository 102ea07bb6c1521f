"""Core ML packages: converted, read back, their weights compared; not run."""

import importlib.util

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc

from .models import MODELS, _made, normal
from .test_planted_defects import DEFECTS

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("needs: pip install -e '.[coreml]'", allow_module_level=True)


def write(name, folder, form="conv"):
    model, params, inputs = MODELS[name]()
    path = folder / f"{form}.mlpackage"
    options = {"path": path, "to": form, "progress": False}
    return fc.export(model, params, *inputs, **options)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms(name, tmp_path):
    conv, dense = (write(name, tmp_path, form) for form in ("conv", "dense"))
    for report in (conv, dense):
        assert report.passed, report.failures
        assert str(report).startswith("CONVERTED, NOT RUN")
        assert all(layer.bits is not False for layer in report.layers)
        assert not any(layer.exact for layer in report.layers)
        assert not report.proof.outputs
    assert {layer.op for layer in conv.layers} == {"conv"}
    left = dict(dense.left)
    assert all((x.op == "linear") != (x.name in left) for x in dense.layers)
    assert conv.figures[0].transposes <= dense.figures[0].transposes


@pytest.mark.parametrize("mean", [1.0, 1000.0])
def test_norms_that_cost_accuracy_in_jax_are_not_folded(mean, tmp_path):
    """The file doesn't run here: JAX with the norms folded stands for it."""
    model = nn.Sequential(
        [lambda x: (x - mean) / 3.0, nn.Conv(6, (3, 2), padding="VALID")]
    )
    model, params, (x,) = _made(model, normal(1, 6, 8, 3))
    options = {"path": tmp_path / "net.mlpackage", "progress": False}
    report = fc.export(model, params, x + mean, **options)
    assert report.passed, report.failures
    assert ("not folded: layers_1: with norms" in str(report)) == (mean > 1)
    assert any(layer.folded for layer in report.layers) == (mean == 1)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_kernel(defect, tmp_path):
    report = write("digits", tmp_path)
    (weights,) = (tmp_path / "conv.mlpackage").rglob("weight.bin")
    _, params, _ = MODELS["digits"]()
    kernel = np.asarray(params["params"]["conv2"]["kernel"])
    stored, wrong = (
        np.ascontiguousarray(k.transpose(3, 2, 0, 1)).tobytes()
        for k in (kernel, DEFECTS[defect](kernel))
    )
    data = weights.read_bytes()
    assert data.count(stored) == 1
    weights.write_bytes(data.replace(stored, wrong))
    again = fc.verify_file(report.path, params, progress=False)
    assert len(again.failures) == 1
    assert "layer 'conv2': its kernel has other bits" in again.failures[0]


def test_other_params(tmp_path):
    report = write("digits", tmp_path)
    _, params, _ = MODELS["digits"]()
    assert fc.verify_file(report.path, params, progress=False).passed
    params["params"]["fc1"]["bias"] = jnp.flip(params["params"]["fc1"]["bias"])
    again = fc.verify_file(report.path, params, progress=False)
    assert "layer 'fc1': its bias has other bits" in again.failures[0]


@pytest.mark.parametrize(
    "changes",
    [{"pad": [0, 2, 1, 1]}, {"dilations": [2, 1], "pad": [2, 2, 1, 1]}],
)
def test_planted_geometry(changes, tmp_path):
    """Geometry is read, not run; coremltools itself refuses what changes a shape."""
    ct = pytest.importorskip("coremltools", reason="needs: pip install -e '.[coreml]'")
    report = write("digits", tmp_path)
    (file,) = (tmp_path / "conv.mlpackage").rglob("*.mlmodel")
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    conv = [op for op in block.operations if op.type == "conv"][1]
    for name, value in changes.items():
        source = conv.inputs[name].arguments[0].name
        const = next(op for op in block.operations if op.outputs[0].name == source)
        const.attributes["val"].immediateValue.tensor.ints.values[:] = value
    file.write_bytes(spec.SerializeToString())
    _, params, _ = MODELS["digits"]()
    again = fc.verify_file(report.path, params, progress=False)
    for name, value in changes.items():
        what = f"layer 'conv2': expected {name} "
        assert any(what in x and f"has {value}" in x for x in again.failures)


@pytest.mark.parametrize("name", ["silu", "softplus", "soft_sign"])
def test_activations_are_one_operation(name, tmp_path):
    report = fc.export(
        lambda params, x: getattr(nn, name)(x @ params["w"]),
        {"w": jnp.ones((4, 3))},
        jnp.ones((2, 4)),
        path=tmp_path / "m.mlpackage",
        progress=False,
    )
    ops = report.figures[0].ops
    assert ops[name.replace("_", "")] == 1
    assert not {"sigmoid", "mul", "exp", "abs", "real_div"} & {*ops}


@pytest.mark.parametrize(
    ("approximate", "mode"), [(True, b"TANH_APPROXIMATION"), (False, b"EXACT")]
)
def test_both_gelus(approximate, mode, tmp_path):
    fc.export(
        lambda params, x: nn.gelu(x @ params["w"], approximate=approximate),
        {"w": jnp.ones((4, 3))},
        jnp.ones((2, 4)),
        path=tmp_path / "m.mlpackage",
        progress=False,
    )
    (file,) = tmp_path.rglob("*.mlmodel")
    assert mode in file.read_bytes()
