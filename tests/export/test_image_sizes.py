"""Files for any image size: run with sizes that the model was not exported with."""

import errno
import importlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.export.runtimes import runtimes

from .models import _made, normal

NEEDS = {"onnx": "onnxruntime", "openvino": "openvino", "stablehlo": "flatbuffers"}


@pytest.fixture(params=NEEDS)
def suffix(request):
    pytest.importorskip(NEEDS[request.param], reason=f"needs: .[{request.param}]")
    return runtimes()[request.param].suffix


class Strided(nn.Module):
    """SAME pads differ by the size; a norm, a pool, a pointwise Dense, a mean."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 2), (2, 1))(x))
        x = nn.max_pool(nn.relu(x), (2, 3), (2, 1), "SAME")
        return nn.Dense(4)(x), nn.Dense(3)(x.mean((1, 2)))


class Unet(nn.Module):
    """Fails by itself where a size isn't a multiple of two."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        y = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(x, (2, 2), (2, 2))))
        y = nn.ConvTranspose(6, (2, 2), (2, 2), padding="VALID")(y)
        return nn.Conv(2, (1, 1))(jnp.concatenate([x, y], -1))


def export(model, params, x, path, **options):
    options = {"path": path, "any_size": True, "progress": False, **options}
    return fc.export(model, params, x, **options)


@pytest.mark.parametrize("options", [{}, {"any_batch": True, "to": "dense"}])
def test_a_fully_convolutional_network(options, suffix, tmp_path):
    model, params, (x,) = _made(Strided(), normal(1, 13, 10, 3))
    path = tmp_path / f"net{suffix}"
    report = export(model, params, x, path, **options)
    assert report.passed, report.failures
    assert "for images of 13x10 and larger of any size; run with" in str(report)
    found = {error.path for error in report.proof.outputs}
    assert found > {"output/0, image size 14x12", "output/1, image size 16x11"}
    assert ("output/1, batch size 5" in found) == ("any_batch" in options)
    other = normal(1, 20, 31, 3)
    again = fc.verify_file(path, params, other, model=model, progress=False)
    assert again.passed, again.failures


def test_steps_of_sizes(suffix, tmp_path):
    model, params, (x,) = _made(Unet(), normal(1, 8, 10, 3))
    report = export(model, params, x, tmp_path / f"net{suffix}")
    assert report.passed, report.failures
    assert "for images of 8x10 and larger in steps of 2" in str(report)
    assert "output, image size 14x12" in {e.path for e in report.proof.outputs}


class Net(nn.Module):
    """Its zeros are around each crop."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def test_a_grid(suffix, tmp_path):
    model, params, _ = _made(Net(), normal(1, 6, 4, 3))
    grid = fc.slide(model, window=(6, 4), stride=(3, 2))
    images, path = normal(1, 9, 11, 3), tmp_path / f"net{suffix}"
    report = export(grid, params, images, path)
    assert report.passed, report.failures
    assert "for images of 9x11 and larger of any size" in str(report)
    more = np.asarray(normal(1, 20, 14, 3))
    file = next(each for each in runtimes().values() if each.suffix == suffix)
    (found,) = file.open(path).run([more])
    want = grid(params, more)
    assert found.shape == want.shape == (1, 5, 6, 4)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    around = fc.slide(model, window=(6, 4), stride=(2, 2), padding="image")
    with pytest.raises(ValueError, match="Expected padding='crops'"):
        export(around, params, images, path)


def test_a_full_disk_is_not_taken_for_a_size(suffix, tmp_path, monkeypatch):
    tried = []

    def full(*_):
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        importlib.import_module("fcconv_jax.export.export"), "seal", full
    )
    model, params, (x,) = _made(nn.Conv(2, (3, 3)), normal(1, 6, 5, 3))
    with pytest.raises(fc.ExportError, match="can't be written: No space left"):
        export(model, params, x, tmp_path / f"net{suffix}")
    assert len(tried) == 1


def test_one_size_only(suffix, tmp_path):
    """A flatten in front of a Dense."""
    model, params, (x,) = _made(
        nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(3)]),
        normal(1, 4, 6, 3),
    )
    with pytest.raises(fc.ExportError, match="Expected a model for"):
        export(model, params, x, tmp_path / f"net{suffix}")
    with pytest.raises(fc.ExportError, match="Expected images with a batch"):
        export(nn.Dense(3), {"params": {}}, jnp.ones((2, 5)), tmp_path / f"n{suffix}")
