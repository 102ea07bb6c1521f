import jax
import jax.numpy as jnp
import pytest
from conftest import needs
from flax import linen, nnx
from nnx_models import Stacked, references

import fcconv_jax as fc


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ones(*shape):
    return nnx.Param(jnp.ones(shape))


def linear(*shape, **kwargs):
    """A Linear that is quick to make."""
    return nnx.Linear(
        *shape, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0), **kwargs
    )


class Scaled(nnx.Linear):
    """A subclass with a call of its own."""

    def __call__(self, x):
        return super().__call__(x) * 2


class Matmul(nnx.Module):
    """A parameter of its own, between two of NNX's layers."""

    def __init__(self, multiply, shape):
        self.multiply = multiply
        self.before, self.after = linear(4, 4), linear(shape[-1], 3)
        self.w = ones(*shape)

    def __call__(self, x):
        x, w = self.before(x), self.w[...]
        x = {
            "matmul": lambda: x @ w,
            "transposed": lambda: jnp.einsum("btc,oc->bto", x, w)[..., : w.shape[1]],
            "heads": lambda: jnp.einsum("btc,chd->bthd", x, w),
            "experts": lambda: jnp.einsum("btc,eco->beto", x, w),
            "scaled": lambda: x @ (w * 2).astype(x.dtype),
        }[self.multiply]()
        return self.after(nnx.relu(x))


@pytest.mark.parametrize(
    ("multiply", "shape", "kernel"),
    [
        ("matmul", (4, 5), (1, 4, 5)),
        ("transposed", (6, 4), (1, 4, 6)),
        ("heads", (4, 2, 3), (1, 4, 6)),
        ("experts", (3, 4, 5), (1, 4, 15)),
        ("scaled", (4, 5), (1, 4, 5)),
    ],
)
def test_one_plan_takes_layers_and_matmuls(multiply, shape, kernel):
    plan = fc.make_plan(Matmul(multiply, shape), zeros(2, 3, 4))
    assert list(plan) == ["before", "after", "w"]
    assert plan["w"].kernel.target == kernel
    assert plan.matmuls.keys() == {"w"}
    assert not plan.skipped
    ends = {line.split()[0]: line.split()[-1] for line in str(plan).split("\n")}
    assert (ends["before"], ends["w"], ends["after"]) == ("layer", "matmul", "layer")
    assert fc.Plan.from_json(plan.to_json()) == plan


def test_a_window_is_read_off_a_flatten_before_an_own_matmul():
    class Net(nnx.Module):
        def __init__(self):
            self.w = ones(60, 6)

        def __call__(self, x):
            return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ self.w

    plan = fc.make_plan(Net(), zeros(2, 3, 5, 4))
    assert (plan["w"].order, plan["w"].kernel.target) == ("CHW", (3, 5, 4, 6))


def test_adapters_subclasses_and_an_embed_that_is_only_a_head():
    class Adapted(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.lora = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
            self.scaled = Scaled(4, 4, rngs=rngs)
            self.wrapped = nnx.LoRA(4, 2, 4, base_module=linear(4, 4), rngs=rngs)
            self.einsum = nnx.Einsum("bi,io->bo", (4, 4), rngs=rngs)
            self.head = nnx.Embed(7, 4, rngs=rngs)

        def __call__(self, x):
            x = self.wrapped(self.scaled(self.lora(x)))
            return self.head.attend(self.einsum(x))

    plan = fc.make_plan(Adapted(), zeros(2, 4))
    assert not plan.skipped
    assert plan.matmuls.keys() == {
        *("lora/kernel", "lora/lora/lora_a", "lora/lora/lora_b", "scaled/kernel"),
        *("wrapped/lora_a", "wrapped/lora_b", "einsum/kernel", "head/embedding"),
    }
    assert set(plan) - set(plan.matmuls) == {"wrapped/base_module"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args)},
        {"promote_dtype": lambda x, dtype: x},
    ],
)
def test_layers_with_parts_of_their_own_convert_by_their_matmuls(kwargs):
    plan = fc.make_plan(linear(4, 3, **kwargs), zeros(2, 4))
    assert list(plan) == ["kernel"]
    assert not plan.skipped


def test_a_param_that_scales_its_value_when_it_is_read():
    class Doubled(nnx.Param):
        def get_value(self, **kwargs):
            return super().get_value(**kwargs) * 2

        if not hasattr(nnx.Variable, "get_value"):  # Flax before 0.12.1
            value = property(lambda self: self.raw_value * 2)

    layer = linear(4, 3)
    layer.kernel = Doubled(layer.kernel[...])
    plan = fc.make_plan(layer, zeros(2, 4))
    assert list(plan) == ["kernel"]


class Block(nnx.Module):
    def __init__(self):
        self.fc = linear(4, 4)
        self.w = ones(4, 4)

    def __call__(self, x):
        return self.fc(nnx.relu(x @ self.w))


@pytest.mark.parametrize(
    ("axis", "run", "paths", "stack"),
    [
        (0, "scan", {"blocks/fc", "blocks/w"}, (0,)),
        (1, "scan", {"blocks/fc/kernel", "blocks/w"}, (1,)),
        (-1, "scan", {"blocks/fc/kernel", "blocks/w"}, (2,)),
        (0, "slice", {"blocks/fc/kernel", "blocks/w"}, (0,)),
        (1, "vmap", {"blocks/fc/kernel", "blocks/w"}, ()),
    ],
)
def test_stacks(axis, run, paths, stack):
    plan = fc.make_plan(nnx.eval_shape(lambda: Stacked(Block, axis, run)), zeros(2, 4))
    assert set(plan) == paths
    assert not plan.skipped
    if run != "vmap" or axis == 0:
        assert {layer.stack_axes for layer in plan.values()} == {stack}


def test_rules_name_a_matmul_or_the_layer_that_it_is_of():
    model = Matmul("matmul", (4, 6))
    plan = fc.make_plan(model, zeros(2, 4), rules=["w=skip"])
    assert list(plan) == ["before", "after"]
    assert "excluded by rule 'w'" in plan.skipped["w"]
    assert "Matmul uses its own parameter 'w' (4, 6)" in plan.skipped["w"]
    plan = fc.make_plan(model, zeros(2, 4), rules=["w=2x1", "*=skip"])
    assert plan["w"].window == (2, 1)
    plan = fc.make_plan(model, zeros(2, 4), rules=["*<20=skip"])
    assert list(plan) == ["w"]
    stacked = nnx.eval_shape(lambda: Stacked(Block, 1, "scan"))
    for rule in ("blocks/fc=skip", "blocks/fc/kernel=skip"):
        plan = fc.make_plan(stacked, zeros(2, 4), rules=[rule])
        assert list(plan) == ["blocks/w"]
        assert "stacked on axis 1" in plan.skipped["blocks/fc"]
        assert f"excluded by rule {rule[:-5]!r}" in plan.skipped["blocks/fc"]
    plan = fc.make_plan(stacked, zeros(2, 4), rules=["blocks/fc=keep", "*=flat"])
    layouts = {path: layer.layout for path, layer in plan.items()}
    assert layouts == {"blocks/fc/kernel": "keep", "blocks/w": "flat"}
    with pytest.raises(fc.PlanError, match=r"matches no linear layer.*'w'"):
        fc.make_plan(model, zeros(2, 4), rules=["v=skip"])


class Tied(nnx.Module):
    """A plain Linear and another layer with its kernel, or a matmul with it."""

    def __init__(self, second):
        self.fc = linear(4, 4)
        self.second = second
        if isinstance(second, nnx.Linear):
            second.kernel = self.fc.kernel
        else:
            self.w = self.fc.kernel

    def __call__(self, x):
        x = nnx.relu(self.fc(x))
        if isinstance(self.second, nnx.Linear):
            return self.second(x)
        return x @ (self.w.T if self.second == "transposed" else self.w[...])


def test_a_tied_parameter_converts_for_all_its_uses_or_for_none():
    for second in (type("Mine", (nnx.Linear,), {})(4, 4, rngs=nnx.Rngs(0)), "plain"):
        plan = fc.make_plan(Tied(second), zeros(2, 4))
        assert list(plan) == ["fc/kernel"]
        assert not plan.skipped
    plan = fc.make_plan(Tied("transposed"), zeros(2, 4))
    assert not plan
    assert "multiplied in two roles" in plan.skipped["fc"]


def test_layers_tied_to_one_that_cannot_convert_as_a_layer():
    class Three(nnx.Module):
        """``b`` is also read elsewhere, by its bias; ``a`` has its kernel."""

        def __init__(self):
            self.a, self.b = linear(4, 4), linear(4, 4)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x)) + self.b.bias[...].sum()

    plan = fc.make_plan(Three(), zeros(2, 4))
    assert list(plan) == ["a/kernel"]
    assert not plan.skipped


@needs("flax", "0.12.1")
def test_what_stays_is_left_with_its_reason():
    class Rest(nnx.Module):
        def __init__(self):
            self.table, self.embed = ones(9, 4), nnx.Embed(9, 4, rngs=nnx.Rngs(0))
            self.both, self.unread = ones(4, 4), ones(4, 4)
            self.position = ones(3, 4)
            self.parts = nnx.data([{"w": ones(4, 4)}])
            self.norm = nnx.WeightNorm(linear(4, 4), rngs=nnx.Rngs(0))

        def __call__(self, ids):
            x = self.table[ids] + self.embed(ids) + self.position
            x = self.norm(x @ self.both @ self.both.T)
            return x @ (self.parts[0]["w"] + 1)

    plan = fc.make_plan(Rest(), zeros(2, 3, dtype=jnp.int32))
    assert not plan
    reasons = plan.skipped
    assert set(reasons) == {
        *("table", "embed/embedding", "both", "parts/0/w", "norm/layer_instance")
    }
    assert "'table' (9, 4): it is read by index" in reasons["table"]
    assert "the table of an Embed" in reasons["embed/embedding"]
    assert "multiplied in two roles" in reasons["both"]
    assert "Rest uses its own parameter 'parts/0/w'" in reasons["parts/0/w"]
    assert "changed by 'add' on the way to its matmul" in reasons["parts/0/w"]
    assert "transformed on the way to the layer" in reasons["norm/layer_instance"]


def test_a_model_with_mutable_references_is_left_by_name():
    class Counted(nnx.Module):
        def __init__(self):
            self.w = ones(4, 4)
            self.count = nnx.Variable(jnp.zeros(()), **references()[0])

        def __call__(self, x):
            return x @ self.w

    plan = fc.make_plan(Counted(), zeros(2, 4))
    assert not plan
    assert "raises TypeError: it holds mutable references" in plan.skipped["w"]


def test_linen_inside_nnx():
    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True)(linen.Dense(3)(x))
            return linen.Dense(2, name="head")(x)

    class Outer(nnx.Module):
        def __init__(self):
            self.fc = linear(4, 4)
            inner = nnx.bridge.ToNNX(Inner(), rngs=nnx.Rngs(0))
            self.inner = inner.lazy_init(jnp.ones((2, 4)))

        def __call__(self, x):
            return self.inner(self.fc(x))

    plan = fc.make_plan(Outer(), zeros(2, 4))
    assert list(plan) == ["fc", "inner/Dense_0/kernel", "inner/head/kernel"]
    assert not plan.skipped


def test_methods_and_one_trace_for_layers_and_matmuls():
    traced = []

    class Two(Matmul):
        def __call__(self, x):
            traced.append(1)
            return super().__call__(x)

        def head(self, x):
            traced.append(1)
            return self.after(x)

    model = Two("matmul", (4, 4))
    assert list(fc.make_plan(model, zeros(2, 4), method="head")) == ["after"]
    assert len(traced) == 1
    traced.clear()
    assert len(fc.make_plan(model, zeros(2, 4))) == 3
    assert len(traced) == 1
    plan = fc.make_plan(model, zeros(2, 4), method=lambda m, x: x @ m.w)
    assert list(plan) == ["w"]


def test_to_dense():
    class Own(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(2, 3, (1, 1), rngs=nnx.Rngs(0))
            self.w = ones(3, 5, 3, 6)

        def __call__(self, x):
            return jax.lax.conv_general_dilated(
                self.conv(x),
                self.w[...],
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

    plan = fc.make_plan(Own(), zeros(2, 3, 5, 2), to="dense")
    assert set(plan) == {"conv", "w"}
    assert plan["w"].kernel.target == (45, 6)
