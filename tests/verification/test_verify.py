"""verify and assert_equivalent: what holds passes, every planted defect is named."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.verification.layer_certificates import certify_layer


class Net(nn.Module):
    order: tuple[int, ...] = (0, 1, 2, 3)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(5, (3, 3), name="conv")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = x.transpose(self.order).reshape(x.shape[0], -1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(6, name="fc1")(x))
        return nn.Dense(3, use_bias=False, name="fc2")(x)


class ConvNet(nn.Module):
    """Net by hand, with nn.Conv; ``flip`` and ``padding`` plant defects."""

    padding: str = "VALID"
    flip: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), name="conv")(x))
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        if self.flip:
            x = x[:, ::-1, ::-1]
        x = nn.Conv(6, (4, 3), padding=self.padding, name="fc1")(x)
        x = x[:, x.shape[1] // 2, x.shape[2] // 2][:, None, None]
        x = nn.Conv(3, (1, 1), use_bias=False, name="fc2")(nn.relu(x))
        return x.reshape(x.shape[0], 3)


@pytest.fixture(scope="module")
def case():
    x = jax.random.normal(jax.random.key(1), (2, 4, 3, 2))
    model = Net()
    variables = model.init(jax.random.key(0), x)
    return model, variables, x, fc.make_plan(model, x)


@pytest.fixture(scope="module")
def report(case):
    model, variables, x, plan = case
    return fc.verify(model, variables, x, plan=plan)


def replaced(variables, path, value):
    params = dict(variables["params"])
    layer, name = path.split("/")
    params[layer] = {**params[layer], name: value}
    return {**variables, "params": params}


def test_everything_that_holds_passes(case, report):
    _, variables, _, _ = case
    assert report.passed
    assert not report.failures
    assert [layer.path for layer in report.layers] == ["fc1", "fc2"]
    assert all(layer.certificate.proved for layer in report.layers)
    assert all(layer.certificate.miss_probability <= 1e-9 for layer in report.layers)
    assert all(len(layer.outputs) == 1 for layer in report.layers)
    leaves = len(jax.tree.leaves(variables["params"]))
    assert len(report.gradients) == len(report.step) == leaves
    assert report.digits > 14
    assert all(error.passed for error in report.executions[0].errors)
    assert report.original.dots == 2
    assert report.converted.dots == 0
    assert report.converted.convolutions == 3


@pytest.mark.slow
def test_training_mode_with_dropout_and_batch_norm(case):
    model, variables, x, plan = case
    fc.assert_equivalent(
        model,
        variables,
        x,
        plan=plan,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(3)},
        tx=optax.adam(1e-3, eps=1e-4),
    )


def test_a_plan_is_made_where_none_is_given(case):
    model, variables, x, plan = case
    report = fc.verify(model, variables, x, gradients=False, train=False)
    assert report.passed
    assert [layer.path for layer in report.layers] == list(plan)
    there = fc.convert_params(variables, plan)
    conv = ConvNet()
    back = fc.verify(conv, there, x, to="dense", gradients=False)
    assert (back.to, back.planned) == ("dense", 2)


def test_the_other_direction(case):
    _, _, x, _ = case
    model = ConvNet()
    variables = model.init(jax.random.key(0), x)
    plan = fc.make_plan(model, x, to="dense")
    assert list(plan) == ["fc1", "fc2"]
    report = fc.verify(model, variables, x, plan=plan, gradients=False)
    assert report.passed
    assert report.converted.dots == 2


def test_a_model_written_by_hand(case):
    model, variables, x, plan = case
    fc.assert_equivalent(
        model, variables, x, plan=plan, converted_model=ConvNet(), gradients=False
    )


def test_report_as_text_json_and_markdown(report):
    assert str(report).startswith("EQUIVALENT: 2 layers to conv, on ")
    content = json.loads(report.to_json())
    assert content["passed"] is True
    assert content["layers"][0]["path"] == "fc1"
    assert content["layers"][0]["certificate"]["proved"] is True
    markdown = report.to_markdown().splitlines()
    assert markdown[0].startswith("**EQUIVALENT")
    assert markdown[2].count("|") == markdown[4].count("|") == 6
    assert content["arrays"][0]["quantity"] == "outputs"
    assert content["arrays"][0]["digits"] > 14
    error = content["executions"][0]["errors"][0]
    assert 0 <= error["converted"] <= error["allowed"]
    assert "  cpu: error " in str(report)


def test_progress_is_told(case):
    model, variables, x, plan = case
    told = []
    fc.verify(
        model,
        variables,
        x,
        plan=plan,
        gradients=False,
        progress=lambda *step: told.append(step),
    )
    assert told[0] == ("float64: tracing", 0, 2)
    assert ("float64: outputs", 0, 2) in told
    assert ("cpu: exact layers", 0, 2) in told
    assert told[-1] == ("cpu: run times", 1, 1)


class TestPlantedDefects:
    """Each must be caught, and named."""

    def caught(self, case, match, **options):
        model, variables, x, plan = case
        with pytest.raises(AssertionError, match=match):
            fc.assert_equivalent(
                model, variables, x, plan=plan, gradients=False, **options
            )

    def test_bias_off_by_one_ulp(self, case):
        _, variables, _, plan = case
        converted = fc.convert_params(variables, plan)
        bias = np.asarray(converted["params"]["fc1"]["bias"]).copy()
        bias[4] = np.nextafter(bias[4], 1, dtype=np.float32)
        converted = replaced(converted, "fc1/bias", bias)
        self.caught(
            case,
            r"params/fc1/bias': expected .* at \(4,\), got",
            converted_params=converted,
        )

    def test_a_negative_zero(self, case):
        _, variables, _, plan = case
        converted = fc.convert_params(variables, plan)
        bias = np.zeros(6, np.float32)
        bias[2] = -0.0
        converted = replaced(converted, "fc1/bias", bias)
        self.caught(case, "fc1/bias", converted_params=converted)

    def test_swapped_rows_in_the_params(self, case):
        _, variables, _, plan = case
        converted = fc.convert_params(variables, plan)
        kernel = np.asarray(converted["params"]["fc2"]["kernel"])[
            :, :, [1, 0, 2, 3, 4, 5]
        ]
        converted = replaced(converted, "fc2/kernel", kernel)
        self.caught(case, "fc2/kernel", converted_params=converted)

    def test_flipped_kernel(self, case):
        self.caught(
            case,
            "layer 'fc1': its output: expected",
            converted_model=ConvNet(flip=True),
        )

    def test_same_for_valid(self, case):
        # The centre of a SAME conv sees the same window shifted by the padding.
        self.caught(case, "layer 'fc1'", converted_model=ConvNet(padding="SAME"))

    def test_wrong_map_in_the_plan(self, case):
        model, variables, x, plan = case
        # The way in and the way the model reads it disagree: rows are swapped.
        layer = plan["fc1"]
        swapped = Rearrangement((60, 6), (2, 30, 6), (1, 0, 2), (4, 3, 5, 6))
        layer = dataclasses.replace(
            layer, leaves=(("kernel", swapped), *layer.leaves[1:])
        )
        bad = dataclasses.replace(plan, layers=(("fc1", layer), *plan.layers[1:]))
        with pytest.raises(AssertionError, match=r"layer 'fc1': DIFFERENT in float32"):
            fc.assert_equivalent(model, variables, x, plan=bad, gradients=False)

    def test_chw_flatten_read_as_hwc(self):
        x = jax.random.normal(jax.random.key(1), (2, 4, 3, 2))
        model = Net(order=(0, 3, 1, 2))
        variables = model.init(jax.random.key(0), x)
        assert fc.make_plan(model, x)["fc1"].order == "CHW"
        right = fc.make_plan(model, x)
        options = {"converted_model": ConvNet(), "gradients": False}
        fc.assert_equivalent(model, variables, x, plan=right, **options)
        wrong = fc.make_plan(model, x, rules=["fc1=4x3:HWC", "*=1x1"])
        with pytest.raises(AssertionError, match="layer 'fc1': its output: expected"):
            fc.assert_equivalent(model, variables, x, plan=wrong, **options)

    def test_failures_reach_the_report(self, case):
        model, variables, x, plan = case
        report = fc.verify(
            model,
            variables,
            x,
            plan=plan,
            converted_model=ConvNet(flip=True),
            gradients=False,
        )
        assert not report.passed
        assert "DIFFERENT" in str(report)
        assert json.loads(report.to_json())["passed"] is False
        assert any("12 are expected" in failure for failure in report.failures)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
@pytest.mark.parametrize("to", ["conv", "dense"])
def test_layer_certificates_in_every_dtype(case, dtype, to):
    plan = case[-1]
    layer = plan["fc1"] if to == "conv" else plan.inverse()["fc1"]
    if to == "dense":
        layer = dataclasses.replace(layer, input_shape=(2, 4, 3, 5))
    certificate = certify_layer(layer, to, dtype)
    assert certificate.passed, str(certificate)
    assert certificate.miss_probability <= 1e-9


class TestNothingToCompare:
    def test_weights_of_nan(self):
        model, x = nn.Dense(3), jnp.ones((2, 4))
        params = jax.tree.map(lambda a: a * jnp.nan, model.init(jax.random.key(0), x))
        report = fc.verify(model, params, x, gradients=False, progress=False)
        assert not report.passed
        assert str(report).startswith("UNDECIDED: 1 layer to conv")
        assert "'output': nothing was compared" in report.failures
        assert "6 of 6 entries (100%) are NaN or infinite" in str(report)

    def test_a_share(self):
        model, x = nn.Dense(3), jnp.ones((2, 4)).at[0].set(jnp.nan)
        params = model.init(jax.random.key(0), x)
        report = fc.verify(model, params, x, gradients=False, progress=False)
        assert report.passed
        assert "3 of 6 entries (50%) are NaN or infinite" in str(report)

    def test_no_layer(self):
        model, x = nn.LayerNorm(), jnp.ones((2, 4))
        params = model.init(jax.random.key(0), x)
        report = fc.verify(model, params, x, gradients=False, progress=False)
        assert str(report).startswith("NOTHING CONVERTED: 0 layers to conv")


def test_params_and_inputs_in_the_wrong_order():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=r"Expected params as a tree .* got float32 of"):
        fc.verify(model, x, params)
