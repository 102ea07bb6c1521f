"""Networks over signals: an image of one row from the first convolution to the last."""

import flax.linen as nn
import pytest

import fcconv_jax as fc

from .models import _made, normal
from .test_files import SUFFIX, needs


class Causal(nn.Module):
    """Two gated layers whose padded input is read twice, and a sum of skips."""

    @nn.compact
    def __call__(self, x):
        x, skips = nn.Conv(6, (1,))(x), []
        for dilation in (1, 3):
            options = {"kernel_dilation": (dilation,), "padding": "CAUSAL"}
            a, b = (nn.Conv(5, (2,), **options)(x) for _ in range(2))
            y = nn.Conv(6, (1,))(nn.tanh(a) * nn.sigmoid(b))
            skips.append(y)
            x = x + y
        return nn.Conv(4, (1,))(nn.relu(sum(skips)))


@pytest.mark.parametrize("to", ["litert", "onnx", "openvino"])
def test_pads_and_sums_between_convolutions(to, tmp_path):
    needs(to)
    model, params, (x,) = _made(Causal(), normal(2, 9, 3))
    path = tmp_path / f"net.{SUFFIX[to]}"
    report = fc.export(model, params, x, path=path, progress=False)
    assert report.passed, report.failures
    assert report.figures[0].reshapes == 2  # of the input and of the output
    assert report.figures[0].transposes == 2 * (to != "litert")  # and there again
    if to != "openvino":  # it adds biases apart
        sums = {k.lower(): n for k, n in report.figures[0].ops.items()}["add"]
        assert sums == 2  # of a skip and of the last two, none with the zero of sum
