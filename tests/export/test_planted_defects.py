"""Defects planted in the shipped files: each is caught, and its layer named.

Every format is damaged in its own terms: a converter that is wrong would leave just
such a file.
"""

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.runtimes.litert.schema import pack
from fcconv_jax.messages.errors import ExportError

from .models import MODELS
from .test_files import RUNTIMES, SUFFIX, needs, write

LAYER, OTHER = "conv2", "conv1"


def row_swap(kernel):  # HWIO throughout
    kernel = kernel.copy()
    kernel[:, :, [0, 1]] = kernel[:, :, [1, 0]]
    return kernel


def flipped(kernel):
    return kernel[::-1, ::-1].copy()


def chw_as_hwc(kernel):
    h, w, i, o = kernel.shape
    return kernel.transpose(2, 0, 1, 3).reshape(h, w, i, o)


def one_ulp(kernel):
    kernel = kernel.copy()
    kernel[1, 0, 2, 3] = np.nextafter(kernel[1, 0, 2, 3], np.float32(9))
    return kernel


def halves(kernel):
    return kernel.astype(np.float16).astype(np.float32)


DEFECTS = {
    "row swap": row_swap,
    "flipped kernel": flipped,
    "CHW as HWC": chw_as_hwc,
    "an ulp": one_ulp,
    "float16": halves,
}


class LiteRT:
    def __init__(self, path):
        from fcconv_jax.export.runtimes.litert.reader import LiteRTFile

        self.path = path
        self.file = LiteRTFile(path)

    def operator(self, name):
        layers = [layer.name for layer in self.file.layers()]
        return self.file.linear_operators()[layers.index(name)]

    def kernel(self, name, change):
        index = self.operator(name).inputs[1]
        stored = self.file.array(index)
        changed = change(stored.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
        self.array(index, np.ascontiguousarray(changed))

    def array(self, index, array):
        tensor = self.file.graph.tensors[index]
        data = np.frombuffer(array.tobytes(), np.uint8)
        self.file.model.buffers[tensor.buffer].data = data

    def bias_of(self, name, other):
        operator = self.operator(name)
        mine, its = operator.inputs[2], self.operator(other).inputs[2]
        size = len(self.file.array(mine))
        self.array(mine, np.resize(self.file.array(its), size))

    def padding(self, name):
        self.operator(name).builtinOptions.padding = 1  # VALID

    def strides(self, name):
        options = self.operator(name).builtinOptions
        options.strideH, options.strideW = 1, 2

    def save(self):
        self.path.write_bytes(pack(self.file.model))


class Onnx:
    def __init__(self, path):
        import onnx

        self.onnx, self.path = onnx, path
        self.model = onnx.load(path)

    def node(self, name):
        return next(n for n in self.model.graph.node if n.name == f"{name}@")

    def change(self, name, change):
        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                array = change(self.onnx.numpy_helper.to_array(tensor))
                array = np.ascontiguousarray(array)
                tensor.CopyFrom(self.onnx.numpy_helper.from_array(array, name))

    def kernel(self, name, change):
        def in_place(stored):
            return change(stored.transpose(2, 3, 1, 0)).transpose(3, 2, 0, 1)

        self.change(self.node(name).input[1], in_place)

    def bias_of(self, name, other):
        its = self.node(other).input[2]
        arrays = {t.name: t for t in self.model.graph.initializer}
        array = self.onnx.numpy_helper.to_array(arrays[its])
        self.change(self.node(name).input[2], lambda mine: np.resize(array, mine.shape))

    def _attribute(self, name, key, value):
        for entry in self.node(name).attribute:
            if entry.name == key:
                entry.ints[:] = value

    def padding(self, name):
        self._attribute(name, "pads", [0, 0, 2, 2])

    def strides(self, name):
        self._attribute(name, "strides", [1, 2])

    def save(self):
        self.onnx.save(self.model, self.path)


class OpenVino:
    """Its weights lie in the .bin, its geometry in the .xml."""

    def __init__(self, path):
        from fcconv_jax.export.runtimes.openvino import OpenVinoFile

        self.path, self.bin = path, path.with_suffix(".bin")
        self.data, self.text = bytearray(self.bin.read_bytes()), path.read_text()
        self.layers = {x.name: x for x in OpenVinoFile(path).layers()}

    def _put(self, old, new):
        old, new = (np.ascontiguousarray(x).tobytes() for x in (old, new))
        at = self.data.find(old)
        assert at >= 0
        self.data[at : at + len(old)] = new

    def kernel(self, name, change):
        kernel = self.layers[name].kernel
        changed = change(np.ascontiguousarray(kernel))
        self._put(kernel.transpose(3, 2, 0, 1), changed.transpose(3, 2, 0, 1))

    def bias_of(self, name, other):
        mine, its = (self.layers[x].bias for x in (name, other))
        self._put(mine, np.resize(its, mine.shape))

    def _geometry(self, name, before, after):
        start = self.text.index(f'name="{name}@/WithoutBiases"')
        end = self.text.index("</layer>", start)
        part = self.text[start:end]
        assert before in part
        self.text = self.text[:start] + part.replace(before, after) + self.text[end:]

    def padding(self, name):
        self._geometry(name, 'pads_begin="1, 1"', 'pads_begin="0, 0"')
        self._geometry(name, 'pads_end="1, 1"', 'pads_end="2, 2"')

    def strides(self, name):
        self._geometry(name, 'strides="1, 1"', 'strides="1, 2"')

    def save(self):
        self.path.write_text(self.text)
        self.bin.write_bytes(self.data)


EDITORS = {"litert": LiteRT, "onnx": Onnx, "openvino": OpenVino}


@pytest.fixture(scope="module", params=RUNTIMES)
def shipped(request, tmp_path_factory):
    needs(request.param)
    folder = tmp_path_factory.mktemp("shipped")
    report = write("digits", request.param, folder, "conv")
    assert report.passed
    return request.param, folder / f"model.{SUFFIX[request.param]}"


@pytest.fixture
def editor(shipped, tmp_path):
    to, path = shipped
    for file in path.parent.glob("model.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return EDITORS[to](tmp_path / path.name)


def failures(editor):
    editor.save()
    _, params, _ = MODELS["digits"]()
    report = fc.verify_file(editor.path, params, progress=False)
    assert not report.passed
    return report.failures


def test_untouched_it_passes(editor):
    editor.save()
    _, params, _ = MODELS["digits"]()
    assert fc.verify_file(editor.path, params, progress=False).passed


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_kernel(defect, editor):
    editor.kernel(LAYER, DEFECTS[defect])
    found = failures(editor)
    assert len(found) == 1
    assert f"layer '{LAYER}': its kernel has other bits: expected" in found[0]


def test_a_bias_of_another_layer(editor):
    editor.bias_of(LAYER, OTHER)
    found = failures(editor)
    assert len(found) == 1
    assert f"layer '{LAYER}': its bias has other bits" in found[0]


@pytest.mark.parametrize("defect", ["padding", "strides"])
def test_the_geometry(defect, editor):
    getattr(editor, defect)(LAYER)
    if defect == "strides" and isinstance(editor, OpenVino):
        # Another shape than the next layer takes: the runtime itself refuses it.
        with pytest.raises(ExportError, match="is not an OpenVINO file"):
            failures(editor)
        return
    found = failures(editor)
    assert any(f"layer '{LAYER}': " in each and "expected" in each for each in found)


def test_other_parameters(shipped, tmp_path):
    """A parameter of no linear layer, such as a norm's scale, is compared as well."""
    to, _ = shipped
    report = write("patches", to, tmp_path, "conv")
    _, params, _ = MODELS["patches"]()
    scale = params["params"]["LayerNorm_0"]["scale"]
    params["params"]["LayerNorm_0"]["scale"] = np.nextafter(scale, np.float32(9))
    again = fc.verify_file(report.path, params, progress=False)
    assert again.failures == (
        "parameter 'params/LayerNorm_0/scale' is in no constant of the file bit by bit",
    )
