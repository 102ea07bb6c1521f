"""What lies between a file's layers: a change of it is found without the model."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.fingerprint import BLANK, seal
from fcconv_jax.export.record import FileRecord
from fcconv_jax.export.runtimes import runtimes
from fcconv_jax.messages.errors import ExportError

from .models import MODELS, normal
from .test_files import needs, write
from .test_planted_defects import Onnx

CHANGED = "the file has been changed since it was proved"


def check(report, changed=True, name="vgg head"):
    _, params, _ = MODELS[name]()
    found = fc.verify_file(report.path, params, progress=False)
    if not changed:
        assert found.passed, found.failures
        return
    (failure,) = found.failures
    assert failure.startswith(CHANGED)


def litert(path):
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

    return LiteRTFile(Path(path))


def save(file):
    from fcconv_jax.export.runtimes.litert.schema import pack

    file.path.write_bytes(pack(file.model))


@pytest.mark.parametrize("form", ["conv", "dense"])
def test_an_activation_of_litert(form, tmp_path):
    needs("litert")
    report = write("digits", "litert", tmp_path, form)
    check(report, False, "digits")
    file = litert(report.path)
    first = file.linear_operators()[0].builtinOptions
    assert first.fusedActivationFunction == 1  # RELU
    first.fusedActivationFunction = 3  # RELU6
    save(file)
    check(report, True, "digits")


def test_two_layers_of_litert_in_each_others_place(tmp_path):
    needs("litert")
    params, x = {"a": normal(6, 6), "b": normal(6, 6, seed=2)}, normal(2, 6)

    def model(params, x):
        return (x @ params["a"]) ** 2 @ params["b"]

    path = tmp_path / "m.tflite"
    report = fc.export(model, params, x, path=path, progress=False)
    file = litert(path)
    a, b = file.linear_operators()
    labels = [file.graph.tensors[op.outputs[0]].name for op in (a, b)]
    a.inputs, b.inputs = (
        [mine.inputs[0], *list(its.inputs)[1:]] for mine, its in ((a, b), (b, a))
    )
    for op, label in zip((b, a), labels):
        file.graph.tensors[op.outputs[0]].name = label
    save(file)
    found = fc.verify_file(report.path, params, progress=False)
    assert all(layer.passed for layer in found.layers)
    assert found.failures[0].startswith(CHANGED)


def test_an_activation_of_onnx(tmp_path):
    needs("onnx")
    report = write("digits", "onnx", tmp_path, "conv")
    check(report, False, "digits")
    editor = Onnx(Path(report.path))
    next(n for n in editor.model.graph.node if n.op_type == "Relu").op_type = "Sigmoid"
    editor.save()
    check(report, True, "digits")


@pytest.mark.parametrize("what", ["kernel", "fingerprint", "digests"])
def test_the_record_of_onnx(what, tmp_path):
    """Without a layer's parameter in it, the layer's weights would go unchecked."""
    needs("onnx")
    report = write("digits", "onnx", tmp_path, "conv")
    assert report.headline.endswith(
        f"compared: {len(report.layers)} weights, {len(report.layers)} layers on "
        "integers, 1 outputs"
    )
    editor = Onnx(Path(report.path))
    (entry,) = editor.model.metadata_props
    record = FileRecord.from_text(entry.value)
    if what == "kernel":
        first = dataclasses.replace(record.layers[0], kernel=None)
        changes: dict[str, Any] = {"layers": (first, *record.layers[1:])}
    elif what == "fingerprint":
        changes = {"fingerprint": None}
    else:
        changes = {"digests": (("params/fc1/bias", "0"),)}
        editor.model.doc_string = "changed"
    entry.value = dataclasses.replace(record, **changes).to_text()
    editor.save()
    _, params, _ = MODELS["digits"]()
    found = fc.verify_file(report.path, params, progress=False)
    assert not found.passed
    if what != "digests":
        check(report, True, "digits")


def test_an_activation_of_openvino(tmp_path):
    needs("openvino")
    report = write("digits", "openvino", tmp_path, "conv")
    path = Path(report.path)
    path.write_text(path.read_text().replace('type="ReLU"', 'type="Sigmoid"', 1))
    check(report, True, "digits")


def test_a_pool_of_coreml(tmp_path):
    ct = pytest.importorskip("coremltools", reason="needs: pip install -e '.[coreml]'")
    model, params, inputs = MODELS["digits"]()
    path = tmp_path / "m.mlpackage"
    report = fc.export(model, params, *inputs, path=path, progress=False)
    check(report, False, "digits")
    (file,) = path.rglob("*.mlmodel")
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    next(op for op in block.operations if op.type == "relu").type = "sigmoid"
    file.write_bytes(spec.SerializeToString())
    check(report, True, "digits")


@pytest.mark.parametrize("to", ["iree", "stablehlo"])
def test_another_program(to, tmp_path):
    needs(to)
    suffix = runtimes()[to].suffix
    params, x = {"w": normal(6, 6)}, normal(2, 6)
    options = {"progress": False}
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "other")]

    def one(params, x):
        return x @ params["w"]

    def other(params, x):
        return 2 * x @ params["w"]

    for model, path in zip((one, other), paths):
        fc.export(model, params, x, path=path, **options)
        assert fc.verify_file(path, params, progress=False).passed
    first, second = (path.read_bytes() for path in paths)
    if to == "stablehlo":  # its record stands behind the program
        sizes = [int.from_bytes(c[-25:-17], "little") + 25 for c in (first, second)]
        assert json.loads(first[-sizes[0] : -25])
        second = second[: -sizes[1]] + first[-sizes[0] :]
    paths[0].write_bytes(second)
    if to == "stablehlo":  # not read any further: MLIR crashes on some damage
        with pytest.raises(ExportError, match=rf"one\.stablehlo: {CHANGED}"):
            fc.verify_file(paths[0], params, progress=False)
        return
    found = fc.verify_file(paths[0], params, progress=False)
    assert found.failures[0].startswith(CHANGED)


@pytest.mark.parametrize("what", ["zero point", "scale"])
def test_the_steps_of_an_int8_activation(what, tmp_path):
    pytest.importorskip("litert_quantizer", reason="needs: pip install -e '.[litert]'")
    model, params, inputs = MODELS["digits"]()
    path = tmp_path / "m.tflite"
    options = {"path": path, "progress": False}
    data = [np.asarray(normal(24, 8, 6, 1, seed=5))]
    report = fc.export(model, params, inputs[0][:1], calibrate=data, **options)
    check(report, False, "digits")
    file = litert(path)
    # The last layer's: a pool would refuse other steps than its input's on loading.
    made = file.graph.tensors[file.linear_operators()[-1].outputs[0]].quantization
    if what == "zero point":
        made.zeroPoint = np.asarray(made.zeroPoint) + 1
    else:
        made.scale = np.asarray(made.scale) * np.float32(1.5)
    save(file)
    check(report, True, "digits")


@pytest.mark.parametrize("to", runtimes())
def test_every_byte_counts(to, tmp_path):
    """Names, paddings and the manifest of a package, which no reader shows, too."""
    needs(to)
    params = {"w": normal(6, 6)}
    path = tmp_path / f"m{runtimes()[to].suffix}"
    options = {"path": path, "progress": False}
    fc.export(lambda p, x: x @ p["w"], params, normal(2, 6), **options)
    for file in [each for each in tmp_path.rglob("*") if each.is_file()]:
        content = file.read_bytes()
        for at in range(0, len(content), 1 + len(content) // 25):
            changed = bytearray(content)
            changed[at] ^= 1
            file.write_bytes(changed)
            try:
                passed = fc.verify_file(path, params, progress=False).passed
            except ExportError:
                continue
            assert not passed, (file.name, at)
        file.write_bytes(content + b"\n")
        if file.name == "Manifest.json":  # which coremltools would write anew
            assert not fc.verify_file(path, params, progress=False).passed
            assert file.read_bytes() == content + b"\n"
        file.write_bytes(content)
    assert fc.verify_file(path, params, progress=False).passed
    moved = path.rename(tmp_path / f"other{path.suffix}")
    for each in tmp_path.glob("m.*"):
        each.rename(moved.with_suffix(each.suffix))
    assert fc.verify_file(moved, params, progress=False).passed


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("to", [name for name in runtimes() if name != "coreml"])
def test_half_a_file(to, part, tmp_path):
    """A file that is cut short is named, whatever its format's reader makes of it."""
    needs(to)
    suffix = runtimes()[to].suffix
    damaged = runtimes()[to].beside or suffix
    path = tmp_path / f"m{suffix}"
    params = {"w": normal(6, 6)}
    options = {"path": path, "progress": False}
    fc.export(lambda p, x: x @ p["w"], params, normal(2, 6), **options)
    file = path.with_suffix(damaged)
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ExportError, match=rf"m({suffix}|{damaged})"):
        fc.verify_file(path, params, progress=False)


def test_a_record_that_no_one_finds_in_the_file_is_refused(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(zlib.compress(f"net {BLANK}".encode()))
    with pytest.raises(ExportError, match=r"m\.onnx, uncompressed, got a file without"):
        seal(file)
