import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fcconv_jax as fc
from fcconv_jax.frontends.bind import bind, bind_called, bind_planned, frontend_of

X = jax.random.normal(jax.random.key(0), (2, 6))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.head(self.drop(self.norm(x))) * scale


@pytest.fixture
def normed():
    model = Normed(nnx.Rngs(0))
    model.eval()
    model.norm.mean[...] = jnp.full(6, 2.0)
    return model


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3, name="head")(x)

    model = Net()
    return model, model.init(jax.random.key(0), X)


def function():
    params = {"head": jnp.arange(18.0).reshape(6, 3)}
    return lambda params, x: x @ params["head"], params


@pytest.mark.parametrize("make", [linen, function])
def test_one_value_traces_plans_converts_and_calls(make):
    model, params = make()
    bound = bind(model, params, X)
    plan = bound.plan()
    assert (
        plan == bind_planned(model, (X,) if make is linen else (params, X), {}).plan()
    )
    changed = bound.convert(plan)
    want = bound.call(bound.variables)
    np.testing.assert_allclose(changed.call(changed.variables), want, atol=1e-5)
    if make is linen:
        called = bind_called(model, (params, X), {})
        np.testing.assert_array_equal(called.call(called.variables), want)
    assert bind(bound) is bound


def test_every_function_takes_a_bound_model():
    model, params = linen()
    bound = bind(model, params, X)
    plan = fc.make_plan(bound)
    assert fc.verify(bound, plan=plan, progress=False).passed
    assert fc.tune(bound, budget=0.1, objective="memory", progress=False) is not None
    assert fc.compare(bound, bound, progress=False).passed
    with pytest.raises(TypeError, match="bound model alone"):
        fc.verify(bound, None, X)


def test_no_model_is_refused():
    with pytest.raises(TypeError, match="got str"):
        frontend_of("bert")
    with pytest.raises(TypeError, match=r"Pass an instance: Dense\(\.\.\.\)"):
        frontend_of(nn.Dense)


def test_the_whole_state_of_an_nnx_model_counts(normed):
    other = Normed(nnx.Rngs(0))
    other.eval()
    bound = bind(other, nnx.state(normed), X)
    np.testing.assert_array_equal(bound.call(bound.variables)[0], normed(X))
    params = nnx.state(normed, nnx.Param)
    with pytest.raises(fc.PlanError, match="'norm/mean', 'norm/var'"):
        fc.verify(other, params, X, progress=False)
    # Dropout is off: nothing reads its random numbers.
    most = nnx.state(normed, nnx.Any(nnx.Param, nnx.BatchStat))
    assert fc.verify(other, most, X, progress=False).passed


def test_training_mode_is_named(normed):
    bind(normed, None, X).check_inference()
    normed.train()
    with pytest.raises(fc.PlanError, match=r"changes 'norm/mean'.*model\.eval\(\)"):
        fc.export(normed, None, X, path="model.onnx")


def test_what_a_call_reads(normed):
    for bound in (bind(*linen(), X), bind(normed, None, X)):
        names = bound.stored_paths(bound.variables)
        read = {name for name, used in zip(names, bound.reads) if used}
        assert any(name.endswith("mean") for name in read)
        assert any(name.endswith("kernel") for name in read)
        assert {name for name in names if name not in read} == {
            name for name in names if "drop" in name
        }


TYPOS = [
    (lambda m, p: fc.verify(m, p, X, backend="cpu"), r"backends=\?"),
    (lambda m, p: fc.make_plan(m, X, rule=["*=skip"]), r"rules=\?"),
    (lambda m, p: fc.tune(m, p, X, budgets=3), r"budget=\?"),
    (lambda m, p: fc.assert_equivalent(m, p, X, gradient=False), r"gradients=\?"),
    (lambda m, p: fc.export(m, p, X, path="m.onnx", depth=2), "export got depth="),
]


@pytest.mark.parametrize(("call", "message"), TYPOS)
def test_a_misspelled_option_is_no_argument_of_the_model(call, message):
    with pytest.raises(TypeError, match=message):
        call(*linen())


def test_arguments_of_the_model_pass(normed):
    assert fc.make_plan(linen()[0], X, train=False)
    assert fc.make_plan(normed, X, scale=2.0)
    assert fc.make_plan(lambda p, x, **options: x @ p, jnp.ones((6, 3)), X, depth=2)


def test_nothing_converted_comes_first():
    report = fc.verify(lambda p, x: x * p, jnp.ones(6), X, progress=False)
    assert str(report).startswith("NOTHING CONVERTED: 0 layers")
