import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.tracing import jaxprs


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
        np.testing.assert_array_equal(got, want)


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


def test_every_body_is_rerun_in_its_place():
    """Rerunning each body as it is gives what the program gives, and its gradient."""
    x = jnp.linspace(-1, 1, 5)

    def differentiable(x):
        y = jax.nn.relu(x)
        y = jax.checkpoint(jnp.sin)(y)
        y = jax.jit(jnp.cos)(y)
        y = jax.lax.cond(jnp.sum(y) > 0, lambda a: a * 2, lambda a: a * 3, y)
        y, ys = jax.lax.scan(
            lambda c, z: (c * z, c + z), y, jnp.arange(1.0, 4.0), reverse=True
        )
        return jax.lax.fori_loop(0, 2, lambda i, a: a + i, y), ys

    seen = set()

    def run(jaxpr, operands):
        def visit(eqn, ins):
            bodies = jaxprs.bodies(eqn)
            if not bodies or eqn.primitive.name.startswith("custom_vjp"):
                return jaxprs.bind(eqn, ins)
            seen.add(eqn.primitive.name)
            return jaxprs.rerun(
                eqn, ins, [functools.partial(run, body) for body in bodies]
            )

        return jaxprs.evaluate(jaxpr, operands, visit)

    for f in (_everything, differentiable):
        closed = jax.make_jaxpr(f)(x)
        for got, want in zip(run(closed, [x]), f(x), strict=True):
            np.testing.assert_array_equal(got, want)
    assert seen >= {"cond", "while", "scan", "remat2", "jit", "custom_jvp_call"}

    def loss(outs):
        return sum(jnp.sum(out) for out in outs)

    closed = jax.make_jaxpr(differentiable)(x)
    np.testing.assert_array_equal(
        jax.grad(lambda x: loss(run(closed, [x])))(x),
        jax.grad(lambda x: loss(differentiable(x)))(x),
    )
    # relu's own rule: 0 at 0, where jnp.maximum has 1/2.
    relu = jax.make_jaxpr(jax.nn.relu)(0.0)
    assert jax.grad(lambda x: run(relu, [x])[0])(0.0) == 0
