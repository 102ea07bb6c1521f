import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import needs
from flax import nnx
from jax.sharding import PartitionSpec
from nnx_models import assert_same, axis_names, module_list, named

import fcconv_jax as fc
from fcconv_jax.frontends.nnx import model as converted
from fcconv_jax.versions import raw_value


class Net(nnx.Module):
    """Conv, BatchNorm, Dropout, a flatten in some order, two Linears."""

    def __init__(self, order="HWC", **kwargs):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.order = order
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs, **kwargs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc1 = nnx.Linear(6 * 5 * 4, 8, rngs=rngs, **kwargs)
        self.fc2 = nnx.Linear(8, 2, rngs=rngs, **kwargs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.bn(self.conv(x))))
        if self.order == "CHW":
            x = x.transpose(0, 3, 1, 2)
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


X = jax.random.normal(jax.random.key(1), (2, 6, 5, 3))


def linear(*shape, seed=0, **kwargs):
    """A Linear that is quick to make."""
    return nnx.Linear(
        *shape, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(seed), **kwargs
    )


def whole(tree, seed=0):
    """Small whole numbers in the place of every float: sums of them are exact."""
    rng = np.random.default_rng(seed)

    def draw(a):
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return jnp.asarray(rng.integers(-4, 5, a.shape), a.dtype)

    return jax.tree.map(draw, tree)


def with_whole_numbers(model, seed=0):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, whole(params, seed), rest)


def as_function(model, x):
    """The model as it is now, called on ``x``, as a function of its params."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    return run, params


@pytest.fixture
def assert_exact(check_there):
    """Converts a model: exact on whole numbers, there and back."""

    def run(model, *inputs, count=None, to="conv", rules=()):
        plan = fc.make_plan(model, *inputs, to=to, rules=rules)
        assert len(plan) if count is None else len(plan) == count
        model = with_whole_numbers(model)
        inputs = whole(inputs, seed=1)
        other = fc.convert_model(model, plan)
        assert_same(model(*inputs), other(*inputs))
        state = nnx.state(model)
        assert_same(fc.convert_params(state, plan), nnx.state(other))
        assert_same(fc.restore_params(nnx.state(other), plan), state)
        back = fc.convert_model(other, plan.inverse())
        assert nnx.graphdef(back) == nnx.graphdef(model)
        assert_same(nnx.state(back), state)
        check_there(model, None, *inputs, plan=plan)
        return other

    return run


@pytest.mark.parametrize("order", ["HWC", "CHW"])
def test_conv_flatten_linear(assert_close, order):
    model = Net(order)
    plan = fc.make_plan(model, X)
    before = nnx.state(model)
    graphdef = nnx.graphdef(model)
    conv = fc.convert_model(model, plan)
    assert isinstance(conv.fc1, nnx.Conv)
    assert type(conv.fc1).__name__ == "Conv"
    assert (conv.fc1.kernel_size, conv.fc1.padding) == ((6, 5), "VALID")
    assert conv.fc1.kernel.shape == (6, 5, 4, 8)
    assert nnx.graphdef(model) == graphdef  # the original is as it was
    assert_same(before, nnx.state(model))
    assert_same(fc.convert_params(before, plan), nnx.state(conv))
    pure = fc.convert_params(nnx.to_pure_dict(before), plan)
    assert_same(pure, nnx.to_pure_dict(nnx.state(conv)))
    model.eval()
    conv.eval()
    assert_close(conv(X), *as_function(model, X))
    back = fc.convert_model(conv, plan.inverse())
    assert type(back.fc1) is nnx.Linear
    assert nnx.graphdef(back) == nnx.graphdef(model)
    assert_same(nnx.state(back), before)


def test_a_wrong_order_gives_wrong_numbers():
    model = Net("CHW")
    model.eval()
    plan = fc.make_plan(model, X)
    wrong = fc.make_plan(model, X, rules=["fc1=6x5:HWC"])
    # The call follows the order too, so only mixing the two shows a difference.
    graphdef = nnx.graphdef(fc.convert_model(model, plan))
    mixed = nnx.merge(graphdef, fc.convert_params(nnx.state(model), wrong))
    assert np.abs(np.asarray(mixed(X) - model(X))).max() > 1e-2


def test_training_mode_draws_the_same_and_counts_the_same(assert_close):
    model = Net()
    conv = fc.convert_model(model, fc.make_plan(model, X))
    for _ in range(2):
        assert_close(conv(X), *as_function(model, X))
        model(X)
    for kind in (nnx.RngState, nnx.BatchStat):
        assert_same(nnx.state(model, kind), nnx.state(conv, kind))
    assert int(conv.drop.rngs.count[...]) == 2


def test_layers_of_every_kind_are_exact(assert_exact):
    rngs = nnx.Rngs(0)
    x = jnp.ones((2, 5, 8))
    assert_exact(linear(8, 3), x, count=1)
    assert_exact(linear(8, 3, use_bias=False), x, count=1)
    assert_exact(linear(8, 3), jnp.ones(8), count=1)
    window = nnx.LinearGeneral((6, 5, 3), (2, 4), axis=(-3, -2, -1), rngs=rngs)
    assert_exact(window, X, count=1)
    middle = nnx.LinearGeneral(5, (2, 3), axis=1, rngs=rngs)
    assert_exact(middle, x, count=1)
    grouped = nnx.LinearGeneral(8, (3,), batch_axis={0: 2}, rngs=rngs)
    assert_exact(grouped, x, count=1)


def test_keeping_the_leading_axes_is_exact(assert_exact):
    x = jnp.ones((2, 5, 3, 8))
    other = assert_exact(linear(8, 3), x, rules=[fc.Rule("*", layout="keep")])
    assert other.kernel.shape == (1, 1, 8, 3)


@pytest.mark.parametrize(
    ("kwargs", "shape", "kind"),
    [
        ({"kernel_size": (1, 1)}, (2, 6, 5, 4), "Linear"),
        ({"kernel_size": (1, 1), "strides": (2, 3)}, (2, 6, 5, 4), "Linear"),
        ({"kernel_size": (2, 2), "strides": 3}, (2, 6, 5, 4), None),
        ({"kernel_size": (6, 5), "strides": 3}, (2, 6, 5, 4), "Linear"),
        ({"kernel_size": (2, 3), "strides": (2, 3)}, (2, 5, 7, 4), "Linear"),
        ({"kernel_size": (3,), "strides": 3}, (7, 4), "Linear"),
        (
            {"kernel_size": (2, 2), "strides": 2, "feature_group_count": 2},
            (2, 4, 6, 4),
            "LinearGeneral",
        ),
    ],
)
def test_convolutions_to_dense(assert_exact, kwargs, shape, kind):
    conv = nnx.Conv(4, 6, padding="VALID", rngs=nnx.Rngs(0), **kwargs)
    if kind is None:
        plan = fc.make_plan(conv, jnp.ones(shape), to="dense")
        assert not plan
        assert "between two windows are skipped" in plan.skipped[""]
        return
    other = assert_exact(conv, jnp.ones(shape), to="dense", count=1)
    assert type(other).__name__ == kind
    assert isinstance(other, (nnx.Linear, nnx.LinearGeneral))


def test_attention(assert_close):
    class Attend(nnx.Module):
        def __init__(self, masked=None):
            rngs = nnx.Rngs(0)
            self.attn = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)

        def __call__(self, x):
            return self.attn(x)

    model, x = Attend(), jax.random.normal(jax.random.key(0), (2, 5, 8))
    plan = fc.make_plan(model, x)
    conv = fc.convert_model(model, plan)
    assert len(plan) == 4
    assert isinstance(conv.attn.query, nnx.Conv)
    assert_close(conv(x), *as_function(model, x))


def test_containers_and_recurrent_cells(assert_close, assert_exact):
    blocks = nnx.Sequential(linear(4, 6), nnx.relu, nnx.Sequential(linear(6, 3)))
    assert_exact(blocks, jnp.ones((2, 4)), count=2)
    model = nnx.RNN(nnx.GRUCell(4, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    plan = fc.make_plan(model, x)
    conv = fc.convert_model(model, plan)
    assert len(plan) > 1
    assert_close(conv(x), *as_function(model, x))


class Shared(nnx.Module):
    def __init__(self):
        self.a = linear(4, 4)
        self.b = self.a
        self.c = linear(4, 4, seed=1)
        self.c.kernel = self.a.kernel

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


def test_shared_modules_and_tied_params_stay_shared(assert_exact):
    model = Shared()
    plan = fc.make_plan(model, jnp.ones((2, 4)))
    other = assert_exact(model, jnp.ones((2, 4)), count=2)
    assert other.a is other.b
    assert other.c.kernel is other.a.kernel
    assert other.c.bias is not other.a.bias
    # A pure dict in which the tied array stands twice is converted in both places.
    twice = {n: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for n in "ac"}
    assert fc.convert_params(twice, plan)["c"]["kernel"].shape == (1, 4, 4)


def test_a_parameter_that_is_missing_is_still_an_error():
    plan = fc.make_plan(Shared(), jnp.ones((2, 4)))
    state = nnx.state(Shared())
    del state["a"]["kernel"]
    with pytest.raises(fc.PlanError, match="no leaf 'a/kernel'"):
        fc.convert_params(state, plan)


class Scanned(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return nnx.relu(block(x)) - 3

        return forward(self.blocks, x)


class Mapped(Scanned):
    def __call__(self, x):
        return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.blocks, x)


@pytest.mark.parametrize("model", [Scanned, Mapped])
def test_stacks_run_under_scan_and_vmap(assert_exact, model):
    other = assert_exact(model(), jnp.ones((2, 4)), count=1)
    assert other.blocks.kernel.shape == (3, 1, 4, 4)


@pytest.mark.slow
def test_jit_grad_and_an_optimizer_step_agree(assert_close):
    model = Net("CHW")
    plan = fc.make_plan(model, X)
    conv = fc.convert_model(model, plan)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss, grads

    def train(model):
        optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
        steps = [step(model, optimizer, X) for _ in range(2)]
        return [
            *(loss for loss, _ in steps),
            *(grads for _, grads in steps),
            nnx.state(model, nnx.Param),
        ]

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    *losses, first, second, after = train(conv)
    trees = [fc.restore_params(tree, plan) for tree in (first, second, after)]
    assert_close(
        jax.tree.leaves([*losses, *trees]),
        lambda p: jax.tree.leaves(train(nnx.merge(graphdef, p, rest, copy=True))),
        params,
    )


@pytest.mark.parametrize("form", [nnx.to_pure_dict, lambda state: state])
def test_optimizer_state_moves_with_a_state_of_params(form):
    model = linear(4, 3)
    plan = fc.make_plan(model, jnp.ones((2, 4)))
    tx, params = optax.adam(1e-2), form(nnx.state(model, nnx.Param))
    moved = fc.convert_opt_state(tx.init(params), plan, tx=tx, params=params)
    assert moved[0].mu["kernel"].shape == (1, 4, 3)


def test_split_merge_and_clone_keep_the_conversion():
    model = Net()
    conv = fc.convert_model(model, fc.make_plan(model, X))
    conv.eval()
    graphdef, params, rest = nnx.split(conv, nnx.Param, ...)
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(conv)))
    again = nnx.merge(graphdef, params, rest)
    np.testing.assert_array_equal(again(X), conv(X))
    abstract = nnx.eval_shape(lambda: fc.convert_model(Net(), fc.make_plan(Net(), X)))
    assert abstract.fc1.kernel.shape == (6, 5, 4, 8)


def test_low_precision_keeps_dtypes_and_is_exact(assert_exact):
    dtype = jnp.bfloat16
    model = linear(8, 3, dtype=dtype, param_dtype=dtype, precision="highest")
    other = assert_exact(model, jnp.ones((2, 8), dtype), count=1)
    assert (other.dtype, other.param_dtype, other.precision) == (
        dtype,
        dtype,
        "highest",
    )
    assert other(jnp.ones((2, 8), dtype)).dtype == dtype


@needs("flax", "0.12.0")
def test_mixed_precision_and_preferred_element_type(assert_exact):
    model = linear(8, 3, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    other = assert_exact(model, jnp.ones((2, 8)), count=1)
    assert other(jnp.ones((2, 8))).dtype == model(jnp.ones((2, 8))).dtype
    assert other.kernel.dtype == jnp.float32


def test_metadata_follows_the_axes():
    model = linear(120, 8)
    names = ("embed", "mlp")
    model.kernel = nnx.Param(model.kernel[...], tag="mine", **named(names))
    model.bias = nnx.Param(jnp.ones(8), **named(("mlp",)))
    plan = fc.make_plan(model, jnp.ones((2, 120)), rules=["*=6x5"])
    other = fc.convert_model(model, plan)
    assert axis_names(other.kernel) == ("embed", None, None, "mlp")
    assert other.kernel.get_metadata()["tag"] == "mine"
    state = fc.convert_params(nnx.state(model), plan)
    assert state["kernel"].get_metadata() == other.kernel.get_metadata()
    specs = fc.convert_params(nnx.get_partition_spec(nnx.state(model)), plan)
    want = PartitionSpec("embed", None, None, "mlp")
    assert raw_value(specs["kernel"]) == want
    assert axis_names(model.kernel) == ("embed", "mlp")
    back = fc.convert_model(other, plan.inverse())
    assert back.kernel.get_metadata() == model.kernel.get_metadata()


def test_other_attributes_of_a_layer_stay_on_it():
    model = linear(4, 3)
    model.note = "hello"  # pyright: ignore
    model.calls = nnx.Variable(jnp.zeros(()))  # pyright: ignore
    plan = fc.make_plan(model, jnp.ones((2, 4)))
    other = fc.convert_model(model, plan)
    assert other.note == "hello"  # pyright: ignore
    assert set(nnx.to_pure_dict(nnx.state(other))) == {"bias", "calls", "kernel"}


def test_adapters_are_kept_and_applied(assert_exact):
    model = nnx.LoRA(4, 2, 3, base_module=linear(4, 3), rngs=nnx.Rngs(0))
    model = with_whole_numbers(model)
    other = assert_exact(model, jnp.ones((2, 4)), count=3)
    assert isinstance(other.base_module, nnx.Conv)
    assert (other.lora_a.shape, other.lora_b.shape) == ((1, 4, 2), (1, 2, 3))


def test_in_place_changes_the_model_itself_and_whoever_shares_it():
    model = Net()
    layer, kernel = model.fc1, model.fc1.kernel
    want = fc.convert_model(model, fc.make_plan(model, X))
    other = fc.convert_model(model, fc.make_plan(model, X), inplace=True)
    assert other is model
    assert model.fc1 is layer
    assert layer.kernel is kernel
    assert isinstance(layer, nnx.Conv)
    assert_same(nnx.state(want), nnx.state(model))


def test_in_place_never_holds_two_copies_of_the_weights():
    class Wide(nnx.Module):
        def __init__(self):
            self.layers = module_list([linear(6 * 64, 64) for _ in range(8)])

        def __call__(self, x):
            x = x.transpose(0, 2, 1).reshape(2, -1)  # CW: the kernels are transposed
            return [layer(x) for layer in self.layers]

    def alive():
        arrays = jax.block_until_ready(jax.live_arrays())
        # A reshaped array shares its memory with the one it is a view of.
        bytes_at: dict[int, int] = {}
        for shard in (s.data for a in arrays for s in a.addressable_shards):
            start = shard.unsafe_buffer_pointer()
            bytes_at[start] = max(shard.nbytes, bytes_at.get(start, 0))
        return sum(bytes_at.values())

    model = Wide()
    plan = fc.make_plan(model, jnp.ones((2, 6, 64)))
    assert plan["layers/0"].order == "CW"
    size = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
    gc.collect()  # what earlier tests left behind must not be freed in between
    peak, before = 0, alive()
    move = converted.convert_leaf

    def watched(*args):
        nonlocal peak
        value = move(*args)
        peak = max(peak, alive() - before)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted, "convert_leaf", watched)
        fc.convert_model(model, plan, inplace=True)
    assert peak <= size / 8 * 1.01  # one layer's worth, not the model's
    gc.collect()  # a cycle may hold the last layer's old kernel for a while
    assert alive() == before


def test_a_failed_conversion_in_place_leaves_the_model_whole():
    model = Net()
    plan = fc.make_plan(model, X)
    model.fc2 = linear(8, 3)
    before = nnx.graphdef(model)
    with pytest.raises(fc.PlanError, match=r"'fc2' of shape .*, got \(8, 3\)"):
        fc.convert_model(model, plan, inplace=True)
    assert nnx.graphdef(model) == before


def test_mistakes_are_named():
    model = Net()
    plan = fc.make_plan(model, X)
    conv = fc.convert_model(model, plan)
    with pytest.raises(fc.PlanError, match="'fc1' is already converted"):
        fc.convert_model(conv, plan)
    with pytest.raises(fc.PlanError, match=r"with the module 'fc1'"):
        fc.convert_model(linear(8, 3), plan)
    model.fc1 = nnx.Dropout(0.5)  # pyright: ignore
    with pytest.raises(fc.PlanError, match=r"at 'fc1', .* got a Dropout"):
        fc.convert_model(model, plan)
    with pytest.raises(TypeError, match=r"got str.*flax\.nnx Module"):
        fc.convert_model("model", plan)


def test_a_window_of_another_size_is_refused_when_called():
    conv = nnx.Conv(3, 2, (6, 5), padding="VALID", rngs=nnx.Rngs(0))
    dense = fc.convert_model(conv, fc.make_plan(conv, X, to="dense"))
    with pytest.raises(fc.PlanError, match="the planned full window"):
        dense(jnp.ones((1, 7, 5, 3)))


def test_display_shows_a_conv():
    model = Net()
    conv = fc.convert_model(model, fc.make_plan(model, X))
    text = repr(conv.fc1)
    nnx.display(conv.fc2)
    assert text.startswith("Conv(")
    assert "kernel_size=(6, 5)" in text
    assert "LayerPlan" not in text


@needs("flax", "0.12.4")
def test_out_sharding_on_an_explicit_mesh():
    mesh = jax.make_mesh((1, 1), ("x", "y"), (jax.sharding.AxisType.Explicit,) * 2)
    model = with_whole_numbers(linear(120, 8))
    plan = fc.make_plan(model, jnp.ones((2, 120)), rules=["*=6x5"])
    conv = fc.convert_model(model, plan)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 120)), PartitionSpec("x", None))
        want = nnx.jit(lambda m, x: m(x, out_sharding=PartitionSpec("x", "y")))(
            model, x
        )
        got = nnx.jit(lambda m, x: m(x, out_sharding=PartitionSpec("x", "y")))(conv, x)
    assert jax.typeof(got).sharding.spec == jax.typeof(want).sharding.spec
    np.testing.assert_array_equal(got, want)
