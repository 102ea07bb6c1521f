import jax
import jax.numpy as jnp
import numpy as np
from conftest import needs
from flax import nnx

import fcconv_jax as fc


class Attention(nnx.Module):
    """Projections to heads and back, as research code writes them."""

    def __init__(self, *, rngs):
        self.q = nnx.Einsum("btc,hcd->bthd", (2, 4, 3), (2, 3), rngs=rngs)
        self.o = nnx.Einsum("bthd,hdc->btc", (2, 3, 4), rngs=rngs)
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.o(nnx.relu(self.q(x))))


def integers(model):
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree.map(lambda a: jnp.round(rng.normal(size=a.shape) * 2), state)
    )


X = jnp.round(jax.random.normal(jax.random.key(1), (2, 5, 4)) * 3)


def test_an_einsum_is_a_convolution_and_back():
    model = integers(Attention(rngs=nnx.Rngs(0)))
    plan = fc.make_plan(model, X)
    assert set(plan) == {"q/kernel", "o/kernel", "fc"}
    assert plan["q/kernel"].kernel.target == (1, 4, 6)
    assert fc.Plan.from_json(plan.to_json()) == plan
    conv = fc.convert_model(model, plan)
    np.testing.assert_array_equal(conv(X), model(X))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(conv, X), model(X))
    assert "dot_general" not in str(jax.make_jaxpr(conv)(X))
    moved = fc.convert_params(nnx.state(model, nnx.Param), plan)
    for path, leaf in nnx.to_flat_state(nnx.state(conv, nnx.Param)):
        np.testing.assert_array_equal(leaf[...], dict(nnx.to_flat_state(moved))[path])
    back = fc.convert_model(conv, plan.inverse())
    assert type(back.q) is nnx.Einsum
    assert nnx.split(back)[0] == nnx.split(model)[0]
    np.testing.assert_array_equal(back.q.kernel[...], model.q.kernel[...])
    grads = nnx.grad(lambda m: (m(X) ** 2).sum())
    np.testing.assert_array_equal(
        fc.restore_params(grads(conv), plan)["q"]["kernel"][...],
        grads(model)["q"]["kernel"][...],
    )


def test_it_is_proved():
    model = Attention(rngs=nnx.Rngs(0))
    plan = fc.make_plan(model, X)
    report = fc.verify(model, None, X, plan=plan, gradients=False)
    assert report.passed, str(report)


def test_stacked_shared_and_called_with_an_equation():
    class Net(nnx.Module):
        def __init__(self):
            @nnx.vmap(in_axes=0)
            def stack(key):
                return nnx.Einsum("bc,co->bo", (4, 4), rngs=nnx.Rngs(key))

            self.stack = stack(jax.random.split(jax.random.key(0), 3))
            self.late = nnx.Einsum("bc,oc->bo", (4, 4), rngs=nnx.Rngs(1))

        def __call__(self, x):
            x = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, self.stack)
            return self.late(self.late(x))

    model, x = integers(Net()), X[0]
    plan = fc.make_plan(model, x)
    assert plan["stack/kernel"].stack_axes == (0,)
    np.testing.assert_array_equal(fc.convert_model(model, plan)(x), model(x))


def test_what_is_no_matmul_of_input_and_kernel_is_left():
    class Odd(nnx.Module):
        def __init__(self):
            self.summed = nnx.Einsum("bc,cd->bc", (4, 2), rngs=nnx.Rngs(0))
            self.own = nnx.Einsum(
                "bc,cd->bd", (4, 4), rngs=nnx.Rngs(0), einsum_op=lambda *a, **k: a[1]
            )
            self.read = nnx.Einsum("bc,cd->bd", (4, 4), rngs=nnx.Rngs(0))

        def __call__(self, x):
            x = self.read(self.own(self.summed(x)))
            return x + self.read.kernel[...].sum()

    plan = fc.make_plan(Odd(), X[0])
    assert not plan
    assert set(plan.skipped) == {"read/kernel", "summed/kernel"}
    assert "it is also used by 'reduce_sum'" in plan.skipped["read/kernel"]
    assert "changed by 'reduce_sum' on the way" in plan.skipped["summed/kernel"]
    plan = fc.make_plan(Attention(rngs=nnx.Rngs(0)), X, rules=["q/kernel=skip"])
    assert "excluded by rule" in plan.skipped["q/kernel"]


@needs("flax", "0.12.4")
def test_an_einsum_keeps_its_out_sharding():
    mesh = jax.make_mesh((1, 1), ("x", "y"), (jax.sharding.AxisType.Explicit,) * 2)
    model = integers(nnx.Einsum("btc,cd->btd", (4, 6), rngs=nnx.Rngs(0)))
    conv = fc.convert_model(model, fc.make_plan(model, X))
    spec = jax.sharding.PartitionSpec("x", None, "y")

    @nnx.jit
    def run(model, x):
        return model(x, out_sharding=spec)

    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.sharding.PartitionSpec("x"))
        want, got = run(model, x), run(conv, x)
    assert jax.typeof(got).sharding.spec == jax.typeof(want).sharding.spec == spec
    np.testing.assert_array_equal(got, want)
