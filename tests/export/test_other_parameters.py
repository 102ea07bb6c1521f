"""Another checkpoint is found without the model, whatever its parameters became."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fcconv_jax as fc

from .models import _made, normal
from .test_files import RUNTIMES, SUFFIX, needs


class Computed(nn.Module):
    """Parameters that reach the file only in what was computed from them."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (6, 4))
        gain = self.param("gain", nn.initializers.ones, (4,))
        y = nn.relu(x @ (kernel * gain / jnp.linalg.norm(kernel, axis=0)))
        low = jnp.tanh(self.param("low", nn.initializers.normal(), ()))
        y = jnp.tanh(nn.BatchNorm(use_running_average=True)(jnp.maximum(y, low)))
        return nn.LayerNorm()(nn.Dense(3)(y))


@pytest.mark.parametrize(
    ("runtime", "int8"),
    [*((runtime, False) for runtime in RUNTIMES), ("litert", True), ("onnx", True)],
)
def test_another_parameter_is_found_without_the_model(runtime, int8, tmp_path):
    """Whatever becomes of it: another file would be other numbers."""
    needs(runtime)
    model, params, (x,) = _made(Computed(), normal(1, 6))
    options = {"calibrate": [np.asarray(normal(8, 6))]} if int8 else {}
    path = tmp_path / f"m.{SUFFIX[runtime]}"
    report = fc.export(model, params, x, path=path, progress=False, **options)
    assert report.passed, report.failures
    assert fc.verify_file(path, params, progress=False).passed
    leaves, tree = jax.tree.flatten(params)
    for number, leaf in enumerate(leaves):
        for other in (leaf * 1.5 + 0.25, leaf * np.nan, leaf + np.inf):
            changed = [*leaves[:number], other, *leaves[number + 1 :]]
            given = jax.tree.unflatten(tree, changed)
            found = fc.verify_file(path, given, progress=False)
            assert not found.passed, (number, other)


def test_a_program_that_no_layer_is_read_of(tmp_path):
    pytest.importorskip("flatbuffers", reason="needs: pip install -e '.[stablehlo]'")

    def model(params, x):
        return jnp.sort(jnp.linalg.solve(params["a"], x.T), axis=0)

    params, path = {"a": normal(4, 4)}, tmp_path / "m.stablehlo"
    report = fc.export(model, params, normal(3, 4), path=path, progress=False)
    assert "its layers are not compared one by one" in str(report)
    assert fc.verify_file(path, params, progress=False).passed
    found = fc.verify_file(path, {"a": params["a"] + 1}, progress=False)
    assert "parameter 'params/a' is not the one the file was made from" in str(found)


class Dropped(nnx.Module):
    """Holds the keys of its dropout, which a call for inference doesn't read."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.drop(self.norm(x))))


@pytest.mark.parametrize("suffix", ["onnx", "stablehlo"])
def test_the_state_of_an_nnx_model(suffix, tmp_path):
    packages = {"onnx": "onnxruntime", "stablehlo": "flatbuffers"}
    pytest.importorskip(packages[suffix], reason=f"needs: pip install -e '.[{suffix}]'")
    model, path = Dropped(nnx.Rngs(0)), tmp_path / f"m.{suffix}"
    model.eval()
    report = fc.export(model, None, normal(1, 6), path=path, progress=False)
    assert report.passed, report.failures
    for kinds in ((), ((nnx.Param, nnx.BatchStat),)):
        state = nnx.state(model, *kinds)
        assert fc.verify_file(path, state, progress=False).passed
    model.norm.mean[...] += 1
    assert not fc.verify_file(path, nnx.state(model), progress=False).passed
    params = nnx.state(model, nnx.Param)
    found = fc.verify_file(path, params, progress=False)
    assert "the checkpoint lacks 'state/norm/mean'" in str(found)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_parameters_that_changed_places(runtime, tmp_path):
    """The file has both arrays, each in the other's place."""
    needs(runtime)
    model = nn.Sequential([nn.LayerNorm(), jnp.tanh, nn.LayerNorm(), nn.Dense(3)])
    model, params, (x,) = _made(model, normal(2, 6))
    path = tmp_path / f"m.{SUFFIX[runtime]}"
    report = fc.export(model, params, x, path=path, progress=False, fold=False)
    assert report.passed, report.failures
    tree = dict(params["params"])
    tree["layers_0"], tree["layers_2"] = tree["layers_2"], tree["layers_0"]
    found = fc.verify_file(path, {"params": tree}, progress=False)
    assert "'params/layers_0/bias' is not the one the file was made from" in str(found)
