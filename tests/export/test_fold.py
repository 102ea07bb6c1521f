"""Norms folded into the layers: fewer operations, rounded once, other norms found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc

from .models import _made, normal
from .test_files import RUNTIMES, SUFFIX, needs

MEAN, STD = np.array([0.4, 0.5, 0.3], "f4"), np.array([0.2, 0.3, 0.25], "f4")
# Additions are left out: OpenVINO adds a bias apart from its layer.
NORMS = {"SUB", "MUL", "DIV", "Sub", "Mul", "Div", "Subtract", "Multiply", "Divide"}
NORMS |= {"BatchNormalization", "BatchNormInference"}


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


class Behind(nn.Module):
    """Norms behind convolutions: plain, depthwise, with a bias, and behind a Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm(nn.Conv(6, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm(nn.Conv(12, (3, 3), feature_group_count=6)(x)))
        x = nn.relu(norm(nn.Dense(5)(x.mean((1, 2)))))
        return nn.Dense(4, use_bias=False)(x) * 3.0 + 1.0


class Before(nn.Module):
    """Normalised inputs of an unpadded convolution, and a norm before a 1x1."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 2), padding="VALID")((x - MEAN) / STD))
        return nn.Conv(5, (1, 1), use_bias=False)(norm(x))


class Padded(nn.Module):
    """What padding keeps apart: zeros are added behind the norm."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(6, (3, 3))((x - MEAN) / STD)


class Branched(nn.Module):
    """A layer whose output is read twice keeps its norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        return x + nn.relu(norm(x))


@pytest.fixture(params=RUNTIMES)
def to(request):
    needs(request.param)
    return request.param


def export(model, runtime, folder, **options):
    model, params, inputs = _made(model, normal(1, 6, 8, 3))
    path = folder / f"net.{SUFFIX[runtime]}"
    options = {"path": path, "progress": False, **options}
    return fc.export(model, params, *inputs, **options), params


def norms(report):
    return sum(n for op, n in report.figures[0].ops.items() if op in NORMS)


@pytest.mark.parametrize(("model", "count"), [(Behind(), 4), (Before(), 2)])
@pytest.mark.parametrize("form", ["conv", "dense"])
def test_norms_are_folded(model, count, form, to, tmp_path):
    plain, _ = export(model, to, tmp_path, fold=False, to=form)
    report, params = export(model, to, tmp_path, to=form)
    assert plain.passed
    assert report.passed, report.failures
    assert f"folded: {count} norms" in str(report)
    assert all(layer.bits and layer.exact for layer in report.layers)
    assert norms(plain) > 2
    assert norms(report) == 0
    assert fc.verify_file(report.path, params, progress=False).passed


@pytest.mark.parametrize("model", [Padded(), Branched()])
def test_norms_that_cannot_be_folded(model, to, tmp_path):
    """Zeros of the padding keep their zero when they are scaled, not when shifted."""
    report, _ = export(model, to, tmp_path)
    assert report.passed, report.failures
    assert norms(report) >= 1


OPTIONS = [
    *((runtime, {}) for runtime in RUNTIMES),
    # OpenVINO itself folds them if it doesn't know the batch.
    *((runtime, {"any_batch": True}) for runtime in ("litert", "onnx")),
    ("litert", {"calibrate": [1000 + np.asarray(normal(4, 6, 8, 3))]}),
]


@pytest.mark.parametrize(("runtime", "options"), OPTIONS)
def test_norms_that_cost_accuracy_are_not_folded(runtime, options, tmp_path):
    """Folded, the mean of the inputs is subtracted from sums in which they drown."""
    needs(runtime)
    if "calibrate" in options:
        pytest.importorskip("litert_quantizer", reason="needs: .[litert]")
    model = nn.Sequential(
        [lambda x: (x - 1000.0) / 3.0, nn.Conv(6, (3, 2), padding="VALID")]
    )
    model, params, (x,) = _made(model, normal(1, 6, 8, 3))
    path = tmp_path / f"net.{SUFFIX[runtime]}"
    report = fc.export(model, params, x + 1000, path=path, progress=False, **options)
    # int8 has steps of 4 for inputs of 1000, which differ by 1: nothing is left.
    far = tuple(f for f in report.failures if f.startswith("int8: 'output' is "))
    assert report.failures == far
    assert bool(far) == ("calibrate" in options)
    assert "not folded: layers_1: with norms" in str(report)
    assert not any(layer.folded for layer in report.layers)
    assert norms(report) >= 1
    assert report.path == str(path)


def test_another_norm_is_found_without_the_model(to, tmp_path):
    report, params = export(Behind(), to, tmp_path)
    for name in ("mean", "var"):
        stats = jax.tree.map(jnp.copy, params["batch_stats"])
        old = stats["BatchNorm_1"][name]
        stats["BatchNorm_1"][name] = jnp.nextafter(old, 9.0)
        other = {**params, "batch_stats": stats}
        found = fc.verify_file(report.path, other, progress=False)
        wanted = (
            f"batch_stats/BatchNorm_1/{name}' is not the one the file was made from"
        )
        assert wanted in found.failures[0]
    without = fc.verify_file(report.path, {"params": params["params"]}, progress=False)
    assert "the checkpoint lacks 'batch_stats/BatchNorm_0/mean'" in str(without)
    kernel = params["params"]["Conv_0"]["kernel"].at[1, 1, 1, 1].mul(1.001)
    conv = {**params["params"]["Conv_0"], "kernel": kernel}
    other = {**params, "params": {**params["params"], "Conv_0": conv}}
    found = fc.verify_file(report.path, other, progress=False)
    assert "layer 'Conv_0': its kernel has other bits" in found.failures[0]
