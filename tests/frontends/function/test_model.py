import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import fcconv_jax as fc
from fcconv_jax.backends.census import count_stablehlo


def integers(tree, seed=0, high=2):
    """Small integers in the place of shapes: sums of matmuls are exact."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.integers(-high, high + 1, shape).astype(np.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def bits(tree):
    return [
        (a.dtype, a.shape, np.asarray(a).tobytes())
        for a in jax.tree.leaves(tree)
        if hasattr(a, "dtype")
    ]


@dataclasses.dataclass(frozen=True)
class Checked:
    plan: fc.Plan
    converted: object
    moved: object
    output: object


@pytest.fixture
def check(check_there):
    """Plans a function and checks all that must hold for every plan.

    The params go there and back to the bit; both forms give the same output and the
    same gradient, to the bit or within ``rtol``.
    """

    def checked(
        f, params, *inputs, to="conv", rules=(), rtol=0.0, gradient=True, vmap=False
    ):
        plan = fc.make_plan(f, params, *inputs, to=to, rules=rules)
        assert fc.Plan.from_json(plan.to_json()) == plan
        moved = fc.convert_params(params, plan)
        assert bits(fc.restore_params(moved, plan)) == bits(params)
        converted = fc.convert_model(f, plan)

        def same(a, b):
            assert jax.tree.structure(a) == jax.tree.structure(b)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
                if hasattr(x, "dtype"):
                    assert x.dtype == y.dtype
                    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
                    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)

        def run(g):
            def loss(params):
                out = g(params, *inputs)
                floats = [
                    jnp.sum(x)
                    for x in jax.tree.leaves(out)
                    if jnp.issubdtype(x.dtype, jnp.inexact)
                ]
                return sum(floats), out

            if gradient:
                return jax.jit(jax.grad(loss, has_aux=True))
            return lambda params: (None, g(params, *inputs))

        want, y = run(f)(params)
        got, z = run(converted)(moved)
        same(y, z)
        if gradient:
            same(want, fc.restore_params(got, plan))
        else:
            same(y, f(params, *inputs))
        if vmap:
            mapped = [np.stack([x, x]) for x in inputs]
            run_all = jax.jit(jax.vmap(converted, (None, *[0] * len(inputs))))
            for row in range(2):
                same(y, jax.tree.map(lambda z, r=row: z[r], run_all(moved, *mapped)))
        check_there(f, params, *inputs, plan=plan)
        return Checked(plan, converted, moved, y)

    return checked


def matmuls(f, *args):
    """How many dots and convolutions a program asks for."""
    counts = count_stablehlo(jax.jit(f).lower(*args).as_text())
    return counts.dots, counts.convolutions


def conv(x, kernel, strides=(1, 1), padding="VALID", layout="NHWC", **options):
    kernels = {"NHWC": "HWIO", "NCHW": "OIHW"}[layout]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=(layout, kernels, layout),
        **options,
    )


def mlp(params, x):
    """As ported from PyTorch: kernels are (out, in)."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["weight"].T + layer["bias"])
    return x @ params[-1]["weight"].T


MLP = [{"weight": (6, 4), "bias": (6,)}, {"weight": (3, 6)}]


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.relu(scores), v)
    return x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])


ATTENTION = {"q": (4, 2, 3), "k": (4, 2, 3), "v": (4, 2, 3), "out": (2, 3, 4)}


def classifier(p, x):
    y = jax.nn.relu(conv(x, p["conv"], padding="SAME"))
    y = y.transpose(0, 3, 1, 2).reshape(y.shape[0], -1)
    return y @ p["fc"]


def block(h, w):
    return jnp.clip(h + jax.nn.relu(h @ w["in"]) @ w["out"].T, -4, 4)


def scanned(p, x):
    def body(h, w):
        h = jax.checkpoint(block)(h, w)
        return h, h.sum()

    return lax.scan(body, x, p)


STACK = {"in": (3, 4, 5), "out": (3, 4, 5)}


def conv1d(p, x):
    """GPT-2's Conv1D: a Dense with an (in, out) kernel, by name only."""
    y = p["bias"] + x.reshape(-1, x.shape[-1]) @ p["weight"]
    return y.reshape(*x.shape[:-1], -1)


def experts(p, x):
    h = jax.nn.relu(jnp.einsum("becd,edf->becf", x, p["up"]))
    return jnp.einsum("becf,efd->becd", h, p["down"])


def mixed_precision(p, x):
    half = (p["w"] * 0.5).astype(jnp.bfloat16)
    y = jnp.dot(x.astype(jnp.bfloat16), half, preferred_element_type=jnp.float32)
    return y + x @ (p["v"] / 2.0)


def looped(p, x):
    def body(i, h):
        return jnp.clip(h @ p["w"][i], -4, 4)

    return lax.fori_loop(0, 3, body, x)


def endless(p, x):
    def body(carry):
        i, h = carry
        return i + 1, jnp.clip(h @ p["w"], -4, 4)

    return lax.while_loop(lambda c: (c[0] < 3) & (c[1].sum() < 1e6), body, (0, x))


def branching(p, x):
    branches = [lambda: x @ p["a"], lambda: x @ p["b"].T, lambda: x @ p["a"] * 2]
    return lax.switch(jnp.int32(x.sum()) % 3, branches)


@jax.custom_jvp
def scaled(x, w):
    return jnp.abs(x @ w)


@scaled.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return scaled(x, w), 3.0 * (dx @ w + x @ dw)  # on purpose not the derivative


def with_rule(p, x):
    return scaled(x, p["w"]) @ p["v"]


def mapped(p, x):
    def per_token(token):
        return jax.nn.relu(p["w"] @ token)

    y = jax.vmap(jax.vmap(per_token, 1, 1), 0)(x.swapaxes(1, 2)).swapaxes(1, 2)
    return jax.vmap(lambda w: y @ w, out_axes=1)(p["ensemble"])


def unrolled(p, x):
    for i in range(3):
        x = jnp.clip(x @ p["w"][i], -4, 4)
    return x


def jitted(p, x):
    return jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["w"], x) @ p["v"]


CASES = {
    "mlp": (mlp, MLP, (5, 4), 2),
    "attention": (attention, ATTENTION, (2, 5, 4), 4),
    "classifier": (classifier, {"conv": (3, 3, 2, 3), "fc": (24, 5)}, (2, 4, 2, 2), 1),
    "scan of remat": (scanned, STACK, (2, 4), 2),
    "Conv1D": (conv1d, {"weight": (4, 6), "bias": (6,)}, (2, 3, 4), 1),
    "experts": (experts, {"up": (3, 4, 5), "down": (3, 5, 4)}, (2, 3, 5, 4), 2),
    "mixed precision": (mixed_precision, {"w": (4, 6), "v": (4, 6)}, (3, 4), 2),
    "fori_loop": (looped, {"w": (3, 4, 4)}, (2, 4), 1),
    "while_loop": (endless, {"w": (4, 4)}, (2, 4), 1),
    "switch": (branching, {"a": (4, 5), "b": (5, 4)}, (2, 4), 2),
    "custom_jvp": (with_rule, {"w": (4, 4), "v": (4, 3)}, (2, 4), 2),
    "vmap": (mapped, {"w": (6, 4), "ensemble": (3, 6, 5)}, (2, 5, 4), 2),
    "unrolled": (unrolled, {"w": (3, 4, 4)}, (2, 4), 1),
    "jit": (jitted, {"w": (4, 6), "v": (6, 3)}, (2, 4), 2),
    "vector": (lambda w, x: x @ w, (4,), (3, 4), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_converted_function_is_the_same_function(check, name):
    f, params, x, layers = CASES[name]
    params, x = integers(params), integers(x, seed=1)
    with_vmap = name in ("attention", "scan of remat", "experts", "switch")
    options = {"gradient": name != "while_loop", "vmap": with_vmap}
    checked = check(f, params, x, **options)
    assert len(checked.plan) == layers
    dots, convs = matmuls(checked.converted, checked.moved, x)
    before, _ = matmuls(f, params, x)
    left = [path for path in checked.plan.skipped if path.startswith("dot_general")]
    assert dots == len(left) < before
    assert convs >= layers


TO_DENSE = {
    "pointwise": (conv, (1, 1, 4, 3), (2, 5, 6, 4)),
    "full": (conv, (5, 6, 4, 3), (2, 5, 6, 4)),
    "patch": (functools.partial(conv, strides=(2, 3)), (2, 3, 4, 5), (2, 5, 7, 4)),
    "channel first": (
        functools.partial(conv, strides=(2, 3), layout="NCHW"),
        (5, 4, 2, 3),
        (2, 4, 4, 7),
    ),
    "grouped": (
        functools.partial(conv, strides=(2, 1), feature_group_count=2),
        (2, 1, 2, 6),
        (2, 4, 3, 4),
    ),
    "mapped": (jax.vmap(conv, (None, 0)), (3, 1, 1, 4, 3), (2, 5, 6, 4)),
}


@pytest.mark.parametrize("name", TO_DENSE)
def test_convolutions_become_dots(check, name):
    f, kernel, x = TO_DENSE[name]
    kernel, x = integers(kernel), integers(x, seed=1)
    checked = check(lambda p, x: jnp.abs(f(x, p["k"])), {"k": kernel}, x, to="dense")
    assert matmuls(checked.converted, checked.moved, x) == (1, 0)


def test_there_and_back_again(check):
    """A function of conv params is planned back to dense."""
    f, params, x, _ = CASES["attention"]
    params, x = integers(params), integers(x, seed=1)
    first = check(f, params, x)
    second = check(first.converted, first.moved, x, to="dense")
    assert second.plan.keys() == first.plan.keys()
    np.testing.assert_array_equal(second.output, first.output)


def test_one_plan_serves_every_batch_and_one_trace_every_shape():
    calls = []

    def f(p, x, *, double):
        calls.append(x.shape)
        return mlp(p, x) * (2 if double else 1)

    params = integers(MLP)
    plan = fc.make_plan(f, params, np.ones((5, 4), np.float32), double=True)
    converted, moved = fc.convert_model(f, plan), fc.convert_params(params, plan)
    calls.clear()
    for shape in ((5, 4), (5, 4), (7, 4), (2, 3, 4), (4,), (7, 4)):
        x = integers(shape)
        np.testing.assert_array_equal(converted(moved, x, double=False), mlp(params, x))
    assert calls == [(5, 4), (7, 4), (2, 3, 4), (4,)]
    converted(moved, integers((5, 4)), double=True)
    assert len(calls) == 5, "a flag is static: it makes a trace of its own"


def test_only_planned_layers_change(check):
    params, x = integers(ATTENTION), integers((2, 5, 4), seed=1)
    checked = check(attention, params, x, rules=["[qkv]=skip"])
    assert list(checked.plan) == ["out"]
    assert matmuls(checked.converted, checked.moved, x) == (5, 1)


def test_what_is_left_still_runs(check):
    def f(p, x):
        h = jnp.asarray(p["emb"])[x] @ p["w"]
        return h @ p["emb"].T, lax.cond(h.sum() > 0, jnp.sin, jnp.cos, h)

    params = integers({"emb": (7, 4), "w": (4, 4)})
    checked = check(f, params, np.array([[1, 2, 6]]), rtol=1e-5)
    assert list(checked.plan) == ["w"]
    assert "read by index" in checked.plan.skipped["emb"]


def test_a_custom_vjp_keeps_its_rule(check):
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 7 * r[1]))

    params = integers({"w": (4, 4), "v": (4, 3)})
    checked = check(
        lambda p, x: matmul(x, p["w"]) @ p["v"], params, integers((2, 4), seed=1)
    )
    assert list(checked.plan) == ["v"]


def test_precision_and_dtypes_are_kept(check):
    def f(p, x):
        return lax.dot_general(
            x, p, (((1,), (0,)), ((), ())), "highest", preferred_element_type=jnp.int32
        )

    params, x = (integers(s).astype(np.int8) for s in ((4, 5), (3, 4)))
    checked = check(f, params, x, gradient=False)
    text = str(jax.make_jaxpr(checked.converted)(checked.moved, x))
    assert "precision=(Precision.HIGHEST" in text
    assert "preferred_element_type=int32" in text


def test_remat_and_its_policy_stay(check):
    policy = jax.checkpoint_policies.nothing_saveable
    f = jax.checkpoint(lambda p, x: jnp.sin(x @ p).sum(), policy=policy)
    params, x = integers((4, 4)), integers((2, 4), seed=1)
    checked = check(f, params, x, rtol=1e-5)
    jaxpr = jax.make_jaxpr(checked.converted)(checked.moved, x)
    assert "nothing_saveable" in str(jaxpr)


def test_an_inner_jit_keeps_its_sharding(check):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    f = jax.jit(lambda p, x: x @ p, out_shardings=rows)
    checked = check(f, integers((4, 4)), integers((2, 4), seed=1))
    assert "sharding_constraint" in str(
        jax.make_jaxpr(checked.converted)(checked.moved, np.ones((2, 4), np.float32))
    )


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_block_that_runs_often_is_rewritten_once(check, wrap):
    """As JAX traces it once; blocks that convert differently are told apart."""

    @wrap
    def block(p, x):
        h = jnp.einsum("nf,fo->no", x, p["a"])
        return x + jnp.where(h > 0, h, 0) @ p["b"]

    def f(params, x):
        for p in params:
            x = block(p, x)
        return x

    params = [integers({"a": (6, 8), "b": (8, 6)}, seed) for seed in range(4)]
    x = integers((5, 6))

    def distinct_bodies(jaxpr):
        name = "jit" if wrap is jax.jit else "remat2"
        calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == name]
        return len(calls), len({id(eqn.params["jaxpr"]) for eqn in calls})

    assert distinct_bodies(jax.make_jaxpr(f)(params, x)) == (4, 1)
    whole = check(f, params, x)
    (eqn,) = jax.make_jaxpr(whole.converted)(whole.moved, x).eqns
    assert distinct_bodies(eqn.params["jaxpr"]) == (4, 1)
    assert len(whole.plan) == 8
    part = check(f, params, x, rules=["2/a=skip"])
    (eqn,) = jax.make_jaxpr(part.converted)(part.moved, x).eqns
    assert distinct_bodies(eqn.params["jaxpr"]) == (4, 2)
    assert count_stablehlo(jax.jit(f).lower(params, x).as_text()) != count_stablehlo(
        jax.jit(part.converted).lower(part.moved, x).as_text()
    )


def test_python_numbers_stay_static(check):
    def f(p, x, repeats):
        for _ in range(repeats):
            x = x @ p["w"] * p["scale"]
        return x

    params = {"w": integers((4, 4)), "scale": 2.0}
    x = integers((2, 4), seed=1)
    checked = check(f, params, x, 3, gradient=False)
    assert checked.moved["scale"] == 2.0
    with pytest.raises(TypeError, match="arrays or hashable"):
        checked.converted(checked.moved, x, bytearray())


def test_an_optimizer_steps_alike(check):
    params, x = integers(MLP), integers((5, 4), seed=1)
    checked = check(mlp, params, x)
    tx = optax.adam(0.1)

    def train(f, params, state):
        for _ in range(3):
            grads = jax.grad(lambda p: jnp.sum(f(p, x) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    state = tx.init(params)
    moved_state = fc.convert_opt_state(state, checked.plan, tx=tx, params=params)
    want, _ = train(mlp, params, state)
    got, _ = train(checked.converted, checked.moved, moved_state)
    got = fc.restore_params(got, checked.plan)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_params_that_are_not_converted_are_refused_by_name():
    params, x = integers(MLP), integers((5, 4))
    plan = fc.make_plan(mlp, params, x)
    with pytest.raises(
        fc.PlanError, match=r"converted params, .*'0/weight' of shape \(6, 4\)"
    ):
        fc.convert_model(mlp, plan)(params, x)


def test_another_function_is_refused():
    params, x = integers((4, 4)), integers((3, 4))
    plan = fc.make_plan(lambda p, x: x @ p, params, x)
    other = fc.convert_model(lambda p, x: x @ p.T, plan)
    with pytest.raises(fc.PlanError, match="multiplied in another way"):
        other(fc.convert_params(params, plan), x)


def test_a_convolution_that_pads_on_another_input_is_refused():
    def f(p, x):
        return conv(x, p, (2, 2), "SAME")

    kernel, x = integers((2, 2, 3, 4)), integers((1, 4, 6, 3))
    plan = fc.make_plan(f, kernel, x, to="dense")
    dense = fc.convert_model(f, plan)
    with pytest.raises(fc.PlanError, match="Plan with that input"):
        dense(fc.convert_params(kernel, plan), integers((1, 5, 6, 3)))


def test_a_linen_model_as_a_function(check):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            w = self.param("w", nn.initializers.normal(), (4, 2, 3))
            y = nn.relu(jnp.einsum("btd,dhk->bthk", x, w))
            return x + nn.DenseGeneral(4, axis=(-2, -1))(y), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = stack()(x, None)
            return nn.Dense(5)(x)

    model, x = Net(), integers((2, 5, 4))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = integers(jax.tree.map(lambda s: s.shape, shapes), high=1)
    checked = check(lambda p, x: model.apply({"params": p}, x), params, x)
    assert len(checked.plan) == 3
    (own,) = [p for p in checked.plan if p.endswith("/w")]
    assert checked.plan[own].stack_axes == (1,)
    assert matmuls(checked.converted, checked.moved, x)[0] == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A layer that is a PyTree, as Equinox's are."""

    weight: object
    bias: object

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_a_tree_of_layers_with_fields(check):
    params = Linear(integers((5, 4)), integers((5,)))
    checked = check(
        lambda model, x: jax.vmap(model)(x), params, integers((3, 4), seed=1)
    )
    assert list(checked.plan) == ["weight"]
    assert isinstance(checked.moved, Linear)
    assert checked.moved.weight.shape == (1, 4, 5)  # pyright: ignore


@pytest.mark.filterwarnings("default")
def test_equinox(check):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 3, 3, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.MLP(3 * 4 * 2, 5, 8, 2, key=jax.random.key(1)),
        ]
    )

    def f(model, x):
        return jax.vmap(model)(x)

    x = integers((3, 2, 6, 4))
    checked = check(f, model, x, rtol=1e-5, gradient=False)
    assert set(checked.plan) == {f"layers/3/layers/{i}/weight" for i in range(3)}
    assert checked.plan["layers/3/layers/0/weight"].window == (4, 2)
    assert checked.plan["layers/3/layers/0/weight"].order == "CHW"
    arrays, rest = eqx.partition(model, eqx.is_array)
    check(lambda p, x: f(eqx.combine(p, rest), x), arrays, x, rtol=1e-5)


@pytest.mark.filterwarnings("default")
def test_haiku():
    hk = pytest.importorskip("haiku")

    def net(x):
        x = jax.nn.relu(hk.Conv2D(3, 3)(x))
        x = hk.Flatten()(x)
        return hk.nets.MLP([6, 5])(x)

    model, x = hk.transform(net), integers((2, 4, 3, 2))
    params = model.init(jax.random.key(0), x)
    plan = fc.make_plan(model.apply, params, None, x)
    assert {p: layer.window for p, layer in plan.items()} == {
        "mlp/~/linear_0/w": (4, 3),
        "mlp/~/linear_1/w": (1, 1),
    }
    apply = fc.convert_model(model.apply, plan)
    got = apply(fc.convert_params(params, plan), None, x)
    np.testing.assert_allclose(got, model.apply(params, None, x), rtol=1e-5, atol=1e-5)
