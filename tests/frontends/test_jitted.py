"""What converted models are called through: static values, and what jax.jit has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.core import Tracer
from trees import assert_trees_all_close

import fcconv_jax as fc
from fcconv_jax.frontends.jitted import Jitted


def kinds(*args, **kwargs):
    """Which arguments a trace sees as arrays."""
    traced = jax.tree.map(lambda leaf: isinstance(leaf, Tracer), args)
    seen.append((traced, {k: v for k, v in kwargs.items() if isinstance(v, bool)}))
    return 0


seen = []


@pytest.fixture(autouse=True)
def _fresh():
    seen.clear()


def test_numbers_are_static_wherever_they_are():
    call, x = Jitted(kinds, "kinds"), jnp.ones(3)
    call(x, 2)
    call({"x": x, "n": 2})
    call([x, np.float32(2)], None)
    call({"x": x, "n": jnp.asarray(2)})
    call({"x": x, "n": 2})
    assert [traced for traced, _ in seen] == [
        (True, False),
        ({"x": True, "n": False},),
        ([True, True], None),
        ({"x": True, "n": True},),
    ]


def test_a_number_where_an_array_was_is_static():
    call, x = Jitted(kinds, "kinds"), jnp.ones(3)
    for value in (jnp.asarray(2), 2, 2.5, jnp.asarray(3), 2, True, "same", len):
        call({"x": x, "n": value})
    assert [traced[0]["n"] for traced, _ in seen] == [True, *[False] * 5]


def test_equal_values_of_other_types_trace_again():
    call, x = Jitted(kinds, "kinds"), jnp.ones(3)
    for flag in (1, 1.0, True, 1, True):
        call(x, flag=flag)
    assert [flags for _, flags in seen] == [{}, {}, {"flag": True}]


def test_a_weakly_typed_array_is_traced_once():
    call, weak = Jitted(kinds, "kinds"), jnp.asarray(2.0)
    assert weak.weak_type
    for _ in range(2):
        call({"x": jnp.ones(3), "n": weak})
    assert [traced for traced, _ in seen] == [({"x": True, "n": True},)]


def test_an_error_of_the_function_stays():
    def fails(x):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        Jitted(fails, "fails")(jnp.ones(3))


def test_another_context_traces_again():
    context = []
    call = Jitted(kinds, "kinds", context)
    for context[:] in ("", "", "a", "a", "b", "", "a"):
        call(jnp.ones(3))
    assert len(seen) == 3


class Net(nn.Module):
    """A head behind a flatten, and a flag."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3)(x.reshape(x.shape[0], -1))
        return -y if train else y


@pytest.fixture(scope="module")
def linen():
    model, x = Net(), jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    variables = model.init(jax.random.key(1), x)
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)
    return model, variables, converted, fc.convert_params(variables, plan), x


@pytest.fixture(scope="module")
def function():
    def net(params, x, train=False):
        y = x @ params["w"] + params["b"]
        return -y if train else y

    params = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.ones(3)}
    x = jax.random.normal(jax.random.key(1), (2, 4))
    plan = fc.make_plan(net, params, x)
    return net, params, fc.convert_model(net, plan), fc.convert_params(params, plan), x


@pytest.mark.parametrize("kind", ["linen", "function"])
def test_converted_models_have_what_jit_has(kind, request):
    model, params, converted, moved, x = request.getfixturevalue(kind)
    call, apply = (
        (model.apply, converted.apply) if kind == "linen" else (model, converted)
    )
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert apply.eval_shape(moved, abstract) == jax.eval_shape(call, params, x)
    program = apply.lower(moved, abstract, train=True)
    assert "convolution" in program.as_text()
    assert_trees_all_close(program.compile()(moved, x), -call(params, x))
    assert "conv_general_dilated" in str(apply.trace(moved, x).jaxpr)


@pytest.mark.parametrize("kind", ["linen", "function"])
def test_converted_models_are_exported(kind, request):
    model, params, converted, moved, x = request.getfixturevalue(kind)
    call, apply = (
        (model.apply, converted.apply) if kind == "linen" else (model, converted)
    )
    (batch,) = export.symbolic_shape("b")
    abstract = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = export.export(apply)(moved, abstract)
    for size in (1, 5):
        rows = jnp.resize(x, (size, *x.shape[1:]))
        assert_trees_all_close(exported.call(moved, rows), call(params, rows))


@pytest.mark.parametrize("kind", ["linen", "function"])
def test_a_lowered_call_is_traced_once(kind, request):
    model, _, converted, moved, x = request.getfixturevalue(kind)
    plan = converted.plan
    traces = []
    if kind == "linen":

        class Counted(Net):
            def __call__(self, x, train=False):
                traces.append(x.shape)
                return super().__call__(x, train)

        apply = fc.convert_model(Counted(), plan).apply
    else:

        def counted(params, x):
            traces.append(x.shape)
            return model(params, x)

        apply = fc.convert_model(counted, plan)
    apply.lower(moved, jax.ShapeDtypeStruct(x.shape, x.dtype))
    apply(moved, x)
    apply(moved, x)
    assert len(traces) == 1


def test_calls_on_arrays_only_go_straight_to_jit(monkeypatch):
    call, x = Jitted(kinds, "kinds"), jnp.ones(3)
    call(x, {"y": x})
    monkeypatch.setattr(Jitted, "_on", None)  # the slower way
    call(2 * x, {"y": x})
    call(x, {"y": 2 * x})
    assert len(seen) == 1


def test_arrays_in_the_other_byte_order():
    """jax.jit takes their bytes as they are, once it knows the dtype."""
    call, x = Jitted(lambda x, y=0: x + y, "add"), np.arange(3.0, dtype=np.float32)
    swapped = x.astype(x.dtype.newbyteorder("S"))
    for given in (x, swapped):
        np.testing.assert_array_equal(call(given, y=given), 2 * x)


@pytest.mark.parametrize("value", [2, 2.5, True, np.True_, "same", len, None])
@pytest.mark.parametrize("where", ["args", "kwargs", "tree"])
def test_a_value_after_calls_on_arrays_only_is_static(value, where):
    def which(x, tree=None, n=None, flag=None):
        values.append((n, flag, (tree or {}).get("n")))
        return x

    values, call, x = [], Jitted(which, "which"), jnp.ones(3)
    array = jnp.asarray([1, 2])
    for given in (array, value, value, array):
        if where == "args":
            call(x, {}, given)
        elif where == "kwargs":
            call(x, flag=given)
        else:
            call(x, {"n": given})
    found = [next((v for v in each if v is not None), None) for each in values]
    if isinstance(value, np.bool_):
        assert all(isinstance(each, Tracer) for each in found)
    else:
        assert [each for each in found if not isinstance(each, Tracer)] == [value]


def test_a_rule_that_reads_params_from_around_it():
    def function(params, x):
        @jax.custom_jvp
        def act(x):
            return jnp.tanh(x @ params["w"])

        @act.defjvp
        def _(primals, tangents):
            y = jnp.tanh(primals[0] @ params["w"])
            return y, (1 - y**2) * (tangents[0] @ params["w"])

        return act(x)

    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    plan = fc.make_plan(function, params, x)
    conv = fc.convert_model(function, plan)
    moved = fc.convert_params(params, plan)
    assert (conv(moved, x) == function(params, x)).all()
    with pytest.raises(TypeError, match="constant handler") as caught:
        jax.grad(lambda x: conv(moved, x).sum())(x)
    assert "Pass the array, such as a layer's" in "".join(caught.value.__notes__)
