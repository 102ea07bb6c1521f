"""Files with weights of 16 bits: rounded once, and bounded by that rounding."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.runtimes import runtime_of
from fcconv_jax.messages.errors import ExportError

from .models import MODELS

pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")
pytest.importorskip("onnxruntime", reason="needs: pip install -e '.[onnx]'")

FILES = [("m.tflite", "float16"), ("m.onnx", "float16"), ("m.onnx", "bfloat16")]


def export(name, path, **options):
    model, params, inputs = MODELS[name]()
    given = {"weights": "float16", "progress": False, **options}
    return fc.export(model, params, *inputs, path=path, **given)


@pytest.mark.parametrize("form", ["conv", "dense"])
@pytest.mark.parametrize(("file", "weights"), FILES)
@pytest.mark.parametrize("name", ["digits", "mobile", "embedding", "grouped"])
def test_weights_are_rounded_once(name, file, weights, form, tmp_path):
    report = export(name, tmp_path / file, to=form, weights=weights)
    assert report.passed, report.failures
    assert f"rounded to {weights}" in report.headline
    assert {layer.stored for layer in report.layers} == {weights}
    (found,) = report.proof.outputs
    exact = export(name, tmp_path / f"exact{Path(file).suffix}", to=form, weights=None)
    # The rounding shows in the outputs, and is within its bound.
    assert exact.proof.outputs[0].allowed < found.converted <= found.allowed
    assert found.allowed < 0.2


@pytest.mark.parametrize("file", ["m.tflite", "m.onnx"])
def test_the_file_holds_sixteen_bits(file, tmp_path):
    model, params, (x,) = MODELS["mlp"]()
    wide = fc.export(model, params, x, path=tmp_path / f"wide{file}", progress=False)
    narrow = export("mlp", tmp_path / file)
    weights = sum(x.size for x in _kernels(params)) * 2
    sizes = [Path(report.path).stat().st_size for report in (wide, narrow)]
    # A cast or dequantization for each layer takes some bytes, too.
    assert sizes[0] - sizes[1] > weights - 3 * 600
    shipped = runtime_of(tmp_path / file).open(tmp_path / file)
    for layer, kernel in zip(shipped.layers(), _kernels(params)):
        rounded = np.asarray(kernel, np.float16).astype(np.float32)
        np.testing.assert_array_equal(layer.kernel.reshape(rounded.shape), rounded)


def _kernels(params):
    return [params["params"][f"Dense_{i}"]["kernel"] for i in range(3)]


@pytest.mark.parametrize(("file", "weights"), FILES)
def test_verify_file_compares_the_rounded_parameters(file, weights, tmp_path):
    path = tmp_path / file
    export("mobile", path, weights=weights)
    model, params, inputs = MODELS["mobile"]()
    found = fc.verify_file(path, params, *inputs, model=model, progress=False)
    assert found.passed, found.failures
    assert found.proof.outputs
    kernel = params["params"]["head"]["kernel"]
    step = float(jnp.finfo(weights).eps)
    params["params"]["head"]["kernel"] = kernel.at[3, 2].multiply(1 + step)
    again = fc.verify_file(path, params, progress=False)
    assert len(again.failures) == 1
    assert "layer 'head': its kernel has other bits" in again.failures[0]


def test_what_has_no_such_weights(tmp_path):
    with pytest.raises(ExportError, match=r"Expected no weights= for OpenVINO"):
        export("mlp", tmp_path / "m.xml")
    with pytest.raises(ExportError, match=r"Expected weights='float16' for LiteRT"):
        export("mlp", tmp_path / "m.tflite", weights="bfloat16")
    model, params, inputs = MODELS["mlp"]()
    kernel = params["params"]["Dense_1"]["kernel"]
    params["params"]["Dense_1"]["kernel"] = kernel.at[1, 2].set(1e5)
    with pytest.raises(
        ExportError, match=r"within the range of float16, got 1e\+05 in"
    ):
        fc.export(
            *(model, params, *inputs),
            path=tmp_path / "m.onnx",
            weights="float16",
            progress=False,
        )
