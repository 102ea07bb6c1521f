"""Models whose own code reads the parameters of a layer: it sees what it knows."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import integers

import fcconv_jax as fc

KEY = jax.random.key(0)
X = np.random.default_rng(0).integers(-3, 4, (2, 4, 3, 2)).astype(np.float32)


class Flat(nn.Module):
    """A full-window layer of which a subclass reads the kernel."""

    def setup(self):
        self.fc = nn.Dense(6)

    def __call__(self, x):
        return self.read(self.fc(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)))

    def kernel(self, name="kernel"):
        return self.fc.variables["params"][name]


class Tied(Flat):
    def read(self, y):
        return y @ self.kernel().T


class Norm(Flat):
    def read(self, y):
        return y, (self.kernel() ** 2).sum(0)


class Rows(Flat):
    def read(self, y):
        return self.kernel()[jnp.array([3, 5])] + y[0, 0]


class Penalty(Flat):
    def read(self, y):
        w = self.kernel()
        return y, w.T @ w - jnp.eye(6)


class Bias(Flat):
    def read(self, y):
        return y * self.kernel("bias")


class Window(Flat):
    """Multiplied by the transpose, with as many outputs as a window has entries."""

    def read(self, y):
        return nn.relu(y[:, :, None] * self.kernel().T).sum(1)


@pytest.mark.parametrize("model", [Tied(), Norm(), Rows(), Penalty(), Bias(), Window()])
def test_reads_see_the_parameter_as_the_code_knows_it(model):
    plan = fc.make_plan(model, X)
    assert plan["fc"].window == (4, 3)
    assert plan["fc"].order == "CHW"
    variables = integers(jax.eval_shape(model.init, KEY, X))
    moved = fc.convert_params(variables, plan)
    want = model.apply(variables, X)
    got = fc.convert_model(model, plan).apply(moved, X)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # The layer itself is a convolution all the same.
    jaxpr = jax.make_jaxpr(fc.convert_model(model, plan).apply)(moved, X)
    assert str(jaxpr).count("conv_general_dilated") == 1

    def loss(apply):
        return lambda v: sum((y**2).sum() for y in jax.tree.leaves(apply(v, X)))

    before = jax.grad(loss(model.apply))(variables)
    after = jax.grad(loss(fc.convert_model(model, plan).apply))(moved)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b),
        fc.restore_params(after, plan),
        before,
    )


def test_a_method_that_returns_a_kernel():
    model, x = Norm(), X
    plan = fc.make_plan(model, x)
    variables = model.init(KEY, x)
    moved = fc.convert_params(variables, plan)
    got = fc.convert_model(model, plan).apply(moved, method="kernel")
    np.testing.assert_array_equal(got, variables["params"]["fc"]["kernel"])


class Subclass(nn.Dense):
    @nn.compact
    def __call__(self, x):
        y = super().__call__(x)
        return y / jnp.abs(self.variables["params"]["kernel"]).sum(0)


def test_a_subclass_that_reads_its_own_kernel(assert_close):
    model, x = Subclass(3), np.ones((2, 4), np.float32)
    variables, plan = model.init(KEY, x), fc.make_plan(model, x)
    got = fc.convert_model(model, plan).apply(fc.convert_params(variables, plan), x)
    assert_close(got, lambda v: model.apply(v, x), variables)


class Penalised(nn.Module):
    """Gradients of parameters inside of the model."""

    @nn.compact
    def __call__(self, x):
        def f(layer, x):
            return (layer(x) ** 2).sum()

        y, pullback = nn.vjp(f, nn.Dense(3, name="fc"), x)
        gradients, _ = pullback(jnp.ones_like(y))
        return gradients["params"]["kernel"] if "params" in gradients else gradients


def test_gradients_inside_the_model_have_its_own_shapes():
    model, x = Penalised(), np.ones((2, 4), np.float32)
    variables, plan = model.init(KEY, x), fc.make_plan(model, x)
    want = model.apply(variables, x)
    got = fc.convert_model(model, plan).apply(fc.convert_params(variables, plan), x)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)


def test_an_interceptor_of_the_user_counts_while_its_context_lasts():
    model, x = nn.Dense(3), np.ones((2, 4), np.float32)
    variables, plan = model.init(KEY, x), fc.make_plan(model, x)
    converted, moved = (
        fc.convert_model(model, plan),
        fc.convert_params(variables, plan),
    )

    def doubled(next_fun, args, kwargs, context):
        return 2 * next_fun(*args, **kwargs)

    plain = converted.apply(moved, x)
    for context, times in (
        (contextlib.nullcontext(), 1),
        (nn.intercept_methods(doubled), 2),
        (contextlib.nullcontext(), 1),
    ):
        with context:
            np.testing.assert_array_equal(converted.apply(moved, x), times * plain)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, i):
        heads = [lambda m, x, j=j: nn.Dense(3, name=f"h{j}")(x) for j in range(3)]
        if self.is_mutable_collection("params"):
            for head in heads:
                head(self, x)
        return nn.switch(i, heads, self, x)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_layers_in_the_branches_of_a_switch(i):
    model, x = Branches(), np.arange(8, dtype=np.float32).reshape(2, 4)
    plan = fc.make_plan(model, x, jnp.array(0))
    assert list(plan) == ["h0", "h1", "h2"]
    variables = integers(model.init(KEY, x, jnp.array(0)))
    got = fc.convert_model(model, plan).apply(
        fc.convert_params(variables, plan), x, jnp.array(i)
    )
    np.testing.assert_array_equal(got, model.apply(variables, x, jnp.array(i)))


class Ruled(nn.Module):
    """A derivative rule of its own around a layer."""

    @nn.compact
    def __call__(self, x):
        def f(layer, x):
            return layer(x)

        def forward(layer, x):
            return nn.vjp(f, layer, x)

        def backward(pullback, tangent):
            parameters, inputs = pullback(tangent)
            return jax.tree.map(lambda g: 2 * g, parameters), inputs

        rule = nn.custom_vjp(f, forward, backward)
        return rule(nn.Dense(3, name="fc"), x)


def test_gradients_through_a_rule_of_the_model():
    model, x = Ruled(), np.arange(8, dtype=np.float32).reshape(2, 4)
    plan = fc.make_plan(model, x)
    variables = integers(jax.eval_shape(model.init, KEY, x))
    moved = fc.convert_params(variables, plan)
    converted = fc.convert_model(model, plan)
    want = jax.grad(lambda v: model.apply(v, x).sum())(variables)  # pyright: ignore
    got = jax.grad(lambda v: converted.apply(v, x).sum())(moved)
    jax.tree.map(np.testing.assert_array_equal, fc.restore_params(got, plan), want)


def test_a_plan_of_another_model_is_refused():
    x = np.ones((2, 4), np.float32)
    plan = fc.make_plan(nn.Dense(3), x)
    other = Penalised()
    converted = fc.convert_model(other, plan)
    with pytest.raises(fc.PlanError, match=r"with 'kernel'.*got .*'fc/kernel'"):
        converted.apply(other.init(KEY, x), x)
    with pytest.raises(fc.PlanError, match="Expected a Plan, got dict"):
        fc.convert_params(other.init(KEY, x), {})


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.sin(nn.Dense(4)(jnp.sin(nn.Dense(4)(x))))


class Deep(nn.Module):
    policy: object = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Pair, policy=self.policy)
        for i in range(3):
            x = block(name=f"d{i}")(x)
        return x


@pytest.mark.parametrize(
    ("policy", "saved"),
    [
        (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, True),
        (jax.checkpoint_policies.dots_saveable, True),
        (jax.checkpoint_policies.nothing_saveable, False),
        (None, False),
    ],
)
def test_what_a_remat_saves_stays(policy, saved):
    model, x = Deep(policy), np.ones((2, 4), np.float32)
    variables, plan = model.init(KEY, x), fc.make_plan(model, x)
    moved, converted = fc.convert_params(variables, plan), fc.convert_model(model, plan)

    def matmuls(apply, v):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda v: apply(v, x).sum()))(v))
        return jaxpr.count("dot_general[") + jaxpr.count("conv_general_dilated[")

    before = matmuls(model.apply, variables)
    assert matmuls(converted.apply, moved) == before
    assert (before < matmuls(Deep(None).apply, variables)) == saved


def test_a_norm_of_groups_is_no_window():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.GroupNorm(4)(nn.Dense(16)(x)))

    for shape in ((2, 8), (2, 1, 1, 8), (2, 5, 8)):
        layer = fc.make_plan(Grouped(), jnp.ones(shape))["head"]
        assert layer.case == "pointwise"


def test_flags_that_leave_the_layers_alone_leave_the_plan_alone():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3))(x).mean((1, 2))
            return nn.Dense(8)(nn.Dropout(0.5, deterministic=not train)(x))

    rngs = {"params": KEY, "dropout": KEY}
    plain = fc.make_plan(Dropped(), X)
    assert plain == fc.make_plan(Dropped(), X, train=True, rngs=rngs)
