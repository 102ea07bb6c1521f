"""Transposed convolutions in each runtime: the model's numbers and the params' bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcconv_jax.export.export import export

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
