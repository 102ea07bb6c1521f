import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import fcconv_jax as fc


def bits(tree):
    return [
        (jax.tree_util.keystr(path), np.shape(leaf), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def integers(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.integers(-3, 4, s.shape).astype(s.dtype),
        jax.eval_shape(lambda: tree),
    )


class Net(nn.Module):
    """A classifier whose flatten is channel first, as ported from PyTorch."""

    norm: bool = True

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.bn = nn.BatchNorm()
        self.dropout = nn.Dropout(0.5)
        self.fc6, self.fc7 = nn.Dense(6), nn.Dense(5)

    def features(self, x, train=False):
        x = nn.relu(self.conv(x))
        x = self.bn(x, use_running_average=not train) if self.norm else x
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return nn.relu(self.fc6(self.dropout(x, deterministic=not train)))

    def __call__(self, x, train=False, scale=1):
        return self.fc7(self.features(x, train)) * scale


class ConvNet(nn.Module):
    """The same network, written by hand with convolutions only."""

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.fc6 = nn.Conv(6, (4, 3), padding="VALID")
        self.fc7 = nn.Conv(5, (1, 1), padding="VALID")

    def __call__(self, x):
        x = nn.relu(self.fc6(nn.relu(self.conv(x))))
        return self.fc7(x)


X = np.random.default_rng(0).integers(-3, 4, (3, 4, 3, 2)).astype(np.float32)
KEY = jax.random.key(0)
MODEL = Net()
PLAN = fc.make_plan(MODEL, X)
CONV = fc.convert_model(MODEL, PLAN)
VARIABLES = MODEL.init(KEY, X)
MOVED = fc.convert_params(VARIABLES, PLAN)


def test_init_is_the_dense_init_converted_to_the_bit():
    output, variables = CONV.init_with_output(KEY, X)
    assert output.shape == (3, 5)
    assert bits(variables) == bits(MOVED)
    for init in (CONV.init, CONV.lazy_init):
        assert jax.eval_shape(init, KEY, X) == jax.eval_shape(lambda: MOVED)


class Inits(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers
        kernel = nn.with_partitioning(
            init.variance_scaling(1, "fan_out", "normal"), ("a", "b")
        )
        x = nn.Dense(6, kernel_init=kernel, bias_init=init.normal())(flat(x))
        x = nn.DenseGeneral(
            (3, 4), kernel_init=init.orthogonal(), bias_init=init.uniform()
        )(x)
        x = nn.DenseGeneral(
            5,
            axis=(-2, -1),
            kernel_init=nn.with_partitioning(init.xavier_normal(), ("h", None, "e")),
        )(x)
        return nn.DenseGeneral((2, 3), batch_dims=(0,), bias_init=init.normal())(x)


def flat(x):
    return x.reshape(x.shape[0], -1)


def test_init_with_initializers_that_see_the_shape():
    plan = fc.make_plan(Inits(), X)
    assert len(plan) == 4
    # One operation at a time: fused, JAX 0.7 rounds as the shape suggests.
    want = fc.convert_params(Inits().init(KEY, X), plan)
    got = fc.convert_model(Inits(), plan).init(KEY, X)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert bits(got) == bits(want)


def test_apply_with_every_option(assert_close):
    def same(*args, **options):
        def apply(variables):
            return MODEL.apply(variables, X, *args, **options)

        assert_close(CONV.apply(MOVED, X, *args, **options), apply, VARIABLES)

    same()
    same(False, 2)
    same(scale=2)
    same(train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    for method in ("features", Net.features, lambda m, x: m.fc6(flat(m.conv(x)))):
        same(method=method)
    same(capture_intermediates=True)


def test_flags_that_are_equal_but_of_other_types_are_told_apart():
    class Typed(nn.Module):
        @nn.compact
        def __call__(self, x, power):
            zeros = nn.initializers.zeros
            y = nn.Dense(3, kernel_init=zeros)(x)
            return y.astype(jnp.int32) * power

    x = np.ones((2, 3), np.float32)
    plan = fc.make_plan(Typed(), x, 1)
    conv = fc.convert_model(Typed(), plan)
    params = {"kernel": np.ones((1, 3, 3)), "bias": np.zeros(3)}
    params = {"params": {"Dense_0": jax.tree.map(np.float32, params)}}
    assert conv.apply(params, x, 1).dtype == jnp.int32
    assert conv.apply(params, x, 1.0).dtype == jnp.float32


def test_unhashable_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"Net\.apply: expected arguments"):
        CONV.apply(MOVED, X, scale={1, 2})


def test_unconverted_params_are_refused_by_name():
    with pytest.raises(
        fc.PlanError, match=r"Expected converted params, got .*'fc6/kernel'"
    ):
        CONV.apply(VARIABLES, X)
    # Same rank in both forms: only the sizes tell.
    attention = nn.MultiHeadDotProductAttention(2)
    x = np.ones((2, 3, 4), np.float32)
    plan = fc.make_plan(attention, x)
    with pytest.raises(fc.PlanError, match=r"converted params, got .*'query/kernel'"):
        fc.convert_model(attention, plan).apply(attention.init(KEY, x), x)
    missing = {"params": {k: v for k, v in MOVED["params"].items() if k != "fc6"}}
    with pytest.raises(Exception, match="fc6"):
        CONV.apply({**MOVED, **missing}, X)
    with pytest.raises(TypeError, match=r"got the class Dense\. Pass an instance"):
        fc.convert_model(nn.Dense, PLAN)
    with pytest.raises(TypeError, match="can't be bound"):
        CONV.bind(MOVED)


class Head(nn.Module):
    layer: str
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name=self.layer)(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Head("other", 5), "Expected params with 'fc/kernel'"),
        (Head("fc", 6), r"'fc/kernel' of shape \(1, 4, 5\), got \(4, 6\)"),
    ],
)
def test_a_plan_of_another_model_is_refused_by_name(model, message):
    x = jnp.ones((2, 4))
    conv = fc.convert_model(model, fc.make_plan(Head("fc", 5), x))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(fc.PlanError, match=message):
        conv.apply(variables, x)
    with pytest.raises(fc.PlanError, match="fc/kernel"):
        conv.init(jax.random.key(0), x)


def test_no_weight_matmul_is_left():
    jaxpr = str(jax.make_jaxpr(CONV.apply)(MOVED, X))
    assert jaxpr.count("conv_general_dilated") == 3
    assert "dot_general" not in jaxpr


def test_tabulate_shows_convolutions():
    table = CONV.tabulate(KEY, X, console_kwargs={"width": 150})
    flax, plan = table.split("2 layers to conv")
    assert flax.strip() == MODEL.tabulate(KEY, X, console_kwargs={"width": 150}).strip()
    assert "fc6   Dense  full_window  (48, 6) -> (4, 3, 4, 6)" in plan


# ------------------------------------------------------------ traces


class Counted(nn.Module):
    count: Callable

    @nn.compact
    def __call__(self, x, train=False):
        self.count(1)
        return nn.Dense(3)(x)


# chex reads jax.lib.xla_extension where it is left.
@pytest.mark.filterwarnings("ignore:jax.lib.xla_extension:DeprecationWarning")
def test_one_trace_per_shape():
    count = []
    model = Counted(count.append)
    plan = fc.make_plan(model, X)
    conv = fc.convert_model(model, plan)
    moved = fc.convert_params(model.init(KEY, X), plan)
    count.clear()
    for _ in range(3):
        conv.apply(moved, X)
        conv.apply(moved, X + 1, train=False)
    assert len(count) == 2  # with and without the keyword
    conv.apply(moved, X[:2])
    assert len(count) == 3
    equal = fc.Plan.from_json(plan.to_json())
    traces = []

    @jax.jit
    def step(*args):
        traces.append(args)
        return conv.apply(*args)

    step(moved, X)
    step(moved, X + 1)
    assert len(traces) == 1
    assert equal == plan


def test_what_init_traced_in_one_form_does_not_serve_the_other():
    """Init takes no params, so only the context distinguishes the two forms."""
    model = nn.jit(nn.Dense)(4)  # keeps its traces
    plan = fc.make_plan(model, X)
    conv = fc.convert_model(model, plan)
    for _ in range(2):
        fc.make_plan(model, X)
        assert conv.init(KEY, X)["params"]["kernel"].shape == (1, 1, 2, 4)
        assert model.init(KEY, X)["params"]["kernel"].shape == (2, 4)  # pyright: ignore
    assert "fcconv" not in str(jax.make_jaxpr(model.init)(KEY, X))


@pytest.mark.parametrize("layer", [nn.Dense, nn.jit(nn.Dense), nn.remat(nn.Dense)])
def test_no_trace_of_one_form_serves_the_other(layer):
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(4, name="d")(x)

    model = Mlp()
    plan = fc.make_plan(model, X)
    conv = fc.convert_model(model, plan)
    plain = jax.jit(model.apply)
    variables = integers(jax.eval_shape(model.init, KEY, X))
    moved = fc.convert_params(variables, plan)

    def dots(f, v):
        return str(jax.make_jaxpr(f)(v, X)).count("dot_general")

    want = np.asarray(plain(variables, X))
    for _ in range(2):
        np.testing.assert_array_equal(conv.apply(moved, X), want)
        np.testing.assert_array_equal(plain(variables, X), want)
        np.testing.assert_array_equal(model.apply(variables, X), want)
        assert dots(conv.apply, moved) == 0
        assert dots(model.apply, variables) == 1
        assert dots(plain, variables) == 1
    fc.make_plan(model, X)
    assert dots(model.apply, variables) == 1
    assert dots(conv.apply, moved) == 0


# ------------------------------------------------------------ the user's transforms


def test_inside_jit_grad_vmap_and_scan():
    model = nn.Dense(3)
    x = np.random.default_rng(0).integers(-3, 4, (5, 2, 4)).astype(np.float32)
    plan = fc.make_plan(model, x[0])
    conv = fc.convert_model(model, plan)
    variables = integers(jax.eval_shape(model.init, KEY, x[0]))
    moved = fc.convert_params(variables, plan)

    def run(apply, v):
        mapped = jax.vmap(apply, in_axes=(None, 0))(v, x)
        _, scanned = jax.lax.scan(lambda c, x: (c, apply(v, x)), 0, x)

        def square(v):
            return (apply(v, x[0]) ** 2).sum()

        gradient = jax.grad(jax.checkpoint(square))(v)
        return gradient, mapped, scanned, square(v)

    gradient, *want = jax.jit(lambda v: run(model.apply, v))(variables)
    moved_gradient, *got = jax.jit(lambda v: run(conv.apply, v))(moved)
    assert bits(want) == bits(got)
    assert bits(fc.restore_params(moved_gradient, plan)) == bits(gradient)


def test_a_train_state_trains_in_conv_form(assert_close):
    tx = optax.sgd(0.1)
    dense = TrainState.create(apply_fn=MODEL.apply, params=VARIABLES["params"], tx=tx)
    conv = TrainState.create(apply_fn=CONV.apply, params=MOVED["params"], tx=tx)

    def step(state):
        def loss(params):
            variables = {"params": params, "batch_stats": VARIABLES["batch_stats"]}
            return (state.apply_fn(variables, X) ** 2).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def twice(params, state):
        return step(step(state.replace(params=params))).params

    back = fc.restore_params(jax.jit(twice)(conv.params, conv), PLAN)
    assert_close(back, lambda params: twice(params, dense), dense.params)


def test_on_several_devices():
    code = """
    import jax, numpy as np, flax.linen as nn, fcconv_jax as fc
    from jax.sharding import NamedSharding, PartitionSpec as P
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape(x.shape[0], -1)
            return nn.Dense(8, name="b")(nn.relu(nn.Dense(4, name="a")(x)))
    mesh = jax.make_mesh((2, 2), ("data", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (4, 4, 3, 2)).astype(np.float32)
    model = Net()
    plan = fc.make_plan(model, x)
    conv = fc.convert_model(model, plan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(
        lambda s: rng.integers(-3, 4, s.shape).astype(np.float32), shapes)
    rows = lambda s: NamedSharding(mesh, P("model") if len(s.shape) == 2 else P())
    shardings = jax.tree.map(rows, shapes)
    moved_shardings = fc.convert_params(shardings, plan)
    assert moved_shardings["params"]["a"]["kernel"].spec[0] == "model"
    sharded = jax.device_put(params, shardings)
    moved = jax.jit(lambda v: fc.convert_params(v, plan),
                    out_shardings=moved_shardings)(sharded)
    data = jax.device_put(x, NamedSharding(mesh, P("data")))
    want = np.asarray(model.apply(params, x))
    for leaf, sharding in zip(*map(jax.tree.leaves, (moved, moved_shardings))):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert np.array_equal(conv.apply(moved, data), want)
    assert np.array_equal(jax.jit(conv.apply)(moved, data), want)
    mapped = jax.shard_map(lambda v, x: conv.apply(v, x), mesh=mesh,
                           in_specs=(P(), P("data")), out_specs=P("data"))
    assert np.array_equal(jax.jit(mapped)(fc.convert_params(params, plan), data), want)
    back = fc.restore_params(moved, plan)
    assert all(np.array_equal(a, b)
               for a, b in zip(*map(jax.tree.leaves, (back, params))))
    print("fine")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout == "fine\n", result.stderr


# ------------------------------------------------------------ there and back


def test_hand_written_conv_model_takes_the_params_and_goes_back():
    dense, conv = Net(norm=False), ConvNet()
    plan = fc.make_plan(dense, X)
    variables = integers(jax.eval_shape(dense.init, KEY, X))
    moved = fc.convert_params(variables, plan)

    def shapes(tree):
        return jax.tree.map(np.shape, tree)

    assert shapes(moved) == shapes(jax.eval_shape(conv.init, KEY, X))
    want = dense.apply(variables, X)
    np.testing.assert_array_equal(conv.apply(moved, X)[:, 0, 0], want)
    # The hand-written model runs the restored params in dense form.
    inverse = plan.inverse()
    back = fc.convert_model(conv, inverse)
    restored = fc.convert_params(moved, inverse)
    assert bits(restored) == bits(variables)
    np.testing.assert_array_equal(back.apply(restored, X)[:, 0, 0], want)
    jaxpr = str(jax.make_jaxpr(back.apply)(restored, X))
    assert jaxpr.count("dot_general") == 2
    assert jaxpr.count("conv_general_dilated") == 1


def test_a_full_window_in_dense_form_refuses_a_larger_image():
    dense, conv = Net(norm=False), ConvNet()
    plan = fc.make_plan(dense, X)
    restored = jax.eval_shape(dense.init, KEY, X)
    large = jax.ShapeDtypeStruct((1, 8, 6, 2), jnp.float32)
    with pytest.raises(fc.PlanError, match="'fc6' was planned as full_window"):
        jax.eval_shape(fc.convert_model(conv, plan.inverse()).apply, restored, large)


class Patches(nn.Module):
    """The stems of ViT and ConvNeXt, and a depthwise layer that stays."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 3), strides=(2, 3), padding="VALID", name="stem")(x)
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.Conv(8, (1, 1), name="mix")(x)
        return nn.Conv(4, x.shape[1:3], padding="VALID", name="head")(x)


def test_a_conv_model_in_dense_form():
    model, x = Patches(), np.zeros((2, 5, 7, 3), np.float32)
    x = integers(x)
    plan = fc.make_plan(model, x, to="dense")
    assert {k: v.base for k, v in plan.items()} == {
        "stem": "patchify",
        "mix": "pointwise",
        "head": "full_window",
    }
    assert set(plan.skipped) == {"depthwise"}
    dense = fc.convert_model(model, plan)
    variables = integers(jax.eval_shape(model.init, KEY, x))
    moved = fc.convert_params(variables, plan)
    np.testing.assert_array_equal(dense.apply(moved, x), model.apply(variables, x))
    assert jax.eval_shape(dense.init, KEY, x) == jax.eval_shape(lambda: moved)
    assert "3 layers to dense" in dense.tabulate(KEY, x)


def test_an_empty_batch_and_an_empty_plan(check):
    model = nn.Dense(3)
    plan = fc.make_plan(model, X)
    moved = fc.convert_params(model.init(KEY, X), plan)
    assert fc.convert_model(model, plan).apply(moved, X[:0]).shape == (0, 4, 3, 3)
    case = check(nn.Embed(4, 3), jax.ShapeDtypeStruct((2,), jnp.int32))
    assert len(case.plan) == 0
