import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax import jaxprs


@jax.custom_vjp
def _doubled(x):
    return 2 * x


_doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def _everything(x):
    y = jax.nn.relu(x)
    y = jax.checkpoint(jnp.sin)(y)
    y = _doubled(jax.jit(jnp.cos)(y))
    y = jax.lax.cond(jnp.sum(y) > 0, lambda a: a * 2, lambda a: a * 3, y)
    y, ys = jax.lax.scan(lambda c, z: (c * z, c + z), y, jnp.arange(3.0))
    y = jax.lax.while_loop(lambda a: jnp.sum(a) < 1, lambda a: a + 1, y)
    return y, ys + jnp.asarray(np.arange(3.0, dtype=np.float32))[:, None]


def test_evaluate_runs_every_kind_of_equation():
    x = jnp.linspace(-1, 1, 5)
    closed = jax.make_jaxpr(_everything)(x)
    for got, want in zip(jaxprs.evaluate(closed, [x]), _everything(x)):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_calls_are_recognised_and_control_flow_is_not():
    eqns = jax.make_jaxpr(_everything)(jnp.ones(5)).eqns
    bodies = {e.primitive.name: jaxprs.call_body(e) for e in eqns}
    for name in ("custom_jvp_call", "custom_vjp_call", "remat2", "jit"):
        assert bodies[name] is not None, name
    for name in ("cond", "scan", "while"):
        assert bodies[name] is None, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cond", ["branches", "branches"]),
        ("while", ["cond_jaxpr", "body_jaxpr"]),
        ("scan", ["jaxpr"]),
        ("custom_jvp_call", ["call_jaxpr"]),
    ],
)
def test_subjaxprs_are_found(name, expected):
    eqns = jax.make_jaxpr(_everything)(jnp.ones(5)).eqns
    eqn = next(e for e in eqns if e.primitive.name == name)
    assert sorted(n for n, _ in jaxprs.subjaxprs(eqn)) == sorted(expected)


def test_visit_sees_the_operands():
    seen = []

    def visit(eqn, operands):
        seen.append((eqn.primitive.name, [float(x) for x in operands]))
        return jaxprs.bind(eqn, operands)

    closed = jax.make_jaxpr(lambda x: x * 2.0 + 1.0)(1.0)
    jaxprs.evaluate(closed, [3.0], visit)
    assert seen == [("mul", [3.0, 2.0]), ("add", [6.0, 1.0])]
