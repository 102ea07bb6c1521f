import re
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import FrozenDict
from flax.linen import partitioning
from flax.training.train_state import TrainState
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

import fcconv_jax as fc
from fcconv_jax.backends.faults import PACKED
from fcconv_jax.params.leaves import convert_leaf


class Net(nn.Module):
    order: tuple = (0, 1, 2, 3)

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        x = x.transpose(self.order).reshape(x.shape[0], -1)
        return nn.Dense(6, name="out")(nn.relu(nn.Dense(5, name="head")(x)))


X = jax.ShapeDtypeStruct((2, 4, 3, 2), jnp.float32)
HWC, CHW = Net(), Net((0, 3, 1, 2))
PLAN, CHW_PLAN = fc.make_plan(HWC, X), fc.make_plan(CHW, X)
ABSTRACT = jax.eval_shape(HWC.init, jax.random.key(0), X)


def numbered(tree=ABSTRACT, dtype=np.float32):
    """A tree of NumPy arrays whose entries tell them apart."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(dtype), tree)


def bits(tree):
    return [
        (jax.tree_util.keystr(path), np.shape(leaf), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


TREES = {
    "variables": lambda v: v,
    "params": lambda v: v["params"],
    "frozen": flax.core.freeze,
    "frozen params": lambda v: flax.core.freeze(v["params"]),
    "params only": lambda v: {"params": v["params"]},
    "jax arrays": lambda v: jax.tree.map(jnp.asarray, v),
}


@pytest.mark.parametrize("plan", [PLAN, CHW_PLAN], ids=["HWC", "CHW"])
@pytest.mark.parametrize("name", TREES)
def test_trees_go_there_and_back(name, plan):
    tree = TREES[name](numbered())
    moved = fc.convert_params(tree, plan)
    assert jax.tree.structure(moved) == jax.tree.structure(tree)
    params = moved.get("params", moved)
    assert params["head"]["kernel"].shape == (4, 3, 2, 5)
    assert params["out"]["kernel"].shape == (1, 1, 5, 6)
    assert params["head"]["bias"].shape == (5,)
    assert bits(fc.restore_params(moved, plan)) == bits(tree)
    assert isinstance(
        params["head"]["kernel"], type(tree.get("params", tree)["head"]["kernel"])
    )
    if "batch_stats" in tree:
        assert moved["batch_stats"] is not None
        assert bits(moved["batch_stats"]) == bits(tree["batch_stats"])


def test_where_each_entry_goes():
    kernel = np.arange(24 * 5).reshape(24, 5)
    params = {**numbered()["params"], "head": {"kernel": kernel, "bias": np.zeros(5)}}
    hwc = fc.convert_params(params, PLAN)["head"]["kernel"]
    chw = fc.convert_params(params, CHW_PLAN)["head"]["kernel"]
    for h, w, c in np.ndindex(4, 3, 2):
        np.testing.assert_array_equal(hwc[h, w, c], kernel[(h * 3 + w) * 2 + c])
        np.testing.assert_array_equal(chw[h, w, c], kernel[(c * 4 + h) * 3 + w])


def test_numpy_reshapes_share_memory():
    tree = numbered()
    moved = fc.convert_params(tree, PLAN)
    back = fc.restore_params(moved, PLAN)
    for other in (moved, back):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
            assert np.shares_memory(a, b)


DTYPES = [
    *("float64", "float32", "bfloat16", "float16", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "int4", "uint4", "int8", "int32", "uint64"),
    *("bool", "float4_e2m1fn"),
]
if PACKED.is_in(jaxlib.version.__version__):
    DTYPES = [n for n in DTYPES if not re.match("u?int4|float4", n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype):
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(0)

    def fill(leaf):
        raw = rng.integers(0, 256, leaf.size * dtype.itemsize).astype(np.uint8)
        if dtype.name in ("int4", "uint4", "float4_e2m1fn", "bool"):
            return (raw % 2).reshape(leaf.shape).astype(dtype)
        return raw.view(dtype).reshape(leaf.shape)

    tree = {"params": jax.tree.map(fill, ABSTRACT["params"])}
    moved = fc.convert_params(tree, CHW_PLAN)
    assert bits(fc.restore_params(moved, CHW_PLAN)) == bits(tree)
    if dtype.itemsize < 8:
        on_device = jax.tree.map(jnp.asarray, tree)
        assert bits(jax.jit(lambda t: fc.convert_params(t, CHW_PLAN))(on_device)) == (
            bits(moved)
        )


def test_negative_zero_infinities_and_nan_payloads():
    special = np.array([-0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    payload = np.array([0x7FC12345, 0xFF812345], np.uint32).view(np.float32)
    values = np.resize(np.concatenate([special, payload]), (24, 5))
    tree = numbered()["params"]
    tree["head"]["kernel"] = values
    for leaves in (tree, jax.tree.map(jnp.asarray, tree)):
        moved = fc.convert_params(leaves, CHW_PLAN)
        assert bits(fc.restore_params(moved, CHW_PLAN)) == bits(tree)


def test_under_jit_grad_and_vmap():
    params = jax.tree.map(jnp.asarray, numbered()["params"])
    moved = fc.convert_params(params, CHW_PLAN)
    assert bits(jax.jit(fc.convert_params, static_argnums=1)(params, CHW_PLAN)) == bits(
        moved
    )
    weights = jax.tree.map(lambda x: x * 2 + 1, moved)

    def loss(params):
        tree = fc.convert_params(params, CHW_PLAN)
        return sum(
            (a * b).sum() for a, b in zip(*map(jax.tree.leaves, (tree, weights)))
        )

    gradient = jax.grad(loss)(params)
    assert bits(gradient) == bits(fc.restore_params(weights, CHW_PLAN))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    both = jax.vmap(lambda t: fc.convert_params(t, CHW_PLAN))(stacked)
    assert bits(jax.tree.map(lambda x: x[0], both)) == bits(moved)


def test_abstract_trees():
    moved = fc.convert_params(ABSTRACT, CHW_PLAN)
    assert moved == jax.eval_shape(lambda v: fc.convert_params(v, CHW_PLAN), ABSTRACT)
    assert fc.restore_params(moved, CHW_PLAN) == ABSTRACT


def test_tied_arrays_stay_one():
    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="a")(nn.Dense(4, name="b")(x))

    plan = fc.make_plan(Tower(), jnp.ones((2, 4)))
    layer = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    moved = fc.convert_params({"a": layer, "b": dict(layer)}, plan)
    assert moved["a"]["kernel"] is moved["b"]["kernel"]
    assert moved["a"]["bias"] is moved["b"]["bias"]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_stacked_leaves_move_step_by_step(axis):
    layer = CHW_PLAN["head"].kernel
    steps = [np.random.default_rng(i).normal(size=(24, 5)) for i in range(24)]
    stacked = np.stack(steps, axis)
    moved = convert_leaf(layer, stacked, (axis,))
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(np.take(moved, i, axis), layer(step))
    back = convert_leaf(layer.inverse(), moved, (axis,))
    np.testing.assert_array_equal(back, stacked)


def test_doubly_stacked_leaves():
    layer = CHW_PLAN["head"].kernel
    inner = np.random.default_rng(0).normal(size=(2, 3, 24, 5))
    stacked = np.moveaxis(inner, (1, 0), (2, 0))  # inner axis 1, then outer axis 0
    moved = convert_leaf(layer, stacked, (1, 0))
    assert moved.shape == (2, 4, 3, 3, 2, 5)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(moved[i, :, j], layer(inner[i, j]))
    np.testing.assert_array_equal(convert_leaf(layer.inverse(), moved, (1, 0)), stacked)


# ------------------------------------------------------------ refusals


def test_refusals_name_the_leaf():
    params = numbered()["params"]
    del params["head"]["kernel"]
    with pytest.raises(fc.PlanError, match=r"no leaf 'head/kernel'.*strict=False"):
        fc.convert_params(params, PLAN)
    with pytest.raises(fc.PlanError, match="no leaf 'params/head/kernel'"):
        fc.convert_params({"params": params}, PLAN)
    partly = fc.convert_params(params, PLAN, strict=False)
    assert partly["out"]["kernel"].shape == (1, 1, 5, 6)
    params = numbered()["params"]
    params["head"]["kernel"] = np.zeros((25, 5))
    with pytest.raises(fc.PlanError, match=r"leaf 'head/kernel'.*\(24, 5\).*\(25, 5\)"):
        fc.convert_params(params, PLAN)
    moved = fc.convert_params(numbered(), PLAN)
    with pytest.raises(fc.PlanError, match=r"'params/head/kernel'.*this form already"):
        fc.convert_params(moved, PLAN)
    with pytest.raises(fc.PlanError, match="'params/head/kernel'"):
        fc.restore_params(numbered(), PLAN)
    for strict in (True, False):
        with pytest.raises(fc.PlanError, match="no leaf 'head/kernel'") as caught:
            fc.convert_params({"something": {"e": np.zeros(3)}}, PLAN, strict=strict)
        assert "strict=False" not in str(caught.value)
    with pytest.raises(fc.PlanError, match="the tree is empty"):
        fc.convert_params({}, PLAN)


# ------------------------------------------------------------ names and shardings


class Boxed(nn.Module):
    logical: bool

    @nn.compact
    def __call__(self, x, _=None):
        boxed = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        init = nn.initializers
        x = x.reshape(x.shape[0], 4, 2).swapaxes(1, 2).reshape(x.shape[0], -1)
        x = nn.Dense(
            8,
            name="d",
            kernel_init=boxed(init.lecun_normal(), ("embed", "mlp")),
            bias_init=boxed(init.zeros, ("mlp",)),
        )(x)
        return x, None


@pytest.mark.parametrize("logical", [False, True])
def test_names_in_boxes_move_along(logical):
    model, x = Boxed(logical), jnp.ones((3, 8))
    plan = fc.make_plan(model, x)
    assert plan["d"].order == "CW"
    variables = model.init(jax.random.key(0), x)
    moved = fc.convert_params(variables, plan)["params"]["d"]
    assert type(moved["kernel"]) is type(variables["params"]["d"]["kernel"])
    # Flattened channel first, the name of the rows stays on the channels.
    assert moved["kernel"].names == (None, "embed", "mlp")  # pyright: ignore
    assert moved["kernel"].value.shape == (4, 2, 8)  # pyright: ignore
    assert moved["bias"].names == ("mlp",)  # pyright: ignore
    spec = nn.get_partition_spec({"params": {"d": moved}})
    assert spec["params"]["d"]["kernel"] == PartitionSpec(None, "embed", "mlp")
    back = fc.restore_params({"params": {"d": moved}}, plan)
    assert bits(back) == bits(variables)
    assert back["params"]["d"]["kernel"].names == ("embed", "mlp")  # pyright: ignore


@pytest.mark.parametrize("axis", [0, 1])
def test_names_under_scan_keep_the_layer_axis(axis):
    scanned = nn.scan(
        Boxed,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=8,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    model, x = scanned(True), jnp.ones((3, 8))
    plan = fc.make_plan(model, x, None)
    assert plan["d"].stack_axes == (axis,)
    variables = jax.eval_shape(model.init, jax.random.key(0), x, None)
    box = variables["params"]["d"]["kernel"]
    assert isinstance(box, nn.LogicallyPartitioned)
    moved = fc.convert_params(variables, plan)["params"]["d"]["kernel"]
    names = [None, "embed", "mlp"]
    names.insert(axis, "layers")
    assert moved.names == tuple(names)
    assert (
        fc.restore_params({"params": {"d": {"kernel": moved}}}, plan, strict=False)[
            "params"
        ]["d"]["kernel"].names
        == box.names
    )
    conv = fc.convert_model(model, plan)
    init = jax.eval_shape(conv.init, jax.random.key(0), x, None)
    assert init["params"]["d"]["kernel"].names == tuple(names)
    assert init["params"]["d"]["kernel"].value.shape == moved.value.shape


MESH = AbstractMesh((2, 2), ("data", "model"))


def specs(kernel, bias=()):
    head = {"kernel": PartitionSpec(*kernel), "bias": PartitionSpec(*bias)}
    return {"head": head, "out": {"kernel": PartitionSpec(), "bias": PartitionSpec()}}


@pytest.mark.parametrize(
    ("plan", "before", "after"),
    [
        (PLAN, ("data", "model"), ("data", None, None, "model")),
        (PLAN, (None, "model"), (None, None, None, "model")),
        (PLAN, (("data", "model"),), (("data", "model"),)),
        (PLAN, (), ()),
        (CHW_PLAN, ("data", "model"), (None, None, "data", "model")),
    ],
)
def test_partition_specs(plan, before, after):
    moved = fc.convert_params(specs(before), plan)["head"]["kernel"]
    trimmed = tuple(moved)
    while trimmed and trimmed[-1] is None:
        trimmed = trimmed[:-1]
    assert trimmed == after
    back = fc.restore_params(fc.convert_params(specs(before), plan), plan)
    assert [n for n in back["head"]["kernel"] if n] == [n for n in before if n]


def test_named_shardings_and_sharded_abstract_arrays():
    def sharded(leaf, spec):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(MESH, spec)
        )

    spec = specs((*("data", "model")[:1], None))
    tree = jax.tree.map(
        sharded,
        ABSTRACT["params"] | {"BatchNorm_0": {}},
        spec | {"BatchNorm_0": {}},
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    moved = fc.convert_params(tree, CHW_PLAN)
    kernel = moved["head"]["kernel"]
    assert kernel.shape == (4, 3, 2, 5)
    assert kernel.sharding.spec == PartitionSpec(None, None, "data", None)
    shardings = jax.tree.map(lambda s: s.sharding, tree)
    assert fc.convert_params(shardings, CHW_PLAN)["head"]["kernel"] == kernel.sharding
    one = SingleDeviceSharding(jax.devices()[0])
    head = jax.ShapeDtypeStruct((24, 5), jnp.float32, sharding=one)
    tree["head"]["kernel"] = head
    assert fc.convert_params(tree, PLAN)["head"]["kernel"].sharding == one


def test_shardings_that_cannot_follow_are_refused():
    # The rows are split over 6 devices; channel-first, that cuts through a channel.
    mesh = AbstractMesh((6,), ("x",))
    tree = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(("x",)),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    with pytest.raises(fc.PlanError, match=r"'head/kernel'.*does not divide"):
        fc.convert_params(tree, CHW_PLAN)
    moved = specs(())
    moved["head"]["kernel"] = PartitionSpec(None, "x")
    with pytest.raises(fc.PlanError, match=r"'head/kernel'.*named \[None, 'x', None\]"):
        fc.restore_params(moved, PLAN)


def test_axis_names_beside_the_params_are_rewritten():
    names = partitioning.AxisMetadata(PartitionSpec("embed", "mlp"))
    tree = {
        **numbered(),
        "params_axes": {"head": {"kernel_axes": names}, "other": {"w_axes": names}},
    }
    moved = fc.convert_params(tree, CHW_PLAN)
    axes = moved["params_axes"]
    assert axes["head"]["kernel_axes"].names == PartitionSpec(
        None, None, "embed", "mlp"
    )
    assert axes["other"]["w_axes"] == names
    back = fc.restore_params(moved, CHW_PLAN)
    assert back["params_axes"]["head"]["kernel_axes"].names == names.names
    logical = partitioning.get_axis_names(axes)
    assert logical["head"]["kernel"] == PartitionSpec(None, None, "embed", "mlp")


def test_train_state_moves_as_a_whole():
    params = jax.tree.map(jnp.asarray, numbered()["params"])
    state = TrainState.create(
        apply_fn=lambda *_: None, params=params, tx=optax.adam(0.1)
    )
    state = state.apply_gradients(grads=jax.tree.map(jnp.cos, params))
    moved = fc.convert_params(state, CHW_PLAN)
    assert moved.step == state.step
    assert moved.params["head"]["kernel"].shape == (4, 3, 2, 5)  # pyright: ignore
    assert moved.opt_state[0].mu["head"]["kernel"].shape == (4, 3, 2, 5)  # pyright: ignore
    assert bits(fc.restore_params(moved, CHW_PLAN)) == bits(state)
    abstract = jax.eval_shape(lambda: state)
    assert jax.eval_shape(lambda: moved) == fc.convert_params(abstract, CHW_PLAN)


# ------------------------------------------------------------ copies


@struct.dataclass
class Learner:
    online: Any
    nested: dict
    steps: int = 0


def shapes(tree):
    return jax.tree.map(np.shape, tree)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p, q: {"params": p, "ema_params": q},
        lambda p, q: {"actor": p, "critic": q},
        lambda p, q: {"actor": {"params": p}, "critic": {"params": q}},
        lambda p, q: optax.LookaheadParams(p, q),
        lambda p, q: Learner(p, {"target": {"params": q}, "count": np.arange(3)}),
        lambda p, q: [FrozenDict(p), {"deep": {"er": q}}],
        lambda p, q: {"params": p, "state": optax.EmaState(np.zeros(()), q)},
        lambda p, q: {"params": p, "opt_state": optax.adam(1.0).init(p)},
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_every_copy_moves(wrap, strict):
    params = numbered()["params"]
    tree = wrap(params, jax.tree.map(lambda a: a + 100, params))
    moved = fc.convert_params(tree, CHW_PLAN, strict=strict)
    there = {(24, 5): (4, 3, 2, 5), (5, 6): (1, 1, 5, 6)}
    want = jax.tree.map(lambda leaf: there.get(np.shape(leaf), np.shape(leaf)), tree)
    assert shapes(moved) == want
    assert bits(fc.restore_params(moved, CHW_PLAN, strict=strict)) == bits(tree)


def test_a_chosen_copy_moves_alone():
    params = numbered()["params"]
    moved = fc.convert_params(
        {"actor": params, "critic": params}, CHW_PLAN, prefix="critic"
    )
    assert moved["actor"]["head"]["kernel"].shape == (24, 5)
    assert moved["critic"]["head"]["kernel"].shape == (4, 3, 2, 5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["ema_params", "target", "lora"])
def test_a_copy_in_part_is_refused_by_name(name, strict):
    params, part = numbered()["params"], numbered()["params"]
    part["head"]["kernel"] = part["head"]["kernel"][:, :4]
    for other, how in (
        (part, r"'head/kernel' has shape \(24, 4\), not \(24, 5\)"),
        ({"head": params["head"]}, "it lacks 'BatchNorm_0/bias'"),
        ({**params, "more": np.zeros(3)}, "only it has 'more'"),
    ):
        with pytest.raises(fc.PlanError, match=f"'{name}' may be a copy.*{how}"):
            fc.convert_params({"params": params, name: other}, PLAN, strict=strict)
        if "more" in other:
            tree = {"params": params, name: {"params": other}}
            with pytest.raises(fc.PlanError, match=f"'{name}/params' may be a copy"):
                fc.convert_params(tree, PLAN)


def test_a_head_of_another_shape_stays_with_its_own_params():
    """Another model, which the plan does not fit: a discriminator, say."""
    gen, disc = numbered()["params"], numbered()["params"]
    disc["head"]["kernel"] = np.zeros((7, 2))
    tree = {"disc": {"params": disc}, "gen": {"params": gen}}
    moved = fc.convert_params(tree, CHW_PLAN)
    assert moved["gen"]["params"]["head"]["kernel"].shape == (4, 3, 2, 5)
    assert shapes(moved["disc"]["params"]) == shapes(disc)
