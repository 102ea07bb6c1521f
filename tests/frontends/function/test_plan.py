import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fcconv_jax as fc
from fcconv_jax.planning import find


def struct(tree, dtype=jnp.float32):
    """Abstract arrays in the place of shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def plan_of(f, params, *inputs, **options):
    return fc.make_plan(f, struct(params), *map(struct, inputs), **options)


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


KERNELS = {
    "x @ w": (lambda w, x: x @ w, (4, 6), (3, 4), (1, 4, 6)),
    "x @ w.T": (lambda w, x: x @ w.T, (6, 4), (3, 4), (1, 4, 6)),
    "w @ x": (lambda w, x: w @ x, (6, 4), (4,), (1, 4, 6)),
    "vector": (lambda w, x: x @ w, (4,), (3, 4), (1, 4, 1)),
    "heads": (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        (4, 2, 3),
        (2, 5, 4),
        (1, 4, 6),
    ),
    "joined": (
        lambda w, x: jnp.einsum("bhtk,hkd->btd", jnp.abs(x).reshape(2, 2, 5, 3), w),
        (2, 3, 4),
        (2, 2, 15),
        (2, 3, 4),
    ),
    "torch heads": (
        lambda w, x: jnp.einsum("btd,hkd->bthk", x, w),
        (2, 3, 4),
        (2, 5, 4),
        (1, 4, 6),
    ),
    "tensordot": (
        lambda w, x: jnp.tensordot(x, w, ((1, 2, 3), (0, 1, 2))),
        (3, 4, 2, 5),
        (2, 3, 4, 2),
        (3, 4, 2, 5),
    ),
    "experts": (
        lambda w, x: jnp.einsum("becd,edf->becf", x, w),
        (3, 4, 5),
        (2, 3, 6, 4),
        (1, 4, 15),
    ),
    "ensemble": (jax.vmap(lambda w, x: w @ x), (3, 5, 4), (3, 4), (1, 4, 15)),
    "batched": (jax.vmap(lambda w, x: w @ x, (None, 1)), (5, 4), (4, 3), (1, 4, 5)),
    "scan": (
        lambda w, x: lax.scan(lambda h, k: (h @ k, None), x, w)[0],
        (3, 4, 4),
        (2, 4),
        (1, 4, 4),
    ),
    "loop": (
        lambda w, x: sum(x @ w[:, i] for i in range(3)),
        (4, 3, 5),
        (2, 4),
        (1, 4, 5),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_that_of_the_plain_convolution(name):
    f, kernel, x, target = KERNELS[name]
    plan = plan_of(f, kernel, x)
    (layer,) = plan.values()
    assert layer.kernel.target == target
    assert layer.leaves[0][0] == ""
    assert not plan.skipped
    assert fc.Plan.from_json(plan.to_json()) == plan
    assert plan.inverse().inverse() == plan


@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("scan", "loop")])
def test_the_converted_kernel_computes_as_a_convolution(name):
    """Written without the package: channel-last input, plain HWIO convolution."""
    f, kernel, x, target = KERNELS[name]
    rng = np.random.default_rng(0)
    w, x = (rng.integers(-3, 4, s).astype(np.float32) for s in (kernel, x))
    plan = fc.make_plan(f, w, x)
    moved = fc.convert_params(w, plan)
    groups = plan[""].groups
    # The activation as the layer sees it, channels (and groups) last.
    seen = {
        "joined": lambda: jnp.abs(x).reshape(2, 2, 5, 3).transpose(0, 2, 1, 3),
        "experts": lambda: x.transpose(0, 2, 1, 3),
        "batched": lambda: x.T,
    }.get(name, lambda: x)()
    window = plan[""].window
    seen = seen.reshape(-1, *window, groups * target[-2])
    letters = "HW"[2 - len(window) :]
    got = lax.conv_general_dilated(
        seen,
        moved,
        (1,) * len(window),
        "VALID",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )
    want = jax.jit(f)(w, x)
    if name == "experts":
        want = want.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(np.ravel(got), np.ravel(want))


def test_stacks_are_planned_along_their_own_axes():
    def nested(w, x):
        def outer(h, ws):
            return lax.scan(lambda h, k: (jnp.sin(h @ k), None), h, ws)

        return lax.scan(lambda h, ws: (outer(h, ws)[0], None), x, w)[0]

    assert plan_of(nested, (2, 3, 4, 4), (2, 4))[""].stack_axes == (0, 1)
    reshaped = plan_of(lambda w, x: nested(w.reshape(2, 3, 4, 4), x), (6, 4, 4), (2, 4))
    assert reshaped[""].stack_axes == (0,)
    middle = plan_of(KERNELS["loop"][0], (4, 3, 5), (2, 4))
    assert middle[""].stack_axes == (1,)


def test_a_part_of_an_axis_is_no_stack():
    def f(w, x):
        step = lambda h, k: (jnp.sin(h @ k.reshape(4, 4)), None)  # noqa: E731
        return lax.scan(step, x, w.reshape(2, 16))[0]

    plan = plan_of(f, (8, 4), (2, 4))
    assert not plan
    assert "scanned over a part of one of its axes" in plan.skipped[""]


def test_planning_traces_the_function_once_and_its_inner_jit_once(monkeypatch):
    calls, traces = [], []
    make_jaxpr = jax.make_jaxpr

    def counted(*args, **kwargs):
        traces.append(args)
        return make_jaxpr(*args, **kwargs)

    @jax.jit
    def block(p, x):
        calls.append(x)
        return jnp.tanh(x @ p)

    def f(params, x):
        for p in params:
            x = block(p, x)
        return x

    params = [jnp.ones((4, 4))] * 3
    monkeypatch.setattr(jax, "make_jaxpr", counted)
    assert len(fc.make_plan(f, params, jnp.ones((2, 5, 4)))) == 3
    assert len(traces) == len(calls) == 1


def test_a_body_is_told_apart_by_how_it_is_called(monkeypatch):
    """One jaxpr, analysed once for alike operands, has the names of each call."""
    analysed = []
    analyse = find.analyse

    def counted(jaxpr, *args):
        analysed.append(jaxpr)
        return analyse(jaxpr, *args)

    monkeypatch.setattr(find, "analyse", counted)

    @jax.jit
    def block(a, b, x):
        return x @ a + x @ b.T

    def f(p, x):
        x = block(p["a"], p["b"], x) + block(p["b"], p["a"], x)  # in the other roles
        x = block(p["c"], p["c"], x)  # in both roles at once
        x = block(p["d"], p["e"] @ p["e"], x)  # changed before
        return block(p["f"], x, p["g"])  # an activation in a weight's place

    params = {name: jnp.ones((4, 4)) for name in "abcdefg"}
    plan = fc.make_plan(f, params, jnp.ones((4, 4)))
    assert list(plan) == ["d"]
    for name, reason in {
        **dict.fromkeys("abc", "in two roles"),
        "e": "changed by 'dot_general'",
        **dict.fromkeys("fg", "with no activation"),
    }.items():
        assert reason in plan.skipped[name], name
    assert len(analysed) == 4


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_the_window_behind_a_flatten_is_found_through_inner_calls(wrap):
    @wrap
    def flatten(x):
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)

    @wrap
    def head(w, x):
        return flatten(x) @ w

    def f(params, x, y):
        return head(params["chw"], x), head(params["wide"], y)

    params = {"chw": jnp.ones((2 * 3 * 4, 5)), "wide": jnp.ones((3 * 6 * 2, 5))}
    plan = fc.make_plan(f, params, jnp.ones((1, 2, 3, 4)), jnp.ones((1, 3, 6, 2)))
    assert (plan["chw"].window, plan["chw"].order) == ((2, 3), "CHW")
    assert (plan["wide"].window, plan["wide"].order) == ((3, 6), "CHW")


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("torch_kernel", [False, True])
def test_the_window_behind_a_flatten_is_found(channel_first, torch_kernel):
    def f(p, x):
        y = jax.nn.relu(conv(x, p["conv"], padding="SAME"))
        y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        y = y.transpose(0, 3, 1, 2) if channel_first else y
        y = jax.jit(lambda y: y.reshape(y.shape[0], -1))(y)
        return y @ (p["fc"].T if torch_kernel else p["fc"])

    rows = 3 * 2 * 4
    fc_shape = (5, rows) if torch_kernel else (rows, 5)
    layer = plan_of(f, {"conv": (3, 3, 2, 4), "fc": fc_shape}, (2, 6, 4, 2))["fc"]
    assert layer.case == "full_window"
    assert layer.order == ("CHW" if channel_first else "HWC")
    assert layer.kernel.target == (3, 2, 4, 5)


def test_rules_are_for_leaf_paths():
    def f(p, x):
        return x.reshape(2, -1) @ p["a"]["w"] + x.reshape(2, -1) @ p["b"]

    make = functools.partial(plan_of, f, {"a": {"w": (12, 5)}, "b": (12, 5)}, (2, 3, 4))
    assert make()["a/w"].window == (3,)
    assert make(rules=["a/*=2x3:CHW"])["a/w"].kernel.target == (2, 3, 2, 5)
    plan = make(rules=["b=skip"])
    assert list(plan) == ["a/w"]
    assert "excluded by rule" in plan.skipped["b"]
    with pytest.raises(fc.PlanError, match=r"'c' matches no linear layer.*'b'"):
        make(rules=["c=skip"])
    with pytest.raises(fc.PlanError, match="divides the 12"):
        make(rules=["b=5"])


@jax.custom_vjp
def matmul(x, w):
    return x @ w


matmul.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)

LEFT = {
    "tied": (
        lambda p, x: p["e"][jnp.argmax(x, -1)] @ p["v"] @ p["e"].T,
        {"e": (7, 4), "v": (4, 4)},
        {"e": "read by index"},
    ),
    "experts of each token": (
        lambda p, x: jnp.einsum("tc,tco->to", x, p["w"][jnp.argmax(x, -1)]) @ p["v"],
        {"w": (5, 4, 4), "v": (4, 4)},
        {
            "w": "it is a stack of kernels, read by index",
            "dot_general[0]": "two activations",
        },
    ),
    "roles": (lambda p, x: jnp.sin(x @ p) @ p.T, (4, 4), {"": "two roles"}),
    "other roles": (lambda p, x: jnp.sin(x @ p) @ p.T, (4, 5), {"": "two roles"}),
    "ragged": (
        lambda p, x: lax.ragged_dot(x, p, jnp.array([2, 1], jnp.int32)),
        (2, 4, 5),
        {"": "ragged_dot"},
    ),
    "custom_vjp": (
        lambda p, x: matmul(x, p["w"]) @ p["v"],
        {"w": (4, 4), "v": (4, 4)},
        {"w": "inside a custom_vjp"},
    ),
    "masked": (
        lambda p, x: x @ (p * np.tri(4, dtype=np.float32)),
        (4, 4),
        {"": "changed by 'mul'"},
    ),
    "masked for a convolution": (
        lambda p, x: lax.conv_general_dilated(
            x[None],
            p * np.tri(4, dtype=np.float32)[None],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        ),
        (1, 4, 4),
        {"": "changed by 'mul' on the way to its convolution"},
    ),
    "normalised": (
        lambda p, x: x @ (p - p.mean(0)),
        (4, 4),
        {"": "changed by"},
    ),
    "adapter": (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": (4, 4), "a": (4, 2), "b": (2, 4)},
        {"w": "changed by 'add'", "a": "by 'dot_general'", "b": "by 'dot_general'"},
    ),
    "used twice": (
        lambda p, x: x @ p + jnp.sum(p**2),
        (4, 4),
        {"": "also used by"},
    ),
    "sliced": (
        lambda p, x: x @ p[:, :2] + x @ p[:, 2:],
        (4, 4),
        {"": "changed by 'slice'"},
    ),
    "stretched": (
        lambda p, x: jnp.einsum("bd,bdf->bf", x, jnp.broadcast_to(p, (3, 4, 4))),
        (4, 4),
        {"": "changed by 'broadcast_in_dim'"},
    ),
    "outer product": (
        lambda p, x: jnp.einsum("bd,d->bd", x, p),
        (4,),
        {"": "nothing is summed"},
    ),
    "scores": (
        lambda p, x: jnp.einsum("td,sd->ts", x @ p, x),
        (4, 4),
        {"dot_general[1]": "two activations, (3, 4) and (3, 4)"},
    ),
    "constant": (
        lambda p, x: x @ np.ones((4, 4), np.float32) @ p,
        (4, 4),
        {"dot_general[0]": "a constant of the program"},
    ),
    "carried and changed": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: (c[0] @ c[1], c[1] + 1), (x, p))[
            0
        ],
        (4, 4),
        {"": "changed by"},
    ),
    "chosen": (
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"]),
        {"a": (4, 4), "b": (4, 4)},
        {"a": "changed by 'cond'", "b": "changed by 'cond'"},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_convert_is_left_with_its_reason(name):
    f, params, reasons = LEFT[name]
    plan = plan_of(f, params, (3, 4))
    assert plan.skipped.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in plan.skipped[path]
    leaves = {
        "/".join(k.key for k in p)
        for p, _ in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    assert set(plan) == leaves - plan.skipped.keys()


def test_a_weight_in_a_shard_map_is_left():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def f(p, x):
        inner = jax.shard_map(
            jnp.matmul, mesh=mesh, in_specs=(spec, spec), out_specs=spec
        )
        return inner(x, p["w"]) @ p["v"]

    plan = plan_of(f, {"w": (4, 4), "v": (4, 4)}, (3, 4))
    assert list(plan) == ["v"]
    assert "shard_map" in plan.skipped["w"]


def test_explicit_sharding_converts():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((3, 4)), jax.NamedSharding(mesh, jax.P("x")))
        plan = fc.make_plan(lambda p, x: x @ p, jnp.ones((4, 4)), x)
    assert plan[""].case == "pointwise"


DENSE = {
    "pointwise": (conv, (1, 1, 4, 3), (2, 5, 6, 4), "pointwise", (4, 3)),
    "full": (conv, (5, 6, 4, 3), (2, 5, 6, 4), "full_window", (120, 3)),
    "patch": (
        functools.partial(conv, strides=(2, 3)),
        (2, 3, 4, 5),
        (2, 4, 6, 4),
        "patchify",
        (24, 5),
    ),
    "channel first": (
        functools.partial(conv, strides=(2, 3), layout="NCHW"),
        (5, 4, 2, 3),
        (2, 4, 4, 7),
        "patchify",
        (24, 5),
    ),
    "grouped": (
        functools.partial(conv, feature_group_count=2),
        (1, 1, 2, 6),
        (2, 5, 6, 4),
        "grouped",
        (2, 2, 3),
    ),
    "mapped": (
        jax.vmap(conv, (None, 0)),
        (3, 1, 1, 4, 3),
        (2, 5, 6, 4),
        "pointwise",
        (4, 9),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_convolutions_that_are_dense_layers_are_planned_to_dense(name):
    f, kernel, x, case, target = DENSE[name]
    plan = plan_of(lambda w, x: f(x, w), kernel, x, to="dense")
    assert (plan[""].case, plan[""].kernel.target) == (case, target)


def test_other_convolutions_are_left():
    plan = plan_of(lambda w, x: conv(x, w), (3, 3, 4, 5), (2, 6, 6, 4), to="dense")
    assert "windows overlap" in plan.skipped[""]
    plan = plan_of(
        lambda w, x: conv(x, w) + x @ w[0, 0], (1, 1, 4, 4), (2, 6, 6, 4), to="dense"
    )
    assert "also multiplied in a dot_general" in plan.skipped[""]


def test_a_linen_model_as_a_function_with_its_own_params():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (4, 2, 3))
            x = jnp.einsum("btd,dhk->bthk", x, w)
            return nn.DenseGeneral(5, axis=(-2, -1))(x)

    model = Net()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 6, 4)))
    plan = fc.make_plan(model.apply, params, struct((2, 6, 4)))
    assert set(plan) == {"params/w", "params/DenseGeneral_0/kernel"}
    # Its own layers are planned as linen plans them.
    linen = fc.make_plan(model, struct((2, 6, 4)))["DenseGeneral_0"]
    assert plan["params/DenseGeneral_0/kernel"].kernel == linen.kernel


def test_two_parameters_of_one_path_are_refused():
    params = {"a": {"b": (4, 4)}, "a/b": (4, 4)}
    with pytest.raises(fc.PlanError, match="'a/b'"):
        plan_of(lambda p, x: x @ p["a"]["b"] @ p["a/b"], params, (3, 4))


def test_params_are_needed():
    with pytest.raises(TypeError, match="params as the function's first"):
        fc.make_plan(lambda: 0)
