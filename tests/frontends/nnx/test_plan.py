from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs
from flax import linen, nnx
from nnx_models import references
from trees import assert_trees_all_equal

import fcconv_jax as fc


class Net(nnx.Module):
    """Conv, a flatten in some order, two Linears."""

    def __init__(self, order="HWC", rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.order = order
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.fc1 = nnx.Linear(6 * 5 * 4, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        if self.order == "CHW":
            x = x.transpose(0, 3, 1, 2)
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


X = np.zeros((2, 6, 5, 3), np.float32)


def linear(*shape, seed=0, **kwargs):
    """A Linear that is quick to make."""
    return nnx.Linear(
        *shape, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(seed), **kwargs
    )


def make_plan(make, *inputs, **kwargs):
    """Plans a model that is never made: planning needs its shapes alone."""
    return fc.make_plan(nnx.eval_shape(make), *inputs, **kwargs)


@pytest.mark.parametrize("order", ["HWC", "CHW"])
def test_flatten_is_read_off_the_trace(order):
    plan = make_plan(lambda: Net(order), X)
    assert list(plan) == ["fc1", "fc2"]
    assert (plan["fc1"].window, plan["fc1"].order) == ((6, 5), order)
    assert plan["fc1"].case == "full_window"
    assert plan["fc2"].kernel.target == (1, 1, 8, 2)
    assert dict(plan.skipped) == {}


def test_inputs_and_model_may_be_abstract():
    model = nnx.eval_shape(Net)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert fc.make_plan(model, shape) == fc.make_plan(Net(), X)


def test_planning_leaves_no_trace_on_the_model():
    model = Net()
    layers = {name: getattr(model, name) for name in ("conv", "fc1", "fc2")}
    inside = {name: dict(vars(layer)) for name, layer in layers.items()}
    graphdef, state = nnx.split(model)
    fc.make_plan(model, X)
    for name, layer in layers.items():
        assert getattr(model, name) is layer
        assert type(layer) in (nnx.Conv, nnx.Linear)
        assert vars(layer).keys() == inside[name].keys()
        assert all(value is inside[name][key] for key, value in vars(layer).items())
    assert nnx.graphdef(model) == graphdef
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.state(model))):
        assert a is b


def test_planning_does_not_count_on_the_models_rngs():
    class Noisy(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
            self.bn = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
            self.fc = linear(8, 2)

        def __call__(self, x):
            return self.fc(self.drop(self.bn(x)))

    model = Noisy()
    before = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    plan = fc.make_plan(model, np.ones((3, 8), np.float32))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    assert list(plan) == ["fc"]
    jax.tree.map(np.testing.assert_array_equal, before, after)


@needs("flax", "0.12.0")
def test_containers_give_paths_of_the_graph():
    class Stack(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Dict(fc=linear(4, 4)) for _ in range(2)])
            self.head = nnx.Sequential(linear(4, 5), nnx.relu, linear(5, 2))

        def __call__(self, x):
            for block in self.blocks:
                x = block["fc"](x)
            return self.head(x)

    plan = fc.make_plan(Stack(), np.ones((3, 4), np.float32))
    assert list(plan) == [
        "blocks/0/fc",
        "blocks/1/fc",
        "head/layers/0",
        "head/layers/2",
    ]


def test_a_lone_layer_has_the_empty_path():
    plan = fc.make_plan(linear(4, 3), np.ones((2, 4), np.float32))
    assert list(plan) == [""]


def test_attention_projections():
    def make():
        return nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)

    plan = make_plan(make, np.ones((2, 5, 8), np.float32))
    assert sorted(plan) == ["key", "out", "query", "value"]
    assert plan["query"].kernel.source == (8, 2, 4)
    assert plan["query"].kernel.target == (1, 8, 8)


def test_linear_general_on_a_map_and_with_a_batch_axis():
    rngs = nnx.Rngs(0)
    window = nnx.LinearGeneral((6, 5, 3), (2, 4), axis=(-3, -2, -1), rngs=rngs)
    plan = fc.make_plan(window, X)
    assert plan[""].window == (6, 5)
    assert plan[""].kernel.target == (6, 5, 3, 8)
    grouped = nnx.LinearGeneral(4, 5, batch_axis={0: 3}, rngs=rngs)
    plan = fc.make_plan(grouped, np.ones((3, 2, 4), np.float32))
    assert (plan[""].case, plan[""].kernel.target) == ("grouped", (1, 4, 15))


def test_to_dense():
    class Patches(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.patch = nnx.Conv(3, 4, (2, 3), (2, 3), padding="VALID", rngs=rngs)
            self.same = nnx.Conv(4, 4, (3, 3), rngs=rngs)
            self.one = nnx.Conv(4, 4, (1, 1), feature_group_count=2, rngs=rngs)

        def __call__(self, x):
            return self.one(self.same(self.patch(x)))

    plan = make_plan(Patches, np.ones((2, 6, 9, 3), np.float32), to="dense")
    assert {p: layer.case for p, layer in plan.items()} == {
        "patch": "patchify",
        "one": "grouped",
    }
    assert "same" in plan.skipped


def test_rules_and_their_mistakes():
    plan = make_plan(Net, X, rules=["fc1=skip", fc.Rule("*", layout="keep")])
    assert list(plan) == ["fc2"]
    assert plan["fc2"].layout == "keep"
    assert "excluded by rule 'fc1'" in plan.skipped["fc1"]
    plan = make_plan(Net, X, rules=["fc1=6x5:CHW"])
    assert plan["fc1"].order == "CHW"
    with pytest.raises(fc.PlanError, match=r"matches no linear layer.*fc1"):
        make_plan(Net, X, rules=["fc9=skip"])


def test_method_by_name_and_as_a_function():
    class Two(Net):
        def head(self, h):
            return self.fc2(h)

    h = np.ones((2, 8), np.float32)
    assert list(make_plan(Two, h, method="head")) == ["fc2"]
    plan = make_plan(Two, h, method=lambda model, h: model.fc2(h))
    assert list(plan) == ["fc2"]
    assert "does not call it" in plan.skipped["fc1"]


def test_a_layer_with_a_matmul_of_its_own_is_left():
    def summed(x, kernel, *args, **kwargs):
        return (x[..., None] * kernel).sum(-2)

    plan = fc.make_plan(linear(4, 3, dot_general=summed), np.ones((2, 4), np.float32))
    assert not plan
    assert plan.skipped == {"": "Linear computes its matmul with a custom dot_general"}


@pytest.mark.parametrize("kind", references())
def test_mutable_references_are_left(kind):
    layer = linear(4, 3)
    layer.kernel = nnx.Param(layer.kernel[...], **kind)
    plan = fc.make_plan(layer, np.ones((2, 4), np.float32))
    assert "mutable references" in plan.skipped[""]


def test_a_kernel_that_is_also_an_embedding_is_left():
    class Head(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(4, 4, rngs=nnx.Rngs(0))
            self.head = linear(4, 4)
            self.head.kernel = self.embed.embedding

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    plan = fc.make_plan(Head(), np.zeros((2, 3), np.int32))
    assert not plan
    assert "(by gather)" in plan.skipped["head"]


def test_flags_and_rngs_of_the_call():
    class Flagged(nnx.Module):
        def __init__(self):
            self.fc, self.drop = linear(4, 3), nnx.Dropout(0.5)

        def __call__(self, x, rngs, train):
            return self.drop(self.fc(x), rngs=rngs) if train else x

    x, rngs = np.ones((2, 4), np.float32), nnx.Rngs(dropout=0)
    assert list(fc.make_plan(Flagged(), x, rngs=rngs, train=True)) == ["fc"]
    assert not fc.make_plan(Flagged(), x, rngs=rngs, train=False)
    assert int(rngs.dropout.count[...]) == 0


@needs("flax", "0.12.1")
def test_weight_norm_is_left():
    model = nnx.WeightNorm(linear(4, 3), rngs=nnx.Rngs(0))
    plan = fc.make_plan(model, np.ones((2, 4), np.float32))
    assert not plan
    assert "transformed on the way" in plan.skipped["layer_instance"]


def test_a_kernel_that_the_model_also_reads_is_left():
    class Decorrelated(nnx.Module):
        def __init__(self):
            self.fc, self.other = linear(4, 4), linear(4, 4)

        def __call__(self, x):
            y = jax.nn.relu(self.fc(x))
            return self.other(y), y @ self.fc.kernel[...].T

    plan = fc.make_plan(Decorrelated(), np.ones((2, 4), np.float32))
    assert list(plan) == ["other"]
    assert "also read outside of the layer's own call" in plan.skipped["fc"]


class Tied(nnx.Module):
    def __init__(self, second):
        self.fc = linear(4, 4)
        self.second = second
        self.second.kernel = self.fc.kernel

    def __call__(self, x):
        return self.second(nnx.relu(self.fc(x)))


def test_tied_params_convert_together_or_not_at_all():
    x = np.ones((2, 4), np.float32)
    plan = fc.make_plan(Tied(linear(4, 4)), x)
    assert list(plan) == ["fc", "second"]
    assert (plan["fc"].tied, plan["second"].tied) == ((), ("kernel",))
    assert fc.Plan.from_json(plan.to_json()) == plan
    plan = fc.make_plan(Tied(linear(4, 4)), x, rules=["second=skip"])
    assert not plan
    assert "tied to that of 'second'" in plan.skipped["fc"]


def test_shared_module_is_planned_once():
    class Shared(nnx.Module):
        def __init__(self):
            self.a = linear(4, 4)
            self.b = self.a

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    assert list(fc.make_plan(Shared(), np.ones((2, 4), np.float32))) == ["a"]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.fc(x))


def stack(axis=0, depth=3):
    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis}))
    def make(rngs):
        return Block(rngs)

    return make(nnx.Rngs(0))


class Scanned(nnx.Module):
    def __init__(self, axis=0, depth=3):
        self.axis = axis
        self.blocks = stack(axis, depth)

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: None})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(self.blocks, x)


class Mapped(Scanned):
    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: self.axis, ...: None})
        return nnx.vmap(lambda m, x: m(x), in_axes=(axes, None))(self.blocks, x)


@pytest.mark.parametrize("model", [Scanned, Mapped])
@pytest.mark.parametrize("depth", [3, 4])  # 4 is as large as the other axes
def test_stacks_of_layers(model, depth):
    x = np.ones((2, 4), np.float32)
    plan = make_plan(lambda: model(depth=depth), x)
    assert plan["blocks/fc"].stack_axes == (0,)
    assert plan["blocks/fc"].kernel.target == (1, 4, 4)


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat])
def test_layers_under_transforms(wrap):
    class Wrapped(nnx.Module):
        def __init__(self):
            self.fc = linear(4, 4)

        def __call__(self, x):
            return wrap(lambda m, x: m(x))(self.fc, wrap(lambda m, x: m(x))(self.fc, x))

    assert list(fc.make_plan(Wrapped(), np.ones((2, 4), np.float32))) == ["fc"]


def test_recurrent_cells():
    def make():
        return nnx.RNN(nnx.LSTMCell(4, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    plan = make_plan(make, np.ones((2, 3, 4), np.float32))
    assert len(plan) == 8
    assert dict(plan.skipped) == {}


class Inner(nnx.Module):
    """With parameters, statistics and randomness, to stand inside a linen model."""

    def __init__(self, features, *, rngs):
        self.fc = nnx.Linear(4, features, rngs=rngs)
        self.bn = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.w = nnx.Param(jnp.ones((features, 2)))

    def __call__(self, x):
        return self.dropout(self.bn(nnx.relu(self.fc(x)))) @ self.w[...]


def test_nnx_inside_linen_converts_by_its_matmuls(assert_close):
    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4)(x)
            return nnx.bridge.ToLinen(Inner, args=(5,), name="inner")(x)

    model, x = Outer(), jax.random.normal(jax.random.key(1), (6, 4))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(2)}
    variables = model.init(rngs, x)
    plan = fc.make_plan(model, x, rngs=rngs)
    assert set(plan) == {"Dense_0", "inner/fc/kernel", "inner/w"}
    moved, conv = fc.convert_params(variables, plan), fc.convert_model(model, plan)
    options = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"]}
    outputs = conv.apply(moved, x, **options)
    assert_close(outputs, lambda v: model.apply(v, x, **options), variables)
    assert_trees_all_equal(conv.init(rngs, x)["params"], moved["params"])


def test_another_kind_of_model_is_refused():
    with pytest.raises(TypeError, match=r"got str\. Pass a .*flax\.nnx Module"):
        fc.make_plan("model", X)
    with pytest.raises(fc.PlanError, match="to='conv' or to='dense'"):
        make_plan(Net, X, to="einsum")


def test_a_linen_model_may_be_converted_before_it_is_wrapped(assert_close):
    x = np.ones((2, 4), np.float32)
    inner = linen.Dense(3)
    conv: Any = fc.convert_model(inner, fc.make_plan(inner, x))
    wrapped, plain = (
        nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x)
        for module in (conv, inner)
    )
    assert wrapped.kernel.shape == (1, 4, 3)  # pyright: ignore
    graphdef, state = nnx.split(plain)
    assert_close(wrapped(x), lambda state: nnx.merge(graphdef, state)(x), state)
