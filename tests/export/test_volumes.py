"""Convolutions and pools of three dimensions, in every runtime."""

import flax.linen as nn
import pytest

import fcconv_jax as fc

from .models import _made, normal
from .test_files import SUFFIX, needs


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 2, 3), (1, 2, 1))(x))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(5, (2, 3, 3))(x))
        x = nn.max_pool(x, (2, 2, 2), (2, 2, 2))
        x = nn.Conv(4, (3, 3, 3), kernel_dilation=(1, 1, 2), padding=2)(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("form", ["conv", "dense"])
@pytest.mark.parametrize("to", ["litert", "onnx", "openvino"])
def test_a_network_of_volumes(to, form, tmp_path):
    needs(to)
    model, params, inputs = _made(Net(), normal(1, 6, 8, 4, 3))
    path = tmp_path / f"net.{SUFFIX[to]}"
    report = fc.export(model, params, *inputs, path=path, to=form, progress=False)
    assert report.passed, report.failures
    exact = {proof.name: proof.exact for proof in report.proof.layers}
    assert exact == dict.fromkeys(["Conv_0", "Conv_1", "Conv_2", "Dense_0"], True)
