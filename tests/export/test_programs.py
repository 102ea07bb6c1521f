"""StableHLO and IREE files, which are written from JAX's own program."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fcconv_jax as fc

from .models import MODELS, export_two_roles, normal

NEEDS = {"stablehlo": "flatbuffers", "iree": "iree.compiler"}
SUFFIX = {"stablehlo": ".stablehlo", "iree": ".vmfb"}


def find(name):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


@pytest.fixture(params=NEEDS)
def to(request):
    if find(NEEDS[request.param]) is None:
        pytest.skip(f"needs: pip install -e '.[{request.param}]'")
    return request.param


def write(name, to, folder, form="conv", **options):
    model, params, inputs = MODELS[name]()
    path = folder / f"model{SUFFIX[to]}"
    options = {"path": path, "to": form, "progress": False, **options}
    return fc.export(model, params, *inputs, **options)


@pytest.mark.parametrize("name", ["digits", "vit block", "function", "nnx"])
def test_both_forms_are_proved(name, to, tmp_path):
    for form in ("conv", "dense"):
        report = write(name, to, tmp_path, form)
        assert report.passed, report.failures
        assert report.proof.outputs
        if to == "iree":
            assert all(layer.bits and layer.exact for layer in report.layers)
            left = {name for name, _ in report.left}
            assert {x.name for x in report.layers if x.form != form} == left
    # Every parameter is there bit by bit: as a kernel or bias, or besides.
    assert report.proof.constants or report.layers


def test_other_params_are_caught(to, tmp_path):
    report = write("digits", to, tmp_path)
    _, params, _ = MODELS["digits"]()
    assert fc.verify_file(report.path, params, progress=False).passed
    kernel = params["params"]["fc1"]["kernel"]
    other = np.array(kernel)
    other[3, 2] = np.nextafter(other[3, 2], np.float32(9))
    params["params"]["fc1"]["kernel"] = jnp.asarray(other)
    again = fc.verify_file(report.path, params, progress=False)
    assert len(again.failures) == 1
    assert "fc1" in again.failures[0]


def test_params_that_are_damaged_beside_a_module(tmp_path):
    if find("iree.compiler") is None:
        pytest.skip("needs: pip install -e '.[iree]'")
    report = write("digits", "iree", tmp_path)
    beside = Path(report.path).with_suffix(".safetensors")
    arrays = load_file(beside)
    from safetensors import safe_open

    with safe_open(beside, "numpy") as file:
        about = file.metadata()
    kernel = arrays["params/conv2/kernel"]
    arrays["params/conv2/kernel"] = np.ascontiguousarray(kernel[::-1, ::-1])
    save_file(arrays, beside, about)
    _, params, _ = MODELS["digits"]()
    again = fc.verify_file(report.path, params, progress=False)
    assert "layer 'conv2': its kernel has other bits" in again.failures[0]


def test_any_batch_and_any_program_in_stablehlo(tmp_path):
    if find("flatbuffers") is None:
        pytest.skip("needs: pip install -e '.[stablehlo]'")

    def model(params, x):
        step = jax.checkpoint(lambda carry, row: (carry + row @ params["w"], carry))
        return jnp.sort(jax.lax.scan(step, x[:, 0, :2], x.swapaxes(0, 1))[0])

    params, x = {"w": normal(3, 2)}, normal(2, 4, 3)
    path = tmp_path / "m.stablehlo"
    report = fc.export(model, params, x, path=path, progress=False)
    assert report.passed, report.failures
    assert "its layers are not compared one by one" in str(report)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    more = normal(7, 4, 3)
    np.testing.assert_allclose(exported.call(more), model(params, more), rtol=1e-5)


def test_a_weight_in_two_roles_is_said_first(to, tmp_path):
    """``x @ w @ w.T`` has no one kernel for both: no file calls itself all conv."""

    report = export_two_roles(to, tmp_path / f"m{SUFFIX[to]}")
    assert [name for name, _ in report.left] == ["w", "w#2"]
    assert "conv form (2 layers are not)" in str(report).splitlines()[0]


def test_bfloat16(to, tmp_path):
    def model(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]

    params = {"w": normal(6, 5), "b": normal(5, seed=2), "v": normal(5, 3)}
    params, x = jax.tree.map(lambda a: a.astype("bfloat16"), (params, normal(2, 6)))
    path = tmp_path / f"m{SUFFIX[to]}"
    report = fc.export(model, params, x, path=path, progress=False)
    assert report.passed, report.failures
    assert fc.verify_file(path, params, progress=False).passed


def test_outputs_whose_tree_jax_export_cannot_write(tmp_path):
    if find("flatbuffers") is None:
        pytest.skip("needs: pip install -e '.[stablehlo]'")
    params, x = {"kernel": normal(6, 4), "bias": normal(4)}, normal(3, 6)

    def run(params, x):
        y = x @ params["kernel"] + params["bias"]
        return {0: y, 1: [jnp.tanh(y)]}

    report = fc.export(run, params, x, path=tmp_path / "m.stablehlo", progress=False)
    assert report.passed, report.failures
    assert "its outputs are a list" in str(report)
    assert fc.verify_file(report.path, params, model=run, x=x).passed


def test_outputs_that_no_input_changes(to, tmp_path):
    def model(params, x):
        return {"a": jnp.float32(3), "b": x @ params["w"], "c": params["w"] + 1}

    params, x, path = {"w": normal(6, 5)}, normal(2, 6), tmp_path / f"m{SUFFIX[to]}"
    report = fc.export(model, params, x, path=path, progress=False)
    assert report.passed, report.failures
    assert len(report.proof.outputs) == 3
    assert fc.verify_file(path, params, x, model=model, progress=False).passed


def test_a_kernel_that_the_model_computes(to, tmp_path):
    def model(params, x):
        return x @ (params["w"] * params["scale"])

    params = {"w": normal(6, 5), "scale": normal(5, seed=2)}
    path = tmp_path / f"m{SUFFIX[to]}"
    report = fc.export(model, params, normal(2, 6), path=path, progress=False)
    assert report.passed, report.failures
