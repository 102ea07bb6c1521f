"""Files for any batch size: run with sizes that the model was not exported with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.runtimes import runtimes

from .models import _made, normal
from .test_files import SUFFIX, needs


class Net(nn.Module):
    """Moves, a resize, a full window, a broadcast and a head, all behind a batch."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), (2, 1))(x))
        x = jax.image.resize(x, (x.shape[0], 7, 8, 6), "bilinear")
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(6)(x))[:, 1:]
        return nn.softmax(nn.Dense(4)(x.reshape(-1, 5)))


@pytest.fixture(params=["litert", "onnx", "openvino"])
def to(request):
    needs(request.param)
    return request.param


@pytest.mark.parametrize("form", ["conv", "dense"])
def test_other_sizes(form, to, tmp_path):
    model, params, (x,) = _made(Net(), normal(1, 6, 6, 3))
    path = tmp_path / f"net.{SUFFIX[to]}"
    options = {"path": path, "to": form, "any_batch": True, "progress": False}
    report = fc.export(model, params, x, **options)
    assert report.passed, report.failures
    assert "for any batch size; run with (1, 3, 5)" in str(report)
    assert {e.path for e in report.proof.outputs} > {"output, batch size 5"}
    assert fc.verify_file(path, params, x, model=model, progress=False).passed
    other = normal(4, 6, 6, 3)
    again = fc.verify_file(path, params, other, model=model, progress=False)
    assert again.passed, again.failures


def test_what_depends_on_the_size(to, tmp_path):
    path = tmp_path / f"net.{SUFFIX[to]}"
    options = {"path": path, "any_batch": True, "progress": False}
    with pytest.raises(fc.ExportError, match="depends on the size"):
        fc.export(
            *(lambda p, x: jnp.tanh(x) @ p["w"] / x.shape[0], {"w": normal(4, 3)}),
            *(normal(2, 4),),
            **options,
        )


class Tokens(nn.Module):
    """A token in front of each example, and attention over all."""

    @nn.compact
    def __call__(self, x):
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 6))
        first = jnp.tile(token, (x.shape[0], 1, 1))
        x = jnp.concatenate([first, nn.Dense(6)(x)], 1)
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(2)(x, x)[:, 0])


def test_rows_that_each_example_gets(to, tmp_path):
    model, params, (x,) = _made(Tokens(), normal(1, 5, 4))
    path = tmp_path / f"net.{SUFFIX[to]}"
    options = {"path": path, "any_batch": True, "progress": False}
    report = fc.export(model, params, x, **options)
    assert report.passed, report.failures
    # Neither NaN nor infinities of an example reach the rows.
    other = normal(3, 5, 4).at[0, 0, 0].set(jnp.nan).at[1, 0, 0].set(jnp.inf)
    file = runtimes()[to].open(path)
    (found,) = file.run([np.asarray(other)])
    want = np.asarray(model.apply(params, other))
    np.testing.assert_allclose(found[2], want[2], rtol=1e-4)
    assert np.isnan(found[:2]).all()


def test_stablehlo_that_takes_one_size_only(tmp_path):
    pytest.importorskip("flatbuffers", reason="needs: .[stablehlo]")

    def model(params, x):
        return x.reshape(-1, 8) @ params["w"]

    params, options = {"w": normal(8, 3)}, {"any_batch": True, "progress": False}
    path = tmp_path / "m.stablehlo"
    report = fc.export(model, params, normal(1, 2, 8), path=path, **options)
    assert report.passed, report.failures
    assert "for any batch size; run with (1, 3, 5)" in str(report)
    with pytest.raises(fc.ExportError, match="trace with a symbolic size"):
        fc.export(model, params, normal(2, 4), path=path, **options)
    with pytest.raises(fc.ExportError, match=r"one of \.tflite, \.onnx"):
        fc.export(model, params, normal(2, 8), path=tmp_path / "m.vmfb", **options)


def test_a_dense_predictor(to, tmp_path):
    """What ``slide`` makes of a classifier is a model, too."""
    model, params, _ = _made(Net(), normal(1, 6, 6, 3))
    path = tmp_path / f"net.{SUFFIX[to]}"
    grid = fc.slide(model, window=(6, 6), stride=2)
    report = fc.export(grid, params, normal(1, 8, 10, 3), path=path, progress=False)
    assert report.passed, report.failures
