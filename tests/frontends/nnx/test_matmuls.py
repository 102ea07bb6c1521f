import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import needs
from flax import linen, nnx, serialization
from jax.sharding import PartitionSpec
from nnx_models import Stacked, assert_same, axis_names, module_list, named

import fcconv_jax as fc
from fcconv_jax.versions import raw_value, value_of


def whole(tree, seed=0, high=3):
    """Small whole numbers in the place of every float: sums of them are exact."""
    rng = np.random.default_rng(seed)

    def draw(a):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return jnp.asarray(rng.integers(-high, high, a.shape, endpoint=True), a.dtype)

    return jax.tree.map(draw, tree)


def with_whole_numbers(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, whole(params), rest)


def param(*shape):
    return nnx.Param(whole(jnp.zeros(shape), sum(shape)))


def linear(*shape, **kwargs):
    """A Linear that is quick to make."""
    return nnx.Linear(
        *shape, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0), **kwargs
    )


def assert_exact(model, *inputs, **options):
    """Converts a model: exact on whole numbers, there and back.

    Returns:
      The converted model.
    """
    plan = fc.make_plan(model, *inputs, **options)
    assert plan.matmuls
    assert not plan.skipped
    model = with_whole_numbers(model)
    inputs = whole(inputs, seed=1)
    other = fc.convert_model(model, plan)
    assert isinstance(other, type(model))
    assert type(other).__name__ == type(model).__name__
    state = nnx.state(model)
    assert_same(fc.convert_params(state, plan), nnx.state(other))
    run = nnx.jit(lambda m, *x: m(*x))
    assert_same(model(*inputs), other(*inputs))
    assert_same(run(model, *inputs), run(other, *inputs))
    jaxpr = str(jax.make_jaxpr(lambda *x: nnx.clone(other)(*x))(*inputs))
    before = str(jax.make_jaxpr(lambda *x: nnx.clone(model)(*x))(*inputs))
    gone = "dot_general" if plan.to == "conv" else "conv_general_dilated"
    assert before.count(f"{gone}[") > jaxpr.count(f"{gone}[") == 0
    assert nnx.graphdef(nnx.clone(other)) == nnx.graphdef(other)
    state = nnx.state(model)
    assert_same(fc.convert_params(state, plan), nnx.state(other))
    back = fc.convert_model(other, plan.inverse())
    assert type(back) is type(model)
    assert nnx.graphdef(back) == nnx.graphdef(model)
    assert_same(nnx.state(back), state)
    return other


X = jnp.zeros((2, 3, 4))


class Own(nnx.Module):
    """Matmuls of its own, in the ways people write them."""

    def __init__(self):
        self.w, self.turned, self.scaled = param(4, 5), param(6, 5), param(2, 4)
        self.heads, self.fc = param(6, 2, 2), linear(4, 4)

    def __call__(self, x):
        x = nnx.relu(self.fc(x) @ self.w)
        x = jnp.einsum("btc,chd->bthd", x @ self.turned.T, self.heads[...])
        return x @ (self.scaled[...].astype(jnp.float32) * 2)


class Scaled(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Adapted(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.lora = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        self.scaled = Scaled(3, 4, rngs=rngs)
        self.wrapped = nnx.LoRA(4, 2, 4, base_module=linear(4, 4), rngs=rngs)

    def __call__(self, x):
        return self.wrapped(self.scaled(self.lora(x)))


def test_own_matmuls_are_exact():
    other = assert_exact(Own(), X)
    assert isinstance(other.fc, nnx.Conv)
    assert (other.w.shape, other.heads.shape) == ((1, 4, 5), (1, 6, 4))


def test_adapters_and_subclasses_are_exact():
    other = assert_exact(Adapted(), X)
    assert isinstance(other.lora, nnx.LoRALinear)
    assert isinstance(other.scaled, Scaled)
    # A part that is called by itself is converted as well.
    model = with_whole_numbers(Adapted())
    other = fc.convert_model(model, fc.make_plan(model, X))
    assert_same(model.lora(X + 1), other.lora(X + 1))
    assert_same(model.lora.lora(X + 1), other.lora.lora(X + 1))


class Block(nnx.Module):
    def __init__(self):
        self.fc, self.w = linear(4, 4), param(4, 4)

    def __call__(self, x):
        return nnx.relu(self.fc(x) @ self.w) - 3


@pytest.mark.parametrize(
    ("axis", "run"),
    [(0, "scan"), (1, "scan"), (-1, "scan"), (0, "vmap"), (1, "vmap"), (0, "slice")],
)
def test_stacks_are_exact(axis, run):
    other = assert_exact(Stacked(Block, axis, run), X[0])
    if run == "scan" and axis >= 0:
        # The stack, run by other code than the model's, sees a layer at a time.
        model = with_whole_numbers(Stacked(Block, axis, run))
        other = fc.convert_model(model, fc.make_plan(model, X[0]))
        ins = (model.axes, nnx.Carry)
        scan = nnx.scan(lambda m, x: m(x), in_axes=ins, out_axes=nnx.Carry)
        assert_same(scan(model.blocks, X[0] + 1), scan(other.blocks, X[0] + 1))


class Inner(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(3)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(2, name="head")(linen.relu(x))

    def logits(self, x):
        return self(x) * 2


class Outer(nnx.Module):
    def __init__(self):
        inner = nnx.bridge.ToNNX(Inner(), rngs=nnx.Rngs(0)).lazy_init(X)
        self.fc, self.inner = linear(4, 4), inner

    def __call__(self, x, **kwargs):
        return self.inner(self.fc(x), **kwargs)


def test_linen_inside_nnx_by_itself_and_in_a_larger_model():
    lone = nnx.bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X)
    assert_exact(lone, X)
    model = Outer()
    plan = fc.make_plan(model, X)
    other = fc.convert_model(model, plan)
    x = jax.random.normal(jax.random.key(0), X.shape)
    np.testing.assert_allclose(model(x), other(x), atol=1e-6)
    options = {"train": True, "mutable": ["batch_stats"]}
    for _ in range(2):
        np.testing.assert_allclose(model(x, **options), other(x, **options), atol=1e-5)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert np.abs(stats["inner"]["BatchNorm_0"]["mean"]).max() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        stats,
        nnx.to_pure_dict(nnx.state(other, nnx.BatchStat)),
    )
    np.testing.assert_allclose(model.inner.logits(x), other.inner.logits(x), atol=1e-5)  # pyright: ignore
    assert isinstance(other.inner, nnx.bridge.ToNNX)


class Noisy(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.w, self.v, self.fc = param(4, 4), param(4, 3), linear(4, 4)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.drop(self.bn(self.fc(x) @ self.w)) @ self.v

    def features(self, x):
        return x @ self.w


def noisy():
    model = Noisy()
    plan = fc.make_plan(model, X)
    return model, plan, fc.convert_model(model, plan)


def test_statistics_and_random_streams_go_on_as_they_would():
    model, _, other = noisy()
    x, run = whole(X, seed=1), nnx.jit(lambda m, x: m(x))
    for _ in range(2):
        assert_same(run(model, x), other(x))
    for kind in (nnx.RngState, nnx.BatchStat, nnx.Not(nnx.Param)):
        assert_same(nnx.state(model, kind), nnx.state(other, kind))
    assert int(other.calls[...]) == int(other.drop.rngs.count[...]) == 2
    model.eval()
    other.eval()
    assert_same(run(model, x), other(x))
    assert_same(model.bn.mean[...], other.bn.mean[...])


def test_one_trace_per_shape_in_eager_calls_and_under_jit():
    traced = []

    class Counted(Noisy):
        def __call__(self, x):
            traced.append(1)
            return super().__call__(x)

    model = Counted()
    other = fc.convert_model(model, fc.make_plan(model, X))
    run = nnx.jit(lambda m, x: m(x))
    again = fc.convert_model(model, fc.make_plan(model, X))
    traced.clear()
    for m in (other, other, again):
        m(X)
    assert len(traced) == 1
    for m in (other, again):
        run(m, X)
    assert run(nnx.clone(other), X).shape == (2, 3, 3)
    assert len(traced) == 1


def test_gradients_and_an_optimizer_step_agree():
    model, plan, other = noisy()
    x = jax.random.normal(jax.random.key(0), X.shape)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss, grads

    results = []
    for net in (model, other):
        # Not adam: it makes a step of what is nothing but rounding in a gradient.
        tx = optax.sgd(1e-2, momentum=0.9)
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        results.append([step(net, optimizer, x) for _ in range(2)])
    for (loss, grads), (other_loss, there) in zip(*results):
        np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
        assert there["w"].shape == (1, 4, 4)
        back = fc.restore_params(there, plan)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(back), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    moved = fc.convert_params(nnx.state(model, nnx.Param), plan)
    for a, b in zip(
        jax.tree.leaves(moved), jax.tree.leaves(nnx.state(other, nnx.Param))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_methods_arguments_and_what_they_return():
    class Rich(Own):
        gain = 2

        @property
        def size(self):
            return self.w.shape

        @staticmethod
        def name():
            return "rich"

        def encode(self, x, *, rngs, act: Any = None, times=1):
            """Says more than arrays."""
            y = (x @ self.w) * jax.random.uniform(rngs.noise(), (5,)).round() * times
            return {"y": act(y) if act else y, "kind": "code", "times": times}

        def part(self):
            return self.fc

        def through(self, other, x):
            return other(x) @ self.w

    model = Rich()
    plan = fc.make_plan(model, X, rngs=nnx.Rngs(noise=0), method="encode")
    assert list(plan) == ["w"]
    other = fc.convert_model(model, plan)
    x = X + 1
    mine, yours = nnx.Rngs(noise=0), nnx.Rngs(noise=0)
    for options in ({}, {"act": nnx.relu}, {"times": 2}):
        want = model.encode(x, rngs=mine, **options)
        assert_same(want.pop("y"), (got := other.encode(x, rngs=yours, **options))["y"])
        assert want.items() <= got.items()
        assert type(got["times"]) is int
    assert_same(nnx.state(mine), nnx.state(yours))
    assert int(yours.noise.count[...]) == 3
    assert other.part() is other.fc
    assert_same(other.through(other.fc, x), model.through(model.fc, x))
    assert (other.name(), other.gain, other.size) == ("rich", 2, (4, 5))
    assert other.encode.__doc__ == "Says more than arrays."


@needs("flax", "0.12.6")
def test_what_a_method_changes_stays_changed():
    class Changing(nnx.Module):
        def __init__(self):
            self.w, self.v, self.steps = param(4, 4), param(4, 4), [0, 1]

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            y = x @ self.w
            self.last = "called"
            if hasattr(self, "__captures__"):
                self.sow(nnx.Intermediate, "y", y)
            return y @ self.v

        def shrink(self):
            self.w[...] = self.w[...] * 2

        def restart(self):
            self.w = nnx.Param(jnp.ones((4, 4)))

    model = Changing()
    plan = fc.make_plan(model, X)
    other = fc.convert_model(model, plan)
    x = whole(X, seed=1)
    kept = other.v
    run = nnx.capture(lambda m, x: m(x), nnx.Intermediate)
    for change in ("shrink", "restart"):
        (want, sown), (got, there) = run(model, x), run(other, x)
        assert_same(want, got)
        assert_same(sown, there)
        assert value_of(sown["y"])[0].shape == (2, 3, 4)
        getattr(model, change)()
        getattr(other, change)()
        assert_same(fc.convert_params(nnx.state(model), plan), nnx.state(other))
        assert_same(model(x), other(x))
    assert_same(other.seen[...], x)
    assert other.last == "called"
    assert other.v is kept
    back = fc.convert_model(other, plan.inverse())
    assert nnx.graphdef(back) == nnx.graphdef(model)
    assert_same(nnx.state(back), nnx.state(model))


def test_a_tied_parameter_stays_tied():
    class Tied(nnx.Module):
        def __init__(self):
            self.fc = linear(4, 4)
            self.w = self.fc.kernel

        def __call__(self, x):
            return nnx.relu(self.fc(x)) @ self.w

    other = assert_exact(Tied(), X)
    assert other.w is other.fc.kernel
    assert other.w.shape == (1, 4, 4)


def test_in_place_and_a_part_of_a_model():
    class Root(nnx.Module):
        def __init__(self):
            self.own, self.fc = Own(), linear(2, 3)

        def __call__(self, x):
            return self.fc(self.own(x).sum(2)[..., :2])

    model = with_whole_numbers(Root())
    x = whole(X, seed=1)
    want, graphdef = model(x), nnx.graphdef(model)
    own, w = model.own, model.own.w
    part = fc.make_plan(model.own, x)
    fc.convert_model(model.own, part, inplace=True)
    assert_same(want, model(x))
    assert model.own is own
    assert own.w is w
    plan = fc.make_plan(model, x)
    assert list(plan) == ["fc"]
    assert not plan.skipped
    assert fc.convert_model(model, plan, inplace=True) is model
    assert_same(want, model(x))
    fc.convert_model(model, plan.inverse(), inplace=True)
    fc.convert_model(model.own, part.inverse(), inplace=True)
    assert nnx.graphdef(model) == graphdef
    assert_same(want, model(x))


def test_a_part_converted_by_itself_stays_so_in_what_is_converted_around_it():
    class Pair(nnx.Module):
        def __init__(self):
            self.w, self.v = param(4, 4), param(4, 4)

        def __call__(self, x):
            return x @ self.w @ self.v

    class Root(nnx.Module):
        def __init__(self):
            self.pair, self.u = Pair(), param(4, 3)

        def __call__(self, x):
            return self.pair(x) @ self.u

    model, x = Root(), whole(X, seed=1)
    want, graphdef = model(x), nnx.graphdef(model)
    part = fc.make_plan(model.pair, x, rules=["v=skip"])
    fc.convert_model(model.pair, part, inplace=True)
    plan = fc.make_plan(model, x)
    assert list(plan) == ["pair/v", "u"]
    fc.convert_model(model, plan, inplace=True)
    assert_same(want, model(x))
    assert "dot_general[" not in str(jax.make_jaxpr(model)(x))
    fc.convert_model(model, plan.inverse(), inplace=True)
    assert_same(want, model(x))
    fc.convert_model(model.pair, part.inverse(), inplace=True)
    assert nnx.graphdef(model) == graphdef


def test_a_plan_from_the_converted_model_goes_back():
    model = Own()
    other = fc.convert_model(model, fc.make_plan(model, X, rules=["fc=skip"]))
    plan = fc.make_plan(other, X, to="dense")
    assert set(plan) == {"w", "turned", "scaled", "heads"}
    with pytest.raises(fc.PlanError, match="is already converted by another"):
        fc.convert_model(other, plan)
    plan = fc.make_plan(other, X, to="dense", rules=["[!w]*=skip"])
    back = fc.convert_model(other, plan)
    assert (back.w.shape, back.heads.shape) == ((4, 5), (1, 6, 4))
    assert_same(model(X + 1), back(X + 1))


def test_own_convolutions_to_dense():
    class Patches(nnx.Module):
        def __init__(self):
            self.w = param(2, 2, 3, 6)

        def __call__(self, x):
            return jax.lax.conv_general_dilated(
                x,
                self.w[...],
                (2, 2),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

    other = assert_exact(Patches(), jnp.zeros((2, 4, 6, 3)), to="dense")
    assert other.w.shape == (12, 6)


def test_names_of_axes_follow_and_the_code_sees_its_own():
    seen = []

    class Named(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 6)), **named(("embed", "mlp")))

        def __call__(self, x):
            seen.append(axis_names(self.w))
            return x @ self.w

    model = Named()
    plan = fc.make_plan(model, X, rules=["w=2x1"])
    other = fc.convert_model(model, plan)
    assert axis_names(other.w) == ("embed", None, None, "mlp")
    specs = fc.convert_params(nnx.get_partition_spec(nnx.state(model)), plan)
    want = PartitionSpec("embed", None, None, "mlp")
    assert raw_value(specs["w"]) == want
    seen.clear()
    other(X)
    assert seen == [("embed", "mlp")]
    assert axis_names(other.w) == ("embed", None, None, "mlp")
    back = fc.convert_model(other, plan.inverse())
    assert back.w.get_metadata() == model.w.get_metadata()


def test_mistakes_are_named_and_leave_the_model_whole():
    model = Own()
    plan = fc.make_plan(model, X)
    other = fc.convert_model(model, plan)
    with pytest.raises(fc.PlanError, match="'fc' is already converted"):
        fc.convert_model(other, plan)
    with pytest.raises(fc.PlanError, match=r"with the parameter 'w'"):
        fc.convert_model(Adapted(), fc.make_plan(model, X, rules=["fc=skip"]))
    broken = Own()
    broken.turned = param(6, 4)
    before = nnx.graphdef(broken)
    with pytest.raises(fc.PlanError, match=r"'turned' of shape .*, got \(6, 4\)"):
        fc.convert_model(broken, plan, inplace=True)
    assert nnx.graphdef(broken) == before
    nnx.update(other, nnx.state(model, nnx.PathContains("w")))
    with pytest.raises(fc.PlanError, match=r"Expected 'w' of shape .*, got \(4, 5\)"):
        other(X)

    class Turned(nnx.Module):
        def __init__(self):
            self.w, self.turned = param(4, 4), False

        def __call__(self, x):
            return x @ (self.w.T if self.turned else self.w[...])

    turned = Turned()
    other = fc.convert_model(turned, fc.make_plan(turned, X))
    other.turned = True
    with pytest.raises(fc.PlanError, match=r"'w' .* multiplied in another way"):
        other(X)


def test_it_is_proved():
    model = Adapted()
    model.lora.lora.lora_b[...] = jnp.ones((2, 3))
    plan = fc.make_plan(model, X)
    x = jax.random.normal(jax.random.key(0), X.shape)
    report = fc.verify(model, None, x, plan=plan)
    assert report.passed, str(report)
    assert [layer.path for layer in report.layers] == list(plan)
    wrong = nnx.to_pure_dict(fc.convert_params(nnx.state(model, nnx.Param), plan))
    wrong["lora"]["lora"]["lora_a"] += 1
    report = fc.verify(
        model, None, x, plan=plan, converted_params=wrong, gradients=False
    )
    assert any("lora/lora/lora_a" in failure for failure in report.failures)
    assert any("output" in failure for failure in report.failures)


def test_display_and_states_that_are_stored(tmp_path):
    model = Own()
    plan = fc.make_plan(model, X)
    other = fc.convert_model(model, plan)
    nnx.display(other)
    assert repr(other).startswith("Own(")
    assert "LayerPlan" not in repr(other)
    state = nnx.to_pure_dict(nnx.state(model))
    src = tmp_path / "own.msgpack"
    src.write_bytes(serialization.msgpack_serialize(state))
    fc.convert_checkpoint(src, tmp_path / "conv.msgpack", plan)
    content = (tmp_path / "conv.msgpack").read_bytes()
    stored = serialization.msgpack_restore(content)
    assert stored["w"].tobytes() == np.asarray(other.w[...]).tobytes()
    assert stored["heads"].shape == other.heads.shape
    fc.restore_checkpoint(tmp_path / "conv.msgpack", tmp_path / "back.msgpack")
    back = serialization.msgpack_restore((tmp_path / "back.msgpack").read_bytes())
    assert_same(back, jax.tree.map(np.asarray, state))


class Everything(nnx.Module):
    """A parameter that is read in every way that Python has."""

    def __init__(self):
        self.w = nnx.Param(jnp.arange(20.0).reshape(4, 5))

    def __call__(self, x):
        return x @ self.w[...]

    def __getitem__(self, i):
        return self.w[...][i]

    def __matmul__(self, x):
        return x @ self.w[...]

    def __iter__(self):
        yield from self.w[...]

    def __len__(self):
        return self.w[...].shape[0]

    @property
    def diagonal(self):
        return self.w[...].diagonal()

    @diagonal.setter
    def diagonal(self, value):
        self.w[...] = self.w[...] + value

    def encoder(self):
        return lambda x: x @ self.w[...]


def test_special_methods_and_properties_see_the_parameter_as_they_know_it():
    model, x = Everything(), jnp.ones((2, 4))
    other = fc.convert_model(model, fc.make_plan(model, x))
    assert other.w.shape == (1, 4, 5)
    for read in (
        lambda m: m(x),
        lambda m: m[1],
        lambda m: m @ x,
        lambda m: m.diagonal,
        lambda m: len(m),
        lambda m: list(m),
    ):
        jax.tree.map(np.testing.assert_array_equal, read(other), read(model))


def test_a_converted_model_is_pickled():
    model, x = Everything(), jnp.ones((2, 4))
    other = fc.convert_model(model, fc.make_plan(model, x))
    again = pickle.loads(pickle.dumps(other))
    assert type(again) is type(other)
    np.testing.assert_array_equal(again(x), model(x))
    np.testing.assert_array_equal(copy.deepcopy(other)(x), model(x))


class Lazy(nnx.Module):
    """Returns iterators, and functions of its parameter."""

    def __init__(self):
        self.w = nnx.Param(jnp.arange(20.0).reshape(4, 5))
        self.parts = module_list([nnx.Linear(5, 2, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return x @ self.w[...]

    def __iter__(self):
        return iter([self.w[...], self.w[...].T])

    def __reversed__(self):
        return map(jnp.sum, self.w[...])

    def layers(self):
        return iter(self.parts)

    def now(self):
        w = self.w[...]
        return lambda x: x @ w

    def later(self):
        return lambda x: x @ self.w[...]

    def partial(self, scale):
        return functools.partial(jnp.matmul, b=self.w[...] * scale)

    def bound(self):
        return self.__call__

    def both(self):
        w = self.w[...]
        return lambda x: x @ w + x @ self.w[...]


def test_iterators_and_functions_see_the_parameter_as_they_know_it():
    model, x = Lazy(), jnp.ones((2, 4))
    other = fc.convert_model(model, fc.make_plan(model, x))
    assert other.w.shape == (1, 4, 5)
    for read in (
        list,
        lambda m: next(iter(m)),
        lambda m: list(reversed(m)),
        lambda m: [layer(jnp.ones(5)) for layer in m.layers()],
        lambda m: m.now()(x),
        lambda m: m.later()(x),
        lambda m: m.partial(2.0)(x),
        lambda m: m.bound()(x),
        lambda m: nnx.jit(lambda m, x: m.now()(x) + m.later()(x))(m, x),
    ):
        jax.tree.map(np.testing.assert_array_equal, read(other), read(model))
    assert [layer is other.parts[0] for layer in other.layers()] == [True]


def test_a_returned_function_reads_the_parameter_when_the_original_does():
    model, x = Lazy(), jnp.ones((2, 4))
    other = fc.convert_model(model, fc.make_plan(model, x))
    functions = [(m.now(), m.later()) for m in (model, other)]
    for m in (model, other):
        m.w[...] = m.w[...] * 2
    (now, later), (other_now, other_later) = functions
    np.testing.assert_array_equal(other_now(x), now(x))
    np.testing.assert_array_equal(other_later(x), later(x))
    assert not np.array_equal(other_now(x), other_later(x))
    with pytest.raises(fc.PlanError, match=r"Lazy\.both returns functions that hold"):
        other.both()
