"""Every model as every file: proved, in the form asked for, no transposes added."""

import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fcconv_jax as fc
from fcconv_jax.export.runtimes import runtimes

from .models import MODELS, export_two_roles, normal

# The package that shows whether a runtime's extra is installed.
MODULES = {
    "coreml": "coremltools",
    "iree": "iree",
    "litert": "ai_edge_litert",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "stablehlo": "flatbuffers",
}
# Those that run a graph here.
RUNTIMES = [name for name, each in runtimes().items() if each.write and each.executed]
SUFFIX = {name: runtimes()[name].suffix[1:] for name in RUNTIMES}
MATMULS = {"FULLY_CONNECTED", "BATCH_MATMUL", "Gemm", "MatMul"}


def needs(to):
    """Skips where the extra is missing; finds the package without importing it."""
    if importlib.util.find_spec(MODULES[to]) is None:
        pytest.skip(f"needs: pip install -e '.[{to}]'")


@pytest.fixture(params=RUNTIMES)
def to(request):
    needs(request.param)
    return request.param


def write(name, to, folder, form, **options):
    model, params, inputs = MODELS[name]()
    path = folder / f"model.{SUFFIX[to]}"
    options = {"path": path, "to": form, "progress": False, **options}
    return fc.export(model, params, *inputs, **options)


def test_every_runtime_has_its_package():
    assert MODULES.keys() == runtimes().keys()


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_are_proved(name, to, tmp_path):
    conv = write(name, to, tmp_path, "conv")
    assert conv.passed, conv.failures
    assert all(layer.bits is not False and layer.exact for layer in conv.layers)
    assert conv.proof.outputs
    # No matmul with a weight is left; attention's two products are, and are listed.
    assert not {layer.op for layer in conv.layers} & MATMULS
    assert len(conv.products) == (2 if name == "vit block" else 0)
    assert not conv.left
    dense = write(name, to, tmp_path, "dense")
    assert dense.passed, dense.failures
    for layer in dense.layers:
        # A convolution that is left has no dense form, and is listed.
        assert (layer.op in MATMULS) != (layer.name in dict(dense.left))
    assert conv.figures[0].transposes <= dense.figures[0].transposes


def test_the_layout_is_kept(to, tmp_path):
    added = {
        name: write(name, to, tmp_path, "conv").figures[0].transposes
        for name in ("digits", "mlp", "vgg head", "mobile")
    }
    # Only an image with channels is turned for ONNX, once.
    images = {"digits": 0, "mlp": 0, "vgg head": 1, "mobile": 1}
    first = runtimes()[to].images == "first"
    assert added == (images if first else dict.fromkeys(added, 0))


def test_the_report(to, tmp_path):
    report = write("digits", to, tmp_path, "conv", compare=True)
    assert [row.form for row in report.figures] == ["conv", "dense"]
    assert all(row.milliseconds and row.bytes > 0 for row in report.figures)
    assert str(report).startswith("PROVED")
    assert "| fc1 |" in report.to_markdown()
    assert '"passed": true' in report.to_json()


def test_a_plan_of_ones_own(to, tmp_path):
    model, _, inputs = MODELS["digits"]()
    plan = fc.make_plan(model, *inputs, rules=["fc2=skip"])
    report = write("digits", to, tmp_path, "dense", plan=plan)
    assert report.passed
    assert {x.name: x.form for x in report.layers}["fc2"] == "dense"
    assert {x.name: x.form for x in report.layers}["fc1"] == "conv"


def test_rules_name_layers(to, tmp_path):
    report = write("digits", to, tmp_path, "conv", rules=["fc1=1x1"])
    assert report.passed
    assert report.plan["fc1"].window == (1, 1)


def test_verify_file_reads_back(to, tmp_path):
    model, params, inputs = MODELS["vgg head"]()
    written = write("vgg head", to, tmp_path, "conv")
    alone = fc.verify_file(written.path, params, progress=False)
    assert alone.passed
    assert not alone.proof.outputs
    whole = fc.verify_file(written.path, params, *inputs, model=model, progress=False)
    assert whole.passed
    assert whole.proof.outputs
    other = jax.tree.map(lambda p: p + 1, params)
    assert not fc.verify_file(written.path, other, progress=False).passed


def test_a_loop_is_written_out_if_asked(to, tmp_path):
    def model(params, x):
        def step(carry, row):
            return 0.5 * carry + row @ params["w"], carry

        return jax.lax.scan(step, x[:, 0, :2], x.swapaxes(0, 1))[0]

    params, x = {"w": normal(3, 2)}, normal(2, 4, 3)
    options = {"path": tmp_path / f"m.{SUFFIX[to]}", "progress": False}
    loops = "scan" in runtimes()[to].fused
    assert len(fc.export(model, params, x, **options).layers) == (1 if loops else 4)
    report = fc.export(model, params, x, unroll=4, **options)
    assert report.passed, report.failures
    assert len(report.layers) == 4


def test_another_model_is_caught_by_the_whole_file(to, tmp_path):
    """The same layers and weights, and another function between them."""

    class Other(type(MODELS["digits"]()[0])):
        @nn.compact
        def __call__(self, x):
            return super().__call__(0.99 * x)

    _, params, inputs = MODELS["digits"]()
    written = write("digits", to, tmp_path, "conv")
    report = fc.verify_file(
        written.path, params, *inputs, model=Other(), progress=False
    )
    assert all(layer.passed for layer in report.layers)
    assert not report.passed
    assert "'output': expected an error of at most" in report.failures[0]


def test_a_weight_in_two_roles_is_said_first(to, tmp_path):
    """``x @ w @ w.T`` has no one kernel for both: no file calls itself all conv."""

    report = export_two_roles(to, tmp_path / f"m.{SUFFIX[to]}")
    assert [name for name, _ in report.left] == ["w", "w#2"]
    assert "conv form (2 layers are not)" in str(report).splitlines()[0]


def test_halves(to, tmp_path):
    """float16 holds small integers only; bfloat16 is refused with a fix."""

    def model(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]

    path = tmp_path / f"m.{SUFFIX[to]}"
    options = {"path": path, "progress": False}
    arrays = (
        {"w": normal(300, 5), "b": normal(5, seed=2), "v": normal(5, 3)},
        normal(2, 300, seed=4),
    )
    half, brain = (
        jax.tree.map(lambda a, kind=kind: a.astype(kind), arrays)
        for kind in (jnp.float16, jnp.bfloat16)
    )
    with pytest.raises(ValueError, match=r"support bfloat16.* or pass runtime='iree'"):
        fc.export(model, *brain, **options)
    if to == "litert":
        with pytest.raises(
            ValueError, match=r"support float16.* or pass runtime='onnx'"
        ):
            fc.export(model, *half, **options)
        return
    for form in ("conv", "dense"):
        report = fc.export(model, *half, to=form, **options)
        assert report.passed, report.failures
        assert all(layer.exact for layer in report.layers)
        assert fc.verify_file(path, half[0], progress=False).passed


def test_the_state_of_an_nnx_model(to, tmp_path):
    """With the keys of its dropout, which are in no file."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(6, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.fc(self.drop(x))

    model, path = Net(nnx.Rngs(0)), tmp_path / f"m.{SUFFIX[to]}"
    options = {"path": path, "progress": False}
    assert fc.export(model, None, normal(2, 6), **options).passed
    for state in (nnx.state(model), nnx.state(model, nnx.Param)):
        assert fc.verify_file(path, state, progress=False).passed


def test_random_keys(to, tmp_path):
    """A carry of zeros draws nothing from its key; dropout does, and is refused."""

    class Sequence(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.LSTMCell(5))(x)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.drop = (
                nnx.Linear(6, 4, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
            )

        def __call__(self, x):
            return self.fc(self.drop(x))

    model, x = Sequence(), normal(2, 3, 4)
    options = {"path": tmp_path / f"m.{SUFFIX[to]}", "progress": False}
    params = model.init(jax.random.key(0), x)
    report = fc.export(model, params, x, unroll=3, **options)
    assert report.passed, report.failures
    with pytest.raises(ValueError, match=r"random numbers. Call the model as in infer"):
        fc.export(Net(nnx.Rngs(0)), None, normal(2, 6), **options)


def test_names_that_files_use_themselves(to, tmp_path):
    def model(params, x, output):
        return jnp.tanh(x @ params["w;1"]) @ params["a@b"] @ params["w#2"] + output

    params = {"w;1": normal(3, 2), "a@b": normal(2, 4), "w#2": normal(4, 4)}
    options = {"path": tmp_path / f"m.{SUFFIX[to]}", "progress": False}
    x, output = normal(2, 3), normal(2, 4)
    report = fc.export(model, params, x, output=output, **options)
    assert report.passed, report.failures
    assert fc.verify_file(report.path, params, progress=False).passed


def test_positions_turn_with_the_image(to, tmp_path):
    """A parameter beside tokens is stored in the order of the file's axes."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(5, (2, 2), (2, 2), padding="VALID")(x).reshape(1, -1, 5)
            small = nn.initializers.normal()
            x = jnp.concatenate([self.param("first", small, (1, 1, 5)), x], 1)
            x = x + self.param("positions", small, (1, 7, 5))
            return nn.Dense(3)(nn.LayerNorm()(x))

    model, x = Tokens(), normal(1, 4, 6, 3)
    params: Any = model.init(jax.random.key(0), x)
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = fc.export(model, params, x, path=path, progress=False)
    assert report.passed, report.failures
    params["params"]["positions"] = params["params"]["positions"].at[0, 2, 3].add(1)
    (why,) = fc.verify_file(path, params, progress=False).failures
    assert "parameter 'params/positions' is in no constant of the file" in why
