import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.versions import enable_x64


def net(body):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            return body(self, *inputs)

    return Net()


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def flat(x):
    return x.reshape(x.shape[0], -1)


# ------------------------------------------------------------ what converts


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_dense_on_inputs_of_any_rank(check, rank):
    shape = (2, 3, 4, 5, 6)[5 - rank :]
    case = check(nn.Dense(7), zeros(*shape))
    spatial = max(1, min(rank - 2, 3))
    assert case.plan[""].window == (1,) * spatial
    assert case.moved["params"]["kernel"].shape == (1,) * spatial + (6, 7)


DENSE_GENERAL = {
    "features": ({"features": (5, 2)}, (2, 4, 3), "pointwise", 1),
    "trailing": ({"features": (5, 2), "axis": (-2, -1)}, (2, 4, 3), "full_window", 1),
    "not trailing": ({"features": 5, "axis": 1}, (2, 4, 3), "pointwise", 1),
    "negative": ({"features": (5,), "axis": (-3,)}, (2, 4, 3, 2), "pointwise", 1),
    "map": ({"features": 5, "axis": (1, 2, 3)}, (2, 4, 3, 2), "full_window", 1),
    "map, axes not sorted": (
        {"features": 5, "axis": (3, 2)},
        (2, 4, 3, 2),
        "full_window",
        1,
    ),
    "grouped": ({"features": 5, "batch_dims": (0,)}, (3, 4, 2), "pointwise", 3),
    "two batch dims": (
        {"features": (5, 2), "batch_dims": (0, 1), "axis": (-1,)},
        (3, 2, 4, 6),
        "pointwise",
        6,
    ),
    "grouped window": (
        {"features": 5, "batch_dims": (0,), "axis": (2, 3)},
        (3, 5, 4, 2),
        "full_window",
        3,
    ),
    "grouped window, axes not sorted": (
        {"features": 5, "batch_dims": (0,), "axis": (3, 2)},
        (3, 5, 4, 2),
        "full_window",
        3,
    ),
    "batch of one": ({"features": 5, "batch_dims": (0,)}, (1, 4, 2), "pointwise", 1),
    "no lead": ({"features": 5, "batch_dims": (0,)}, (3, 2), "pointwise", 3),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DENSE_GENERAL)
def test_dense_general(check, name, bias):
    options, shape, base, groups = DENSE_GENERAL[name]
    case = check(nn.DenseGeneral(use_bias=bias, **options), zeros(*shape))
    layer = case.plan[""]
    assert (layer.base, layer.groups) == (base, groups)
    assert layer.case == ("grouped" if groups > 1 else base)
    *_, fan_in, out = case.moved["params"]["kernel"].shape
    assert out == np.prod(options["features"]) * groups
    del fan_in


def test_attention(check):
    case = check(nn.MultiHeadDotProductAttention(2), zeros(2, 5, 6), exact=False)
    assert {k: v.window for k, v in case.plan.items()} == dict.fromkeys(
        ("query", "key", "value", "out"), (1,)
    )
    assert case.plan["out"].kernel.source == (2, 3, 6)


def test_attention_with_a_decode_cache(assert_close):
    model, x = nn.MultiHeadAttention(2, decode=True), np.ones((2, 1, 6), np.float32)
    plan = fc.make_plan(model, zeros(2, 5, 6))
    conv = fc.convert_model(model, plan)
    variables = model.init(jax.random.key(0), np.ones((2, 5, 6), np.float32))
    moved = fc.convert_params(variables, plan)
    for step in range(2):

        def apply(variables, inputs):
            return model.apply(variables, inputs, mutable=["cache"])

        _, cache = apply(variables, x * step)
        z, moved_cache = conv.apply(moved, x * step, mutable=["cache"])
        assert_close((z, moved_cache), apply, variables, x * step)
        variables, moved = {**variables, **cache}, {**moved, **moved_cache}
    assert variables["cache"]["cache_index"] == 2


@pytest.mark.parametrize(
    ("cell", "layers"), [(nn.LSTMCell, 8), (nn.GRUCell, 6), (nn.SimpleCell, 2)]
)
def test_layers_inside_rnn_cells(check, cell, layers):
    case = check(nn.RNN(cell(4)), zeros(2, 5, 3), exact=False)
    assert len(case.plan) == layers
    assert all(layer.stack_axes == () for layer in case.plan.values())


def test_kernels_that_a_cell_multiplies_elsewhere_stay():
    plan = fc.make_plan(nn.RNN(nn.OptimizedLSTMCell(4)), zeros(2, 5, 3))
    assert not plan
    assert len(plan.skipped) == 8
    assert "uses its own parameter 'kernel'" in plan.skipped["cell/hf/kernel"]
    plan = fc.make_plan(
        nn.RNN(nn.ConvLSTMCell(4, (3, 3))), zeros(2, 5, 6, 6, 3), to="dense"
    )
    assert not plan
    assert all("Padding" in why for why in plan.skipped.values())


class Mlp(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="out")(nn.relu(nn.Dense(self.width)(x)))


class Step(nn.Module):
    """One step of a scan whose kernels are square, of the size of the stack."""

    size: int = 4

    @nn.compact
    def __call__(self, carry, _):
        return jnp.sign(nn.Dense(self.size)(carry)), None


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_scanned_stack_as_long_as_its_square_kernel(check, axis):
    # A bias has fewer axes than the kernel, so only some axes can stack it.
    class NoBias(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return jnp.sign(nn.Dense(4, use_bias=False)(carry)), None

    scanned = nn.scan(
        NoBias,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=4,
    )
    model = net(lambda _, x: scanned()(x, None)[0])
    case = check(model, zeros(3, 4))
    layer = case.plan["ScanNoBias_0/Dense_0"]
    assert layer.stack_axes == (axis,)
    kernel = case.variables["params"]["ScanNoBias_0"]["Dense_0"]["kernel"]
    moved = case.moved["params"]["ScanNoBias_0"]["Dense_0"]["kernel"]
    for step in range(4):
        ours = np.take(moved, step, axis)
        np.testing.assert_array_equal(ours[0], np.take(kernel, step, axis))


def test_scan_of_scan_and_broadcast(check):
    inner = nn.scan(
        Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=4
    )
    outer = nn.scan(
        inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
    )
    case = check(net(lambda _, x: outer()(x, None)[0]), zeros(3, 4))
    assert case.plan["ScanScanStep_0/Dense_0"].stack_axes == (1, 0)
    shared = nn.scan(
        Step, variable_broadcast="params", split_rngs={"params": False}, length=3
    )
    case = check(net(lambda _, x: shared()(x, None)[0]), zeros(3, 4))
    assert case.plan["ScanStep_0/Dense_0"].stack_axes == ()


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("in_axis", [0, 1, 2])
def test_vmapped_layers(check, axis, in_axis):
    mapped = nn.vmap(
        Mlp,
        in_axes=in_axis,
        out_axes=1,
        variable_axes={"params": axis},
        split_rngs={"params": axis is not None},
    )
    case = check(net(lambda _, x: mapped()(x)), zeros(4, 4, 4))
    assert {layer.stack_axes for layer in case.plan.values()} == {
        () if axis is None else (axis,)
    }


def test_vmap_of_scan_and_a_lifted_model_itself(check):
    scanned = nn.scan(
        Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=4
    )
    mapped = nn.vmap(
        scanned,
        in_axes=(1, None),
        variable_axes={"params": 1},
        split_rngs={"params": True},
    )
    case = check(net(lambda _, x: mapped()(x, None)[0]), zeros(3, 4, 4))
    assert case.plan["VmapScanStep_0/Dense_0"].stack_axes == (0, 1)
    top = nn.vmap(
        nn.Dense, in_axes=1, variable_axes={"params": 1}, split_rngs={"params": True}
    )
    case = check(top(5), zeros(2, 3, 4))
    assert case.plan[""].stack_axes == (1,)
    check(nn.remat(Mlp)(), zeros(2, 4))
    check(nn.jit(Mlp)(), zeros(2, 4))


def test_jit_remat_and_share_scope(check):
    class Outer(nn.Module):
        def setup(self):
            self.inner = nn.remat(nn.jit(Mlp))()
            nn.share_scope(self, self.inner)

        def __call__(self, x):
            return self.inner(x)

    case = check(Outer(), zeros(2, 4))
    assert set(case.plan) == {"Dense_0", "out"}


def test_shared_layer_called_twice_at_two_ranks(check):
    def body(_, x):
        dense = nn.Dense(4)
        return dense(dense(x)), dense(x[0]), dense(x[None])

    case = check(net(body), zeros(2, 4))
    assert list(case.plan) == ["Dense_0"]


def test_shared_layer_behind_two_flattens(check):
    def body(_, x):
        dense = nn.Dense(5)
        return dense(flat(x)), dense(flat(x.transpose(0, 3, 1, 2)))

    model, x = net(body), zeros(2, 4, 3, 2)
    assert "several ways" in fc.make_plan(model, x).skipped["Dense_0"]
    case = check(model, x, rules=["Dense_0=4x3:CHW"])
    assert case.plan["Dense_0"].order == "CHW"


# ------------------------------------------------------------ what does not


def test_tied_kernels_are_not_their_appliers(check):
    """A nested apply runs on arrays of its own, under whatever path."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(4, 4)
            x = nn.Dense(4, name="layers_0")(embed(ids))
            kernel = {"kernel": embed.embedding.T, "bias": jnp.ones(4)}
            other = nn.Sequential([nn.remat(nn.Dense)(4, parent=None)], parent=None)
            y = other.apply({"params": {"layers_0": kernel}}, x)
            return (
                embed.attend(x),
                y,
                nn.Dense(4, parent=None).apply({"params": kernel}, y),
            )

    case = check(Tied(), zeros(2, 3, dtype=jnp.int32))
    assert set(case.plan) == {"layers_0"}
    assert "attend" in case.plan.skipped["Embed_0/embedding"]


def test_nested_apply_at_the_root_path_of_a_root_kernel(check):
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (4, 4))
            dense = nn.Dense(4, use_bias=False, parent=None)
            return dense.apply({"params": {"kernel": kernel}}, x) @ kernel

    case = check(Root(), zeros(2, 4))
    assert case.plan["kernel"].is_matmul


def test_kernels_that_change_on_the_way_are_left(check):
    class Standardised(nn.Dense):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return value * 2 if name == "kernel" else value

    x = zeros(2, 4)
    case = check(Standardised(4), x)
    assert "overrides param()" in case.plan.skipped[""]

    def double(params):
        return jax.tree.map(lambda p: p * 2, params)

    def mapped(layer):
        return nn.map_variables(layer, "params", trans_in_fn=double, init=True)

    for layer in (nn.Dense, nn.remat(nn.Dense), Mlp):
        case = check(net(lambda _, x, layer=layer: mapped(layer)(4)(x)), x)
        assert not case.plan
        assert all("map_variables" in why for why in case.plan.skipped.values())
    inside = nn.scan(
        mapped(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    assert not fc.make_plan(net(lambda _, x: inside(4)(x, None)[0]), x)


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_normalised_kernels_are_left(norm):
    extra = {} if norm is nn.WeightNorm else {"update_stats": False}
    model = net(lambda _, x: nn.Dense(3, name="plain")(norm(nn.Dense(4))(x, **extra)))
    plan = fc.make_plan(model, zeros(2, 4))
    assert set(plan) == {"plain"}
    assert norm.__name__ in plan.skipped["Dense_0"]


def test_layers_with_matmuls_of_their_own_are_left():
    x = zeros(2, 4)
    plan = fc.make_plan(nn.Dense(3, dot_general=jax.lax.dot_general), x)
    assert "dot_general" in plan.skipped[""]
    plan = fc.make_plan(nn.Dense(3, dot_general_cls=lambda: jax.lax.dot_general), x)
    assert "dot_general" in plan.skipped[""]
    mask = np.ones((1, 1, 3, 2))
    plan = fc.make_plan(nn.Conv(2, (1, 1), mask=mask), zeros(1, 4, 4, 3), to="dense")
    assert "mask" in plan.skipped[""]


def test_subclasses_that_call_super_convert(check):
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(inputs * 2) + 1

    class Own(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], 3))
            return inputs @ kernel

    assert list(check(Scaled(3), zeros(2, 4)).plan) == [""]
    plan = check(Own(3), zeros(2, 4)).plan
    assert plan["kernel"].is_matmul
    assert "(root)" not in str(plan)


def test_adapter_around_a_dense(check):
    class Lora(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.normal(), (4, 2))
            b = self.param("b", nn.initializers.normal(), (2, 3))
            return nn.Dense(3)(x) + x @ a @ b

    case = check(Lora(), zeros(2, 4))
    assert set(case.plan) == {"Dense_0", "a", "b"}


def test_a_method_of_an_unbound_module_is_no_call(check):
    class Config(nn.Module):
        def width(self):
            return 5

    class Net(nn.Module):
        def __call__(self, x):
            return self.dense(x)

        def setup(self):
            self.dense = nn.Dense(Config(parent=None).width())

    assert set(check(Net(), zeros(2, 4)).plan) == {"dense"}


# ------------------------------------------------------------ calls and rules


class TwoWays(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(5), nn.Dense(4)

    def encode(self, x, train=False, scale=1):
        assert isinstance(train, bool)
        return self.encoder(x) * scale if train else self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x))


def test_plans_of_several_methods_join():
    model, x, z = TwoWays(), zeros(2, 4), zeros(2, 5)
    encode = fc.make_plan(model, x, method="encode", train=True, scale=2)
    decode = fc.make_plan(model, z, method=TwoWays.decode)
    assert (set(encode), set(decode)) == ({"encoder"}, {"decoder"})
    both = encode | decode
    assert set(both) == {"encoder", "decoder"}
    assert both == fc.make_plan(model, x)
    assert hash(both) == hash(fc.make_plan(model, x))
    skip = fc.make_plan(model, x, rules=["encoder=skip", "decoder=skip"])
    assert (skip | both).skipped == {}


def test_arguments_flags_rngs_and_containers(check):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, batch, *, train):
            x = nn.Embed(9, 4)(batch["ids"]) + batch["extra"]
            x = nn.Dropout(0.5, deterministic=not train)(x)
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(3)(x + noise)

    batch = {"ids": np.ones((2, 3), np.int32), "extra": zeros(2, 3, 4)}
    rngs = {name: jax.random.key(i) for i, name in enumerate(("params", "noise"))}
    plan = fc.make_plan(Net(), batch, train=False, rngs=rngs)
    assert plan["Dense_0"].input_shape == (2, 3, 4)
    assert plan == fc.make_plan(
        Net(), batch, train=True, rngs={**rngs, "dropout": jax.random.key(3)}
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_parameters_of_other_dtypes(check, dtype):
    case = check(Flattened(dtype), zeros(2, 3, 2, 2, dtype=dtype))
    assert case.moved["params"]["Dense_0"]["kernel"].dtype == dtype


class Flattened(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, dtype=self.dtype, param_dtype=self.dtype)(flat(x))


def test_float64(check):
    with enable_x64(True):
        case = check(Flattened(jnp.float64), zeros(2, 3, 2, 2, dtype=jnp.float64))
        assert case.moved_output.dtype == jnp.float64


def test_rules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("fc6", "fc7", "fc8"):
                x = nn.Dense(24, name=name)(flat(x))
            return x

    model, x = Net(), zeros(2, 4, 3, 2)
    plan = fc.make_plan(model, x, rules=["fc7=2x3:CHW", "fc8=skip", "fc*=12"])
    assert [v.window for v in plan.values()] == [(12,), (2, 3)]
    assert plan["fc7"].order == "CHW"
    assert plan.skipped == {"fc8": "excluded by rule 'fc8'"}
    first = fc.make_plan(model, x, rules=["fc*=skip", fc.Rule("fc6", window=(4, 3))])
    assert not first  # the first rule that matches wins
    order = fc.make_plan(model, x, rules=[fc.Rule("fc6", order="CHW")])
    assert (order["fc6"].window, order["fc6"].order) == ((4, 3), "CHW")
    assert fc.make_plan(model, x, rules="fc6=skip").skipped["fc6"]
    with pytest.raises(
        fc.PlanError, match=r"'fc9' matches no .*'fc6'.*\. Pass the path"
    ):
        fc.make_plan(model, x, rules=["fc9=skip"])
    with pytest.raises(fc.PlanError, match=r"divides the 24 input features .* got 5x2"):
        fc.make_plan(model, x, rules=["fc7=5x2"])
    with pytest.raises(
        fc.PlanError, match=r"rule 'fc7': expected an order .* got 'CWX'"
    ):
        fc.make_plan(model, x, rules=["fc7=2x3:CWX"])
    with pytest.raises(fc.PlanError, match="Expected a rule PATTERN="):
        fc.make_plan(model, x, rules=["fc7"])


@pytest.mark.parametrize("layout", ["fold", "keep"])
def test_layout_of_a_pointwise_layer(check, layout):
    rules = [fc.Rule("*", layout=layout)]
    for shape in ((2, 4), (2, 3, 4), (2, 3, 5, 4), (2, 2, 2, 3, 2, 4)):
        case = check(nn.Dense(3), zeros(*shape), rules=rules)
        assert case.plan[""].layout == layout


def test_refusals_of_make_plan():
    for model, words in (
        ("model", "params and inputs, got str"),
        (nn.Dense, "got the class Dense. Pass an instance"),
    ):
        with pytest.raises(TypeError, match=words):
            fc.make_plan(model, zeros(2))
    with pytest.raises(fc.PlanError, match="to='conv' or to='dense', got 'linear'"):
        fc.make_plan(nn.Dense(3), zeros(2, 3), to="linear")


def test_further_arguments_of_a_root_layer_are_not_dropped():
    with pytest.raises(fc.PlanError, match="Pass the form by name: to='dense'"):
        fc.make_plan(nn.Dense(3), zeros(2, 3), "dense")
    with pytest.raises(TypeError, match="got train=, which Dense does not take"):
        fc.make_plan(nn.Dense(3), zeros(2, 3), train=True)


def test_planning_makes_no_array_and_leaves_no_trace():
    """A model too large for this machine is planned, and then runs as ever."""
    huge = nn.Dense(1 << 30)
    plan = fc.make_plan(huge, zeros(1, 1 << 30))
    assert plan[""].kernel.target == (1, 1 << 30, 1 << 30)
    model, x = nn.jit(Mlp)(), np.ones((2, 4), np.float32)
    fc.make_plan(model, x)
    text = str(jax.make_jaxpr(model.init)(jax.random.key(0), x))
    assert "fcconv" not in text


def test_planning_compiles_nothing(caplog):
    jax.clear_caches()
    with jax.log_compiles():
        fc.make_plan(
            nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)]),
            zeros(2, 4),
        )
    assert "Finished tracing" in caplog.text
    assert "Compiling" not in caplog.text


# ------------------------------------------------------------ towards dense


CONVS = {
    "1x1": ({"features": 5, "kernel_size": (1, 1)}, (2, 4, 3, 6), "pointwise"),
    "1x1, strides": (
        {"features": 5, "kernel_size": (1, 1), "strides": (2, 3)},
        (2, 5, 7, 6),
        "pointwise",
    ),
    "full window": (
        {"features": 5, "kernel_size": (4, 3), "padding": "VALID"},
        (2, 4, 3, 2),
        "full_window",
    ),
    "full window, strides": (
        {"features": 5, "kernel_size": (4, 3), "padding": "VALID", "strides": 2},
        (2, 4, 3, 2),
        "full_window",
    ),
    "patches": (
        {"features": 5, "kernel_size": (2, 3), "strides": (2, 3), "padding": "VALID"},
        (2, 5, 7, 2),
        "patchify",
    ),
    "patches with a zero SAME": (
        {"features": 5, "kernel_size": (2, 2), "strides": (2, 2)},
        (2, 4, 6, 2),
        "patchify",
    ),
    "unbatched": (
        {"features": 5, "kernel_size": (2, 2), "strides": (2, 2), "padding": "VALID"},
        (4, 6, 2),
        "patchify",
    ),
    "two batch axes": (
        {"features": 5, "kernel_size": (2, 2), "strides": (2, 2), "padding": "VALID"},
        (2, 3, 4, 6, 2),
        "patchify",
    ),
    "1-D": ({"features": 5, "kernel_size": (3,), "strides": 3}, (2, 6, 2), "patchify"),
    "3-D": (
        {"features": 5, "kernel_size": (2, 1, 3), "padding": "VALID"},
        (2, 2, 1, 3, 2),
        "full_window",
    ),
    "grouped": (
        {"features": 6, "kernel_size": (1, 1), "feature_group_count": 3},
        (2, 4, 3, 6),
        "grouped",
    ),
    "depthwise window": (
        {"features": 6, "kernel_size": (4, 3), "feature_group_count": 3, "padding": 0},
        (2, 4, 3, 3),
        "grouped",
    ),
    "grouped patches": (
        {"features": 4, "kernel_size": (2, 2), "strides": 2, "feature_group_count": 2},
        (2, 4, 6, 6),
        "grouped",
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_convs_that_are_dense(check, name, bias):
    options, shape, case = CONVS[name]
    found = check(nn.Conv(use_bias=bias, **options), zeros(*shape), to="dense")
    assert found.plan[""].case == case
    assert found.moved["params"]["kernel"].ndim == 2 + (case == "grouped")
    jaxpr = str(jax.make_jaxpr(found.converted.apply)(found.moved, zeros(*shape)))
    assert "conv_general_dilated" not in jaxpr
    assert "dot_general" in jaxpr


def test_convs_that_are_not_dense_say_why():
    def body(_, x):
        return (
            nn.Conv(3, (3, 3), name="overlapping", padding="VALID")(x),
            nn.Conv(3, (2, 2), strides=3, padding=0, name="skipping")(x),
            nn.Conv(3, (6, 4), name="same")(x),
            nn.Conv(3, (2, 2), 2, kernel_dilation=2, padding=0, name="dilated")(x),
        )

    plan = fc.make_plan(net(body), zeros(2, 6, 4, 2), to="dense")
    assert not plan
    assert "windows overlap" in plan.skipped["overlapping"]
    assert "between two windows are skipped" in plan.skipped["skipping"]
    assert "VALID" in plan.skipped["same"]
    assert "ilat" in plan.skipped["dilated"]


def test_conv_called_at_two_sizes(check):
    def body(_, x):
        conv = nn.Conv(5, (2, 2), strides=(2, 2), padding="VALID")
        return conv(x), conv(x[:, :2, :2])

    model, x = net(body), zeros(2, 4, 6, 3)
    plan = fc.make_plan(model, x, to="dense")
    assert "several cases" in plan.skipped["Conv_0"]


def test_a_rule_cannot_change_the_window_of_a_conv():
    model, x = nn.Conv(5, (1, 1), name=None), zeros(2, 4, 4, 3)
    assert fc.make_plan(model, x, to="dense", rules=["*=1x1"])
    with pytest.raises(fc.PlanError, match=r"expected the window .1, 1. .*got .2, 2."):
        fc.make_plan(model, x, to="dense", rules=["*=2x2"])
