"""int8 LiteRT files: per channel, the same bits in both forms, the weights rounded."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export import arguments
from fcconv_jax.export.int8 import batches
from fcconv_jax.export.integers import Int8Layer, _on_integers
from fcconv_jax.export.layers import Layer, compute
from fcconv_jax.export.runtimes import runtime_of
from fcconv_jax.export.runtimes.onnx import OnnxFile
from fcconv_jax.messages.errors import ExportError

from .models import MODELS, normal

pytest.importorskip("litert_quantizer", reason="needs: pip install -e '.[litert]'")


def export(name, folder, form="conv", **options):
    model, params, inputs = MODELS[name]()
    inputs = tuple(x[:1] for x in inputs)
    shape = inputs[0].shape[1:]
    data = [np.asarray(normal(24, *shape, seed=5))]
    options = {"calibrate": data, "to": form, "progress": False, **options}
    options = {"path": folder / f"{form}.tflite", **options}
    return fc.export(model, params, *inputs, **options)


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
        ExportError, match=r"Expected calibration data of shape \(N, 8, 6"
    ):
        export("digits", tmp_path, calibrate=[np.zeros((4, 8, 8, 1))])
    with pytest.raises(ExportError, match="for 1 inputs, got 0"):
        export("digits", tmp_path, calibrate=[])
    with pytest.raises(ExportError, match="at least 2 examples"):
        batches([np.zeros((1, 3))], [np.zeros((2, 3))])
    for given, wanted in ((np.uint8, np.float32), (np.float32, np.int32)):
        with pytest.raises(ExportError, match=f"of {np.dtype(wanted)}, like the input"):
            batches([np.zeros((4, 3), given)], [np.zeros((2, 3), wanted)])


def test_runtimes_without_int8(tmp_path):
    model, params, inputs = MODELS["mlp"]()
    with pytest.raises(ExportError, match=r"Expected a \.tflite or \.onnx path for an"):
        fc.export(
            *(model, params, *inputs),
            path=tmp_path / "m.xml",
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


def bias_scale(file, operator):
    quantization = file.graph.tensors[operator.inputs[2]].quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(2)
    _put(file, operator.inputs[2], file.array(operator.inputs[2]) // 2)


def input_scale(file, operator):
    quantization = file.graph.tensors[operator.inputs[0]].quantization
    quantization.scale = np.asarray(quantization.scale) * np.float32(1.1)


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
        (bias_scale, "the scale of its bias is not that of input times weights"),
        (input_scale, "the scale of its bias is not that of input times weights"),
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


def test_each_layer_equals_integer_arithmetic(tmp_path):
    """Depthwise ones, too, of several channels, in the operators that the file has."""
    report = export("mobile", tmp_path)
    kinds = {layer.op for layer in report.layers}
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"} >= kinds
    for layer in report.layers:
        found = layer.int8
        assert layer.exact
        assert (found.off, found.largest) == (0, 0)
        assert found.entries > 0
        assert found.rounding == "float32 scale"
    assert "entries" in str(report)


def test_an_entry_that_is_one_step_off_is_counted(tmp_path, monkeypatch):
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

    report = export("digits", tmp_path)
    _, params, _ = MODELS["digits"]()
    own = LiteRTFile._int8_layer

    def read(file, shipped, operator, layer):
        def run(x):
            y = mine.run(x).copy()
            y.flat[3] += 1 if y.flat[3] < 0 else -1
            return y

        mine = own(file, shipped, operator, layer)
        return dataclasses.replace(mine, run=run) if layer.name == "fc1" else mine

    monkeypatch.setattr(LiteRTFile, "_int8_layer", read)
    again = fc.verify_file(report.path, params, progress=False)
    (layer,) = (x for x in again.layers if not x.passed)
    # In each of the two draws.
    assert layer.name == "fc1"
    assert (layer.int8.off, layer.int8.largest) == (2, 1)


def test_a_step_is_allowed_next_to_a_half_alone():
    """Where a runtime may compute in float32; elsewhere no entry may be off."""
    layer = Layer("fc", "dense", None, (4, 3), None, False, (1, 4), (1, 3), ())
    kernel = np.random.default_rng(3).integers(-127, 127, (4, 3)).astype(np.int8)

    def run(x, move=0.0):
        sums = compute(layer, x.astype(np.int64) - 2, kernel, None) * scale
        return np.clip(np.rint(sums + move) + 3, -128, 127).astype(np.int8)

    scale = 0.01 * 0.02 / 0.05
    known = {"kernel": kernel, "bias": None, "zero": 0, "bias_scales": None}
    known |= {"op": "Gemm", "form": "dense", "entering": (0.01, 2)}
    known |= {"scales": np.full(3, 0.02), "leaving": (0.05, 3), "dequantized": True}
    for move, off in ((0.0, False), (1e-9, False), (0.2, True), (1.0, True)):
        mine = Int8Layer(run=lambda x, move=move: run(x, move), **known)
        _, failures = _on_integers(layer, mine)
        assert bool(failures) is off


def test_the_kernels_without_xnnpack_round_by_fixed_point(tmp_path):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from fcconv_jax.export.integers import by_fixed_point
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

    file = LiteRTFile(Path(export("vgg head", tmp_path).path))
    layer, operator = file.record().layers[0], file.linear_operators()[0]
    mine = file.int8_layers()[layer.name](layer)
    runner = Interpreter(
        model_content=file._cut(*file._chain(operator, layer)),
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
    )
    runner.allocate_tensors()
    (place,), (out,) = runner.get_input_details(), runner.get_output_details()
    rng = np.random.default_rng(1)
    for _ in range(20):
        x = rng.integers(-40, 40, place["shape"]).astype(np.int8)
        runner.set_tensor(place["index"], x)
        runner.invoke()
        shifted = x.astype(np.int64) - mine.entering[1]
        sums = compute(layer, shifted, mine.kernel, mine.bias)
        want = mine.clip(by_fixed_point(sums, *mine.steps))
        np.testing.assert_array_equal(runner.get_tensor(out["index"]), want)


def test_accuracy_on_labels(tmp_path):
    model, params, (x,) = MODELS["digits"]()
    data = np.asarray(normal(24, *x.shape[1:], seed=5))
    labels = np.asarray(model.apply(params, data)).argmax(-1)
    labels[:6] = (labels[:6] + 1) % 10
    report = export("digits", tmp_path, calibrate=[data], labels=labels)
    assert "of 24 labels, 75.0 % in float32" in report.int8["accuracy"]
    with pytest.raises(ExportError, match="Expected labels= as 24 integers"):
        export("digits", tmp_path, calibrate=[data], labels=labels[:5])
    with pytest.raises(ExportError, match="examples, with labels=, got none"):
        export("digits", tmp_path, calibrate=None, labels=labels)
    with pytest.raises(ExportError, match=r"Expected labels= of shape \(N\)"):
        export("digits", tmp_path, calibrate=[data], labels=labels[:, None])


def test_activations_that_are_always_zero(tmp_path):
    """Their range is empty, and XNNPACK would refuse the quantizer's scale for it."""
    model, params, (x,) = MODELS["digits"]()
    params["params"]["conv1"]["bias"] -= 100
    data = np.asarray(normal(24, *x.shape[1:], seed=5))
    report = fc.export(
        *(model, params, x[:1]),
        path=tmp_path / "m.tflite",
        calibrate=[data],
        progress=False,
    )
    assert report.passed, report.failures
    assert all(layer.exact for layer in report.layers)


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_loops_are_to_be_written_out(suffix, tmp_path):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime", reason="needs: pip install -e '.[onnx]'")
    model, x = nn.RNN(nn.SimpleCell(3)), normal(1, 3, 4)
    params = model.init(jax.random.key(0), x)
    given = {"path": tmp_path / f"m.{suffix}", "progress": False}
    given["calibrate"] = [np.asarray(normal(4, 3, 4))]
    with pytest.raises(
        ExportError, match="Expected no loop or branch for an int8 file"
    ):
        fc.export(model, params, x, **given)
    report = fc.export(model, params, x, unroll=3, **given)
    assert report.passed, report.failures
    assert len(report.layers) > 3


def test_ranges_are_those_of_all_examples(tmp_path):
    """The quantizer's moving average would cut off the one large example."""
    _, _, (x,) = MODELS["digits"]()
    data = np.array(normal(24, *x.shape[1:], seed=5))
    data[3] *= 20
    seen = []
    export(
        *("digits", tmp_path),
        calibrate=[data],
        progress=lambda *args: seen.append(args),
    )
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

    file = LiteRTFile(tmp_path / "conv.tflite")
    (scale,), zero = file.scales(file.graph.inputs[0])
    assert scale * (127 - zero) > 0.99 * data.max()
    assert scale * (-128 - zero) < 0.99 * data.min()
    assert ("int8: calibration", 3, 24) in seen


@pytest.fixture
def qdq(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs: pip install -e '.[onnx]'")

    def export_onnx(name, form):
        return export(name, tmp_path, form, path=tmp_path / f"{form}.onnx")

    return export_onnx


@pytest.mark.parametrize(
    ("name", "form"), [("mobile", "conv"), ("digits", "dense"), ("vit block", "dense")]
)
def test_onnx_with_a_scale_for_each_feature(name, form, qdq):
    report = qdq(name, form)
    assert report.passed, report.failures
    for layer in report.layers:
        # Which layers are fused, and are exact then, depends on the processor.
        assert layer.exact
        assert layer.int8.largest <= 1
        assert layer.int8.entries > 0
    difference = float(report.int8["difference from float32"].split()[0])
    assert 0 < difference < 0.1
    file = OnnxFile(Path(report.path))
    assert file.ops()["DequantizeLinear"] > file.ops()["QuantizeLinear"] > 0
    for name, read in file.int8_layers().items():
        (layer,) = (x for x in file.record().layers if x.name == name)
        assert read(layer).scales.shape == layer.kernel_shape[-1:]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("params/fc1/kernel_quantized", "its weights are not the parameter's, rounded"),
        ("params/fc1/kernel_scale", "its weights are not the parameter's, rounded"),
        ("params/fc1/bias_quantized", "its bias is not the parameter's, rounded"),
        ("params/fc1/bias_quantized_scale", "the scale of its bias is not that of"),
    ],
)
def test_planted_defects_in_onnx(changed, what, qdq):
    import onnx

    report = qdq("digits", "dense")
    path, (_, params, _) = Path(report.path), MODELS["digits"]()
    assert fc.verify_file(path, params, progress=False).passed
    model = onnx.load_model_from_string(path.read_bytes())
    (tensor,) = (x for x in model.graph.initializer if x.name == changed)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[3] = array.flat[3] * 1.1 if array.dtype.kind == "f" else 127
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, changed))
    path.write_bytes(model.SerializeToString())
    again = fc.verify_file(path, params, progress=False)
    assert again.failures
    assert all("layer 'fc1'" in each for each in again.failures)
    assert any(what in each for each in again.failures)


def test_what_verify_says_of_the_whole_file(tmp_path):
    report = export("digits", tmp_path)
    model, params, inputs = MODELS["digits"]()
    one = inputs[0][:1]
    again = fc.verify_file(report.path, params, one, model=model, progress=False)
    assert again.passed
    (note,) = (n for n in again.proof.notes if " from float64, root mean" in n)
    assert 0 < float(note.split()[3]) < 0.2


def test_a_file_that_is_far_off_fails(tmp_path):
    """One example in 24 is so large that the range of all has no steps for the rest."""
    model, params, (x,) = MODELS["digits"]()
    data = np.array(normal(24, *x.shape[1:], seed=5))
    data[3] *= 1e4
    report = export("digits", tmp_path, calibrate=[data])
    given = {"model": model, "progress": False}
    large = fc.verify_file(report.path, params, data[3:4], **given)
    assert large.passed, large.failures
    again = fc.verify_file(report.path, params, x[:1], **given)
    (why,) = again.failures
    assert "allowed, half of its standard deviation. Calibrate on" in why


def test_a_network_that_int8_cannot_hold_is_not_written(tmp_path):
    """Two features that cancel, each a hundred times what is left of them."""

    def model(params, x):
        return (x @ params["w"] + 100) @ params["v"]

    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(6, 8)), rng.normal(size=(8, 3))
    v[4:] = -v[:4]
    w[:, 4:] = 0.99 * w[:, :4]
    params = {"w": np.float32(w), "v": np.float32(v)}
    path = tmp_path / "m.tflite"
    path.write_text("the one before")
    data = np.asarray(normal(24, 6, seed=5))
    report = fc.export(
        *(model, params, data[:1]), path=path, calibrate=[data], progress=False
    )
    (why,) = report.failures
    assert why.startswith("int8: 'output' is ")
    assert path.read_text() == "the one before"


def test_a_shared_layer_in_onnx(tmp_path):
    """ONNX Runtime fails to load shared int8 weights."""
    pytest.importorskip("onnxruntime")

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(4, (3, 3), name="shared")
            for _ in range(3):
                x = x + nn.relu(layer(x))
            return x.mean((1, 2))

    x = normal(1, 6, 5, 4, seed=3)
    params = Shared().init(jax.random.key(0), x)
    options = {"calibrate": [np.asarray(normal(8, 6, 5, 4))], "progress": False}
    report = fc.export(Shared(), params, x, path=tmp_path / "m.onnx", **options)
    assert report.passed, report.failures


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_the_int8_file_is_opened_once(suffix, tmp_path, monkeypatch):
    target = runtime_of(tmp_path / f"m{suffix}")
    opened = []

    def read(path):
        file = target.open(path)
        if file.layers()[0].kernel.dtype == np.int8:
            opened.append(path)
        return file

    changed = dataclasses.replace(target, open=read)
    monkeypatch.setattr(arguments, "runtime_of", lambda *_: changed)
    report = export("mlp", tmp_path, path=tmp_path / f"m{suffix}")
    assert report.passed, report.failures
    assert len(opened) == 1
    known = fc.verify_file(report.path, MODELS["mlp"]()[1], progress=False)
    assert known.passed, known.failures
