"""int8 LiteRT files: per channel, the same bits in both forms, the weights rounded."""

from pathlib import Path

import jax
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.runtimes.litert import int8
from fcconv_jax.messages.errors import ExportError

from .models import MODELS, normal

pytest.importorskip("litert_quantizer", reason="needs: pip install -e '.[litert]'")


def export(name, folder, form="conv", **options):
    model, params, inputs = MODELS[name]()
    inputs = tuple(x[:1] for x in inputs)
    shape = inputs[0].shape[1:]
    data = [np.asarray(normal(24, *shape, seed=5))]
    options = {"calibrate": data, "to": form, "progress": False, **options}
    path = folder / f"{form}.tflite"
    return fc.export(model, params, *inputs, path=path, **options)


@pytest.mark.parametrize("name", ["digits", "vgg head", "mlp", "mobile"])
def test_both_forms_are_the_same_bits(name, tmp_path):
    report = export(name, tmp_path, compare=True)
    assert report.passed, report.failures
    assert report.int8["conv and dense forms"].startswith("the same bits in ")
    difference = float(report.int8["difference from float32"].split()[0])
    assert 0 < difference < 0.2


@pytest.mark.parametrize("form", ["conv", "dense"])
def test_a_scale_for_each_feature_and_a_quarter_of_the_size(form, tmp_path):
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

    report = export("digits", tmp_path, form)
    file = LiteRTFile(Path(report.path))
    for layer, operator in zip(file.layers(), file.linear_operators()):
        quantization = file.graph.tensors[operator.inputs[1]].quantization
        assert layer.kernel.dtype == np.int8
        assert len(quantization.scale) == layer.kernel.shape[-1]
    assert Path(report.path).stat().st_size == report.figures[0].bytes


def test_another_weight_is_caught(tmp_path):
    report = export("digits", tmp_path)
    _, params, _ = MODELS["digits"]()
    alone = fc.verify_file(report.path, params, progress=False)
    assert alone.passed
    assert "rounded to int8" in str(alone)
    kernel = params["params"]["fc1"]["kernel"]
    params["params"]["fc1"]["kernel"] = kernel.at[3, 2].add(0.1)
    again = fc.verify_file(report.path, params, progress=False)
    assert len(again.failures) == 1
    assert "layer 'fc1': its weights are not the parameter's, rounded" in str(again)


def test_layers_with_and_without_a_bias(tmp_path):
    """The quantizer gives layers without one zeros of its own."""
    model, params, inputs = MODELS["lstm step"]()
    flat = [np.asarray(x) for x in jax.tree.leaves(inputs)]
    options = {"path": tmp_path / "m.tflite", "progress": False}
    report = fc.export(model, params, *inputs, calibrate=flat, **options)
    assert report.passed, report.failures
    assert fc.verify_file(report.path, params, progress=False).passed


def test_calibration_data_that_does_not_fit(tmp_path):
    with pytest.raises(
        ExportError, match=r"expected calibration data of shape \(N, 8, 6"
    ):
        export("digits", tmp_path, calibrate=[np.zeros((4, 8, 8, 1))])
    with pytest.raises(ExportError, match="for 1 inputs, got 0"):
        export("digits", tmp_path, calibrate=[])
    with pytest.raises(ExportError, match="at least 2 examples"):
        int8.batches([np.zeros((1, 3))], [(2, 3)])


def test_int8_is_litert_s(tmp_path):
    model, params, inputs = MODELS["mlp"]()
    with pytest.raises(ExportError, match=r"Expected a \.tflite path for an int8 file"):
        fc.export(
            *(model, params, *inputs),
            path=tmp_path / "m.onnx",
            calibrate=[np.zeros((4, 10))],
        )


def bias_of_another_layer(file, operator):
    its = file.array(file.linear_operators()[0].inputs[2])
    mine = file.array(operator.inputs[2])
    _put(file, operator.inputs[2], np.resize(its, mine.shape))


def no_bias(file, operator):
    operator.inputs = [*operator.inputs[:2], -1]


def weights_one_step_off(file, operator):
    kernel = file.array(operator.inputs[1]).copy()
    kernel.flat[5] += 1 if kernel.flat[5] < 0 else -1
    _put(file, operator.inputs[1], kernel)


def padding(file, operator):
    operator.builtinOptions.padding = 1  # VALID


def strides(file, operator):
    operator.builtinOptions.strideW = 2


def dilation(file, operator):
    operator.builtinOptions.dilationHFactor = 2


def zero_point(file, operator):
    quantization = file.graph.tensors[operator.inputs[1]].quantization
    quantization.zeroPoint = np.asarray(quantization.zeroPoint) + 1


def scale(file, operator):
    quantization = file.graph.tensors[operator.inputs[1]].quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(1.1)


def _put(file, index, array):
    buffer = file.model.buffers[file.graph.tensors[index].buffer]
    buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


@pytest.mark.parametrize(
    ("defect", "what"),
    [
        (bias_of_another_layer, "its bias is not the parameter's, rounded"),
        (no_bias, "its bias is not in the file"),
        (weights_one_step_off, "its weights are not the parameter's, rounded"),
        (padding, "on integers: expected shape"),
        (strides, "on integers: expected shape"),
        (dilation, "on integers: expected "),
        (zero_point, "the zero point of its weights is not 0"),
        (scale, "its weights are not the parameter's, rounded"),
    ],
)
def test_planted_defects(defect, what, tmp_path):
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile
    from fcconv_jax.export.runtimes.litert.schema import pack

    report = export("digits", tmp_path)
    file = LiteRTFile(Path(report.path))
    defect(file, file.linear_operators()[1])
    file.path.write_bytes(pack(file.model))
    _, params, _ = MODELS["digits"]()
    again = fc.verify_file(report.path, params, progress=False)
    assert any(f"layer 'conv2': {what}" in each for each in again.failures)


def test_what_verify_says_of_the_whole_file(tmp_path):
    report = export("digits", tmp_path)
    model, params, inputs = MODELS["digits"]()
    one = inputs[0][:1]
    again = fc.verify_file(report.path, params, one, model=model, progress=False)
    assert again.passed
    (note,) = (n for n in again.proof.notes if n.startswith("the whole file is "))
    assert 0 < float(note.split()[4]) < 0.2
