from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc

normal = nn.initializers.normal()


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Matmul(nn.Module):
    """A layer of its own class, between two of Flax's."""

    shape: tuple[int, ...]
    multiply: str
    w_init: nn.initializers.Initializer = normal

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="before")(x)
        w = self.param("w", self.w_init, self.shape)
        x = {
            "matmul": lambda: x @ w,
            "transposed": lambda: x @ w.T,
            "heads": lambda: jnp.einsum("btc,chd->bthd", x, w),
            "experts": lambda: jnp.einsum("btc,eco->beto", x, w),
            "lax": lambda: jax.lax.dot_general(w, x, (((1,), (2,)), ((), ()))),
            "scaled": lambda: x @ (w * 2).astype(x.dtype),
        }[self.multiply]()
        return nn.Dense(3, name="after")(nn.relu(x))


@pytest.mark.parametrize(
    ("multiply", "shape", "kernel"),
    [
        ("matmul", (4, 5), (1, 4, 5)),
        ("transposed", (5, 4), (1, 4, 5)),
        ("heads", (4, 2, 3), (1, 4, 6)),
        ("experts", (3, 4, 5), (1, 4, 15)),
        ("lax", (5, 4), (1, 4, 5)),
        ("scaled", (4, 5), (1, 4, 5)),
    ],
)
def test_one_plan_takes_layers_and_matmuls(check, multiply, shape, kernel):
    case = check(Matmul(shape, multiply), zeros(2, 3, 4))
    assert set(case.plan) == {"before", "w", "after"}
    assert case.plan["w"].kernel.target == kernel
    assert {path for path in case.plan if case.plan[path].is_matmul} == {"w"}
    assert not case.plan.skipped
    ends = {line.split()[0]: line.split()[-1] for line in str(case.plan).split("\n")}
    assert (ends["before"], ends["w"], ends["after"]) == ("layer", "matmul", "layer")
    assert case.plan.matmuls.keys() == {"w"}


def test_a_window_is_read_off_a_flatten_before_an_own_matmul(check):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
            x = nn.relu(x @ self.param("fc6", normal, (x.shape[-1], 6)))
            return nn.Dense(3)(x)

    case = check(Net(), zeros(2, 3, 5, 2))
    assert case.plan["fc6"].order == "CHW"
    assert case.plan["fc6"].kernel.target == (3, 5, 4, 6)


def test_layers_of_flax_without_a_swap_convert_by_their_matmuls(check):
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Einsum((4, 5), "...j,jk->...k")(x)
            return nn.ConvLocal(3, (2,), name="local")(nn.ConvTranspose(4, (2,))(x))

    case = check(Raw(), zeros(2, 3, 4))
    # The kernel of ConvTranspose is that of a convolution already.
    assert set(case.plan) == {"Einsum_0/kernel", "local/kernel"}
    assert case.plan["local/kernel"].groups == 3
    plan = fc.make_plan(Raw(), zeros(2, 3, 4), to="dense")
    assert set(plan.skipped) == {"ConvTranspose_0/kernel"}


def test_a_transposed_convolution_on_one_position_is_dense(check):
    model = nn.ConvTranspose(3, (1, 1), padding="VALID")
    case = check(model, zeros(2, 1, 1, 4), to="dense")
    assert case.plan["kernel"].kernel.target == (4, 3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4)(x)
        return x @ self.param("w", normal, (4, 4)), None


@pytest.mark.parametrize("axis", [0, 1])
def test_stacks(check, axis):
    scanned = nn.scan(
        nn.remat(Block),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
    )
    mapped = nn.vmap(
        Block, in_axes=0, variable_axes={"params": axis}, split_rngs={"params": True}
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, _ = scanned(name="scanned")(x, None)
            x, _ = mapped(name="mapped")(x)
            return x

    case = check(Net(), zeros(2, 4))
    assert set(case.plan) == {
        f"{name}/{leaf}" for name in ("scanned", "mapped") for leaf in ("Dense_0", "w")
    }
    assert case.plan["scanned/w"].stack_axes == (axis,)
    # The stack of vmap meets its own row of the batch: groups side by side.
    assert case.plan["mapped/w"].groups == 2


def test_partitioned_parameters_keep_their_names(check):
    model = Matmul((4, 5), "matmul", nn.with_partitioning(normal, ("in", "out")))
    x = zeros(2, 3, 4)
    plan = fc.make_plan(model, x)
    variables: Any = model.init(jax.random.key(0), jnp.ones(x.shape))
    moved = fc.convert_params(variables, plan)
    assert moved["params"]["w"].names == (None, "in", "out")
    there = fc.convert_model(model, plan).init(jax.random.key(0), jnp.ones(x.shape))
    assert there["params"]["w"].names == (None, "in", "out")
    y = fc.convert_model(model, plan).apply(moved, jnp.ones(x.shape))
    assert y.shape == (2, 3, 3)


# ------------------------------------------------------------ what does not


def test_a_tied_table_is_left_and_a_head_alone_converts(check):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = self.param("table", normal, (7, 4))
            x = jnp.tanh(table[ids]) @ self.param("w", normal, (4, 4))
            return x @ table.T

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(7, 4, name="head").attend(x)

    plan = fc.make_plan(Tied(), zeros(2, 3, dtype=jnp.int32))
    assert set(plan) == {"w"}
    assert "Tied uses its own parameter 'table' (7, 4)" in plan.skipped["table"]
    assert "read by index" in plan.skipped["table"]
    assert set(check(Head(), zeros(2, 4)).plan) == {"head/embedding"}


def test_a_declined_layer_does_not_come_back_as_a_matmul():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="own_dot", dot_general=jax.lax.dot_general)(x)
            x = nn.Dense(4, name="plain")(x)
            return x @ self.param("w", normal, (4, 4))

    x = zeros(2, 4)
    plan = fc.make_plan(Net(), x)
    assert set(plan) == {"plain", "w"}
    assert "dot_general" in plan.skipped["own_dot"]
    plan = fc.make_plan(Net(), x, rules=["plain=skip"])
    assert set(plan) == {"w"}
    assert "excluded by rule" in plan.skipped["plain"]
    plan = fc.make_plan(Net(), x, rules=["w=skip"])
    assert set(plan) == {"plain"}
    assert "excluded by rule" in plan.skipped["w"]
    plan = fc.make_plan(Net(), x, rules=["w=2", "plain=2x2"])
    assert plan["w"].window == (2,)
    assert plan["plain"].window == (2, 2)
    with pytest.raises(fc.PlanError, match=r"matches no linear layer.*'plain'"):
        fc.make_plan(Net(), x, rules=["plane=skip"])


def test_what_is_only_added_is_neither_planned_nor_left(check):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x + self.param("positions", normal, (5, 4)))

    case = check(Net(), zeros(2, 5, 4))
    assert set(case.plan) == {"Dense_0"}
    assert not case.plan.skipped


def test_a_model_whose_apply_takes_other_inputs_than_init():
    class Cached(nn.Module):
        strict: bool = False

        @nn.compact
        def __call__(self, x):
            filled = self.has_variable("cache", "seen")
            seen = self.variable("cache", "seen", jnp.zeros, x.shape)
            if filled or (self.strict and not self.is_initializing()):
                raise ValueError("one token at a time")
            return x @ self.param("w", normal, (4, 3)) + 0 * seen.value.sum()

    assert set(fc.make_plan(Cached(), zeros(2, 4))) == {"w"}
    plan = fc.make_plan(Cached(strict=True), zeros(2, 4))
    assert not plan
    assert "raises ValueError: one token at a time" in plan.skipped["w"]


def test_init_and_apply_are_traced_once_each():
    traced = []

    class Net(nn.Module):
        own: bool

        @nn.compact
        def __call__(self, ids):
            traced.append(self.is_initializing())
            x = nn.LayerNorm()(nn.Dense(4)(nn.Embed(7, 4)(ids)))
            return x @ self.param("w", normal, (4, 3)) if self.own else x

    for own in (False, True):
        traced.clear()
        fc.make_plan(Net(own), zeros(2, dtype=jnp.int32))
        assert traced == [True, False]


def test_an_object_around_a_linen_module_is_refused_with_the_way_out():
    class Pretrained:
        """As transformers' FlaxPreTrainedModel: a module, its params, and a call."""

        module = nn.Dense(3)

        def __call__(self, x, params: Any = None):
            return self.module.apply({"params": params}, x)

    model, x = Pretrained(), zeros(2, 4)
    for refused in (
        lambda: fc.make_plan(model, x),
        lambda: fc.convert_model(model, fc.Plan("conv")),
    ):
        with pytest.raises(TypeError, match=r"Pretrained.* Pass model\.module"):
            refused()
    params = {"kernel": zeros(4, 3), "bias": zeros(3)}
    plan = fc.make_plan(lambda params, x: model(x, params=params), params, x)
    assert set(plan) == {"kernel"}
