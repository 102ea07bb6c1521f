"""Transposed convolutions in each runtime: the model's numbers and the params' bits."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcconv_jax.export.export import export
from fcconv_jax.export.verify_file import verify_file

from .models import normal
from .test_files import RUNTIMES, SUFFIX, needs

X = normal(2, 3, 4, 6)


def decoder(params, x):
    """Windows side by side, then overlapping ones in groups, then a 1x1."""
    x = lax.conv_transpose(x, params["apart"], (2, 3), "SAME")
    x = lax.conv_general_dilated(
        *(jnp.maximum(x, 0), params["over"], (1, 1), [(2, 2), (1, 3)]),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return lax.conv_transpose(x, params["point"], (1, 1), "VALID")


@pytest.mark.parametrize("to", RUNTIMES)
def test_a_decoder(to, tmp_path):
    needs(to)
    params = {
        "apart": normal(2, 3, 6, 4),
        "over": normal(4, 3, 2, 8),
        "point": normal(1, 1, 8, 5),
    }
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = export(decoder, params, X, path=path, progress=False)
    assert report.passed, report.failures
    # Each convolution's kernel is the parameter's own entries.
    assert all(layer.bits for layer in report.layers)
    assert len(report.layers) == 1 + 4 + 1


@pytest.mark.parametrize("to", RUNTIMES)
def test_several_with_biases(to, tmp_path):
    """OpenVINO names the sum with the bias after such a layer, not the layer."""
    needs(to)

    def up(params, x):
        for number in "12":
            x = lax.conv_transpose(x, params[f"w{number}"], (2, 2), "VALID")
            x = jnp.maximum(x + params[f"b{number}"], 0)
        return jnp.tanh(x)

    params = {"w1": normal(2, 2, 6, 4), "b1": normal(4), "w2": normal(2, 2, 4, 3)}
    params["b2"] = normal(3, seed=2)
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = export(up, params, X, path=path, progress=False)
    assert report.passed, report.failures
    assert [(x.name, x.bits, x.exact) for x in report.layers] == [
        ("w1", True, True),
        ("w2", True, True),
    ]


def test_one_dimension(tmp_path):
    needs("onnx")

    def up(params, x):
        return lax.conv_transpose(
            x, params["w"], (3,), "VALID", dimension_numbers=("NCW", "WIO", "NCW")
        )

    x = np.swapaxes(normal(2, 7, 3), 1, 2)
    path = tmp_path / "m.onnx"
    report = export(up, {"w": normal(5, 3, 2)}, x, path=path, progress=False)
    assert report.passed, report.failures


# JAX's padding of the spread input; the last two lack the operation in every runtime.
GEOMETRY = {
    "same": ((3, 3), (2, 2), "SAME", 1),
    "same, not overlapping": ((2, 3), (2, 3), "SAME", 1),
    "whole": ((4, 3), (2, 2), "VALID", 1),
    "cut, as in PyTorch": ((3, 4), (2, 2), [(1, 2), (2, 2)], 2),
    "output padding": ((2, 2), (3, 2), "SAME", 4),
    "padded": ((3, 3), (2, 2), [(3, 2), (2, 2)], 4),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("to", RUNTIMES)
def test_one_operation(name, to, tmp_path):
    needs(to)
    window, strides, padding, most = GEOMETRY[name]

    def up(params, x):
        return lax.conv_transpose(x, params["w"], strides, padding) + params["b"]

    params = {"w": normal(*window, 6, 5), "b": normal(5, seed=2)}
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = export(up, params, X, path=path, progress=False)
    assert report.passed, report.failures
    ops = Counter(report.figures[0].ops) - Counter(["Transpose", "Transpose"])
    if to in ("litert", "onnx"):
        one = {"TRANSPOSE_CONV", "ConvTranspose"} & set(ops)
        assert len(one) == (most < 4), ops
        assert not one or ops.total() <= most, ops


def test_any_batch_needs_plain_convolutions(tmp_path):
    """LiteRT's own operation holds the size of its output."""
    needs("litert")

    def up(params, x):
        return lax.conv_transpose(x, params["w"], (2, 2), "SAME")

    path, params = tmp_path / "m.tflite", {"w": normal(3, 3, 6, 5)}
    report = export(up, params, X, path=path, any_batch=True, progress=False)
    assert report.passed, report.failures


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("to", RUNTIMES)
def test_a_skip_beside_a_dense_transposed_layer(batch, to, tmp_path):
    """Its bias, repeated for the pixels of a window, is part of the layer."""
    needs(to)

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            skip = nn.Conv(5, (3, 3), name="skip")(x)
            x = nn.Conv(6, (3, 3), (2, 2), name="down")(skip)
            x = nn.ConvTranspose(3, (2, 2), (2, 2), padding="VALID", name="up")(x)
            return nn.Conv(4, (3, 3), name="last")(jnp.concatenate([skip, x], -1))

    x = normal(batch, 6, 4, 2)
    params = Up().init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape, seed=3), params)
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = export(Up(), params, x, path=path, to="dense", progress=False)
    assert report.passed, report.failures
    (layer,) = (each for each in report.layers if each.name == "up")
    assert layer.form == "dense"
    assert layer.bits
    if to == "openvino":
        return
    ops = report.figures[0].ops
    assert ops.get("ADD", 0) == 0
    if to == "onnx":
        assert ops["DepthToSpace"] == 1
        assert ops["Transpose"] == 2  # of the input and the output
        assert ops.get("Add", 0) == (batch > 1)  # the bias of a MatMul
    wrong = jax.tree.map(lambda p: p, params)
    wrong["params"]["up"]["bias"] = wrong["params"]["up"]["bias"][::-1]
    assert verify_file(path, params, progress=False).passed
    assert not verify_file(path, wrong, progress=False).passed
