import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import fcconv_jax as fc
from fcconv_jax.planning.from_shapes import plan_from_params
from fcconv_jax.verification.layer_certificates import certify_layer

KEY = jax.random.key(0)


class Net(nn.Module):
    chw: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), padding="VALID", name="trunk")(x)
        x = x.transpose(0, 3, 1, 2) if self.chw else x
        x = nn.relu(nn.Dense(5, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(4, use_bias=False, name="fc2")(x)


def sample(shape=(2, 5, 4, 3)):
    return jax.random.normal(KEY, shape)


@pytest.mark.parametrize("chw", [False, True])
def test_same_kernels_as_the_plan_from_the_model(assert_close, chw):
    model, x = Net(chw), sample()
    variables = model.init(KEY, x)
    traced = fc.make_plan(model, x)
    ones = "x".join(map(str, traced["fc2"].window))
    plan = plan_from_params(
        variables, [f"fc1=3x2{(':CHW' if chw else ':HWC')}", f"fc2={ones}"]
    )
    assert list(plan) == list(traced) == ["fc1", "fc2"]
    for path in plan:
        assert plan[path].leaves == traced[path].leaves
        assert plan[path].case == traced[path].case
    assert plan.skipped == {"trunk": "no rule matches it (its kernel is (3, 3, 3, 6))"}
    converted = fc.convert_model(model, plan)
    y = converted.apply(fc.convert_params(variables, plan), x)
    assert_close(y, model.apply, variables, x)
    assert fc.Plan.from_json(plan.to_json()) == plan


def test_certificates_hold():
    shapes = {"a/kernel": (12, 5), "a/bias": (5,), "b/kernel": (7, 3)}
    plan = plan_from_params(shapes, ["a=2x2:CHW", "b=1x1"])
    conv = {"a/kernel": (2, 2, 3, 5), "a/bias": (5,), "b/kernel": (1, 1, 7, 3)}
    back = plan_from_params(conv, ["a=2x2:CHW", "b=1x1"], to="dense")
    for each in (plan, back):
        for layer in each.values():
            assert certify_layer(layer, each.to).passed


def test_to_dense_undoes_to_conv():
    tree = {"fc": {"kernel": np.arange(60.0).reshape(12, 5), "bias": np.arange(5.0)}}
    there = plan_from_params(tree, ["fc=2x2:CHW"])
    conv = fc.convert_params(tree, there)
    back = plan_from_params(conv, ["fc=2x2:CHW"], to="dense")
    assert back["fc"].layer == "Conv"
    assert back["fc"].input_shape == (1, 2, 2, 3)
    again = fc.convert_params(conv, back)
    np.testing.assert_array_equal(again["fc"]["kernel"], tree["fc"]["kernel"])
    np.testing.assert_array_equal(again["fc"]["bias"], tree["fc"]["bias"])


def test_only_the_outermost_params_count():
    x = sample()
    variables = Net().init(KEY, x)
    bare = plan_from_params(variables["params"], ["fc1=3x2:HWC"])
    state = TrainState.create(
        apply_fn=Net().apply, params=variables, tx=optax.adam(1e-3)
    )
    assert plan_from_params(variables, ["fc1=3x2:HWC"]) == bare
    assert plan_from_params({"params": variables}, ["fc1=3x2:HWC"]) == bare
    assert plan_from_params(state, ["fc1=3x2:HWC"]) == bare
    assert plan_from_params({"model": variables, "step": 3}, ["fc1=3x2:HWC"]) == bare


def test_two_levels_of_params_are_refused():
    tree = {"a": {"params": {"kernel": (4, 2)}}, "b": {"params": {"kernel": (4, 2)}}}
    with pytest.raises(fc.PlanError, match=r"one level .*'a/params/', 'b/params/'"):
        plan_from_params(tree, ["*=1"])


def test_reads_abstract_boxed_and_wrapped_leaves():
    wanted = plan_from_params({"fc/kernel": (12, 5), "fc/bias": (5,)}, ["fc=2x2:HWC"])
    abstract = jax.ShapeDtypeStruct((12, 5), jnp.bfloat16)
    bias = nn.Partitioned(jnp.zeros(5), names=("model",))
    for tree in (
        {"fc": {"kernel": abstract, "bias": bias}},
        {"fc": {"kernel": {"value": abstract}, "bias": {"value": np.zeros(5)}}},
        {"fc/kernel": abstract, "fc/bias": (5,)},
    ):
        assert plan_from_params(tree, ["fc=2x2:HWC"]) == wanted


def test_a_layer_at_the_root():
    plan = plan_from_params({"kernel": (6, 5), "bias": (5,)}, ["*=3:WC"])
    assert plan[""].kernel.target == (3, 2, 5)


def test_skip_comes_first_and_layout_is_kept():
    shapes = {"a/kernel": (3, 3, 4, 5), "b/kernel": (4, 5)}
    rules = [fc.Rule("a", skip=True), fc.Rule("*", window=(1, 1), layout="keep")]
    plan = plan_from_params(shapes, rules)
    assert plan["b"].layout == "keep"
    assert plan.skipped == {"a": "excluded by rule 'a'"}


def test_everything_left_alone_has_a_reason():
    shapes = {
        "fc/kernel": (4, 5),
        "other/kernel": (4, 5),
        "embed/embedding": (9, 4),
        "lstm/w": (4, 8),
        "fc/bias": (5,),
        "norm/scale": (5,),
    }
    skipped = plan_from_params(shapes, ["fc=1"]).skipped
    assert set(skipped) == {"other", "embed/embedding", "lstm/w"}
    assert "called 'embedding' (9, 4)" in skipped["embed/embedding"]


REFUSED = {
    "heads": ({"q/kernel": (8, 2, 4)}, ["*=1"], "conv", r"'q/kernel'.*attention heads"),
    "conv": ({"c/kernel": (3, 3, 2, 4)}, ["c=3x3"], "conv", "Conv2D.*'c=skip'"),
    "stack": ({"s/kernel": (3, 8, 4)}, ["s=2"], "conv", "scanned or vmapped stack"),
    "window": (
        {"f/kernel": (10, 4)},
        ["f=2x2"],
        "conv",
        "'f/kernel'.*expected a multiple",
    ),
    "order": ({"f/kernel": (8, 4)}, ["f=2x2:HWX"], "conv", "'f'.*order: .* got 'HWX'"),
    "rank 4": ({"f/kernel": (16, 4)}, ["f=2x2x2x2"], "conv", "1 to 3 dimensions"),
    "bias": (
        {"f/kernel": (8, 4), "f/bias": (2, 4)},
        ["f=2"],
        "conv",
        r"leaf 'f/bias' of shape \(4,\), .* got \(2, 4\)",
    ),
    "lora": (
        {"f/kernel": (8, 4), "f/lora/lora_a": (8, 2)},
        ["f=2"],
        "conv",
        r"a kernel and a bias in layer 'f'.*'lora/lora_a'",
    ),
    "no window": ({"f/kernel": (8, 4)}, [fc.Rule("f")], "conv", "expected a window"),
    "no rules": ({"f/kernel": (8, 4)}, [], "conv", "Expected rules"),
    "no kernel": ({"f/w": (8, 4)}, ["f=2"], "conv", r"a leaf called 'kernel'.*'f/w'"),
    "unused": ({"head/kernel": (8, 4)}, ["haed=2"], "conv", r"'haed'.*\['head'\]"),
    "dense already": ({"f/kernel": (8, 4)}, ["f=2"], "dense", "a Dense already"),
    "other rank": ({"f/kernel": (2, 2, 8, 4)}, ["f=2"], "dense", "another rank"),
    "other window": ({"f/kernel": (2, 8, 4)}, ["f=3"], "dense", "window 2 .*got 3"),
    "direction": ({"f/kernel": (8, 4)}, ["f=2"], "back", "got 'back'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    shapes, rules, to, message = REFUSED[name]
    with pytest.raises(fc.PlanError, match=message):
        plan_from_params(shapes, rules, to)


def test_refuses_a_normalised_layer():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(4, name="a"))(x)
            return nn.Dense(4, name="b")(x)

    variables = Normed().init(KEY, jnp.ones((2, 6)))
    with pytest.raises(fc.PlanError, match=r"in layer 'a', got .*a/kernel/scale"):
        plan_from_params(variables, ["a=2"])
    assert list(plan_from_params(variables, ["b=2:WC"])) == ["b"]


def test_a_rule_that_leaves_the_order_open_is_refused():
    with pytest.raises(fc.PlanError, match=r"'fc=2x2:HWC' for .* or 'fc=2x2:CHW' for"):
        plan_from_params({"fc/kernel": (12, 5)}, ["fc=2x2"])
    # One channel, or one place: there is only one order.
    assert plan_from_params({"fc/kernel": (4, 5)}, ["fc=2x2"])["fc"].window == (2, 2)
    assert plan_from_params({"fc/kernel": (12, 5)}, ["fc=1x1"])["fc"].order == "HWC"
