import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fcconv_jax.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import FORMATS
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.messages.errors import CheckpointError
from fcconv_jax.plan import LayerPlan, Plan

DTYPES = (
    "float32 float64 float16 bfloat16 float8_e4m3fn float8_e5m2 int8 int16 int32 int64 "
    "uint8 uint16 uint32 uint64 bool complex64 complex128 int4 float8_e4m3b11fnuz"
).split()


LACKS = {
    "safetensors": {"complex128", "int4", "float8_e4m3b11fnuz"},
    "orbax": set(),
    "msgpack": set(),
}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@pytest.mark.parametrize("format", FORMATS)
def test_planned_leaves_move_and_the_rest_keeps_its_bits(
    case, save, leaves, assert_same_bits, tmp_path, format
):
    seen = []
    report = convert_checkpoint(
        save(case.dense, format),
        tmp_path / "conv",
        case.plan,
        progress=lambda *call: seen.append(call),
    )
    got, dense = leaves(tmp_path / "conv"), case.dense
    assert_same_bits(got.pop("head.kernel"), case.conv_head(dense["head"]["kernel"]))
    assert_same_bits(
        got.pop("block.mix.kernel"),
        dense["block"]["mix"]["kernel"].reshape(1, 1, 6, 4),
    )
    assert_same_bits(got.pop("head.bias"), dense["head"]["bias"])
    assert_same_bits(got.pop("block.norm.scale"), dense["block"]["norm"]["scale"])
    assert_same_bits(got.pop("block.head.kernel"), dense["block"]["head"]["kernel"])
    assert not got
    assert report.format == format
    assert report.leaves == 5
    what, done, totals = zip(*seen)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]} == {2 * report.nbytes}
    assert set(what) == {"checkpoint: writing", "checkpoint: checking"}
    assert {
        name.replace("/", ".").removeprefix("params.") for name, *_ in report.converted
    } == {"head.kernel", "block.mix.kernel"}
    assert "2 of 5 leaves converted" in str(report)


@pytest.mark.parametrize("format", FORMATS)
def test_restore_needs_nothing_else_and_is_exact(
    case, save, leaves, assert_same_bits, tmp_path, format
):
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    want, got = leaves(src), leaves(tmp_path / "back")
    assert list(got) == list(want)
    for name in want:
        assert_same_bits(got[name], want[name])
    assert read_checkpoint(tmp_path / "back").plan is None
    if format != "orbax":  # an Orbax directory holds the time of the save
        assert (tmp_path / "back").read_bytes() == src.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_goes_there_and_back_to_the_bit(
    write, leaves, assert_same_bits, tmp_path, listing, format, kind
):
    dtype = dtype_of(kind)
    rng = np.random.default_rng(1)
    if kind == "bool":
        values = rng.integers(0, 2, (12, 3)).astype(bool)
    elif kind == "int4":
        values = rng.integers(-8, 8, (12, 3)).astype(dtype)
    else:
        raw = rng.integers(0, 256, 36 * dtype.itemsize, np.uint8)
        values = raw.view(dtype).reshape(12, 3)
    kernel = Rearrangement((12, 3), (2, 3, 2, 3), (1, 2, 0, 3), (3, 2, 2, 3))
    layer = LayerPlan(
        "full_window", "Dense", (3, 2), "CHW", (("kernel", kernel),), (1, 12), (1, 1)
    )
    plan = Plan("conv", (("fc", layer),))
    tree = {"fc": {"kernel": values}, "other": {"x": values[:5]}}
    if kind in LACKS[format]:
        with pytest.raises(CheckpointError, match=f"src: .*{kind}"):
            write(tmp_path / "src", tree, format, "/")
        assert not listing()
        return
    src = write(tmp_path / "src", tree, format, "/")
    convert_checkpoint(src, tmp_path / "conv", plan)
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    got = leaves(tmp_path / "back")
    assert_same_bits(got["fc.kernel"], values)
    assert_same_bits(got["other.x"], values[:5])
    moved = leaves(tmp_path / "conv")["fc.kernel"]
    assert_same_bits(moved, values.reshape(2, 3, 2, 3).transpose(1, 2, 0, 3))


@pytest.mark.parametrize("format", FORMATS)
def test_nan_payloads_and_signed_zeros_survive(write, leaves, case, tmp_path, format):
    bits = np.array([0x7FC12345, 0xFF800001, 0x80000000, 0x7F800000, 1], np.uint32)
    tree = {"zeros": {"a": np.full((3, 4), -0.0, np.float32)}}
    tree |= {"nans": {"b": bits.view(np.float32)}, **case.dense}
    src = write(tmp_path / "src", tree, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    got = leaves(tmp_path / "conv")
    assert (got["nans.b"].view(np.uint32) == bits).all()
    assert (got["zeros.a"].view(np.uint32) == 0x80000000).all()


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name="mix")(x))
        return nn.Dense(7, name="head")(x.reshape(x.shape[0], -1))


PLAIN = """
import sys
sys.modules["fcconv_jax"] = None  # importing it raises ImportError from here on
import flax, flax.linen as nn, jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (1, 1), padding="VALID", name="mix")(x))
        x = nn.Conv(7, (4, 3), padding="VALID", name="head")(x)
        return x.reshape(x.shape[0], -1)

folder = sys.argv[1]
x = jnp.asarray(np.load(folder + "/x.npy"))
model = ConvNet()
fresh = model.init(jax.random.key(1), x)
orbax = ocp.StandardCheckpointer().restore(folder + "/conv-orbax", fresh)
with open(folder + "/conv-msgpack", "rb") as file:
    msgpack = serialization.from_bytes(fresh, file.read())
flat = load_file(folder + "/conv-safetensors")
safe = {"params": unflatten_dict({tuple(k.split(".")): v for k, v in flat.items()})}
assert jax.tree.structure(safe) == jax.tree.structure(fresh)
out = [model.apply(variables, x) for variables in (orbax, msgpack, safe)]
np.save(folder + "/y.npy", np.stack(out))
"""


@pytest.mark.slow
def test_a_plain_flax_model_with_conv_loads_it_without_this_package(
    assert_close, save, tmp_path
):
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
    model = DenseNet()
    variables = model.init(jax.random.key(2), x)
    params = jax.tree.map(np.asarray, variables["params"])
    params["mix"]["bias"] = np.arange(5, dtype=np.float32)
    layers = []
    for name, case, source, target in (
        ("mix", "pointwise", (6, 5), (1, 1, 6, 5)),
        ("head", "full_window", (60, 7), (4, 3, 5, 7)),
    ):
        kernel = Rearrangement.reshape(source, target)
        layer = LayerPlan(
            case, "Dense", target[:2], "HWC", (("kernel", kernel),), (1,), (1, 1)
        )
        layers.append((name, layer))
    for format in FORMATS:
        src = save(params, format, f"dense-{format}")
        convert_checkpoint(src, tmp_path / f"conv-{format}", Plan("conv", (*layers,)))
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAIN), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for got in np.load(tmp_path / "y.npy"):
        assert_close(got, lambda p: model.apply({"params": p}, x), params)
        assert np.abs(got).max() > 0.1


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_converted_already_is_refused(case, save, tmp_path, format, listing):
    convert_checkpoint(save(case.dense, format), tmp_path / "conv", case.plan)
    before = listing()
    with pytest.raises(
        CheckpointError, match=r"conv: .*got one converted to conv.*resto"
    ):
        convert_checkpoint(tmp_path / "conv", tmp_path / "again", case.plan)
    assert listing() == before


@pytest.mark.parametrize("format", FORMATS)
def test_what_holds_no_plan_cannot_be_restored(case, save, tmp_path, format, listing):
    src = save(case.dense, format)
    before = listing()
    with pytest.raises(
        CheckpointError, match=r"dense: expected one stored plan.*--plan"
    ):
        restore_checkpoint(src, tmp_path / "back")
    assert listing() == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_goes_back_by_hand_too(case, save, leaves, tmp_path, format):
    """A conv checkpoint trained elsewhere goes to dense with the inverse plan."""
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    conv = read_checkpoint(tmp_path / "conv")
    from fcconv_jax.checkpoints import Checkpoint

    write_one(tmp_path / "bare", Checkpoint(format, conv.tree))
    convert_checkpoint(tmp_path / "bare", tmp_path / "back", case.plan.inverse())
    want = leaves(src)
    for name, leaf in leaves(tmp_path / "back").items():
        np.testing.assert_array_equal(leaf, want[name])


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_from_one_format_to_another_and_back(
    case, save, leaves, assert_same_bits, tmp_path, source, target
):
    src = save(case.dense, source)
    convert_checkpoint(src, tmp_path / "conv", case.plan, format=target)
    assert inspect_checkpoint(tmp_path / "conv").format == target
    restore_checkpoint(tmp_path / "conv", tmp_path / "back", format=source)
    want, got = leaves(src), leaves(tmp_path / "back")
    got = {name.removeprefix("params."): leaf for name, leaf in got.items()}
    assert got.keys() == want.keys()
    for name in want:
        assert_same_bits(got[name], want[name])


def test_the_suffix_chooses_the_format(case, save, tmp_path):
    src = save(case.dense, "orbax")
    convert_checkpoint(src, tmp_path / "c.safetensors", case.plan)
    convert_checkpoint(src, tmp_path / "c.msgpack", case.plan)
    assert inspect_checkpoint(tmp_path / "c.safetensors").format == "safetensors"
    assert inspect_checkpoint(tmp_path / "c.msgpack").format == "msgpack"


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"l": [np.ones(2)]}, "'l' is a list"),
        ({"e": {}}, "'e' is empty"),
        ({"s": 3}, "leaf 's' is 3, not an array"),
        ({"a/b": np.ones(1)}, "the keys"),
    ],
)
def test_a_format_that_would_lose_something_is_refused(
    case, write, tmp_path, extra, what, listing
):
    src = write(tmp_path / "src", {**case.dense, **extra}, "orbax")
    before = listing()
    with pytest.raises(CheckpointError, match=rf"src: .*without loss: .*{what}"):
        convert_checkpoint(src, tmp_path / "c.safetensors", case.plan)
    assert listing() == before


def test_optimizer_moments_and_averages_move_along(case, write, tmp_path):
    rng = np.random.default_rng(3)
    moment = jax.tree.map(lambda a: rng.normal(size=a.shape), case.dense)
    tree = {
        "params": case.dense,
        "opt_state": [
            {"count": np.int32(3), "mu": moment, "nu": case.dense},
            {"lr": {"head": {"kernel": np.float32(0.5)}}},
        ],
        "ema_params": case.dense,
        "step": 7,
    }
    src = write(tmp_path / "src", tree, "orbax")
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    got = read_checkpoint(tmp_path / "conv").tree
    mu = got["opt_state"][0]["mu"]
    np.testing.assert_array_equal(
        mu["head"]["kernel"], case.conv_head(moment["head"]["kernel"])
    )
    assert mu["block"]["head"]["kernel"].shape == (24, 5)  # not planned
    assert mu["block"]["mix"]["kernel"].shape == (1, 1, 6, 4)
    assert got["ema_params"]["head"]["kernel"].shape == (3, 2, 4, 5)
    assert got["opt_state"][1]["lr"]["head"]["kernel"] == 0.5
    assert got["step"] == 7
    assert type(got["step"]) is int
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    back = read_checkpoint(tmp_path / "back").tree
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize(
    ("state", "leaf"),
    [
        ({"v_row": {"head": {"kernel": np.ones(24)}}}, "opt_state/v_row/head/kernel"),
        ({"mu": {"head": {"kernel": [np.ones(24)]}}}, "opt_state/mu/head/kernel/0"),
        (
            {"memory": {"head": {"kernel": np.ones((10, 24, 5))}}},
            "opt_state/memory/head/kernel",
        ),
    ],
)
def test_statistics_that_do_not_follow_entry_by_entry_are_refused(
    case, write, tmp_path, state, leaf, listing
):
    tree = {"params": case.dense, "opt_state": state}
    src = write(tmp_path / "src", tree, "orbax")
    before = listing()
    with pytest.raises(CheckpointError, match=rf"src: leaf '{leaf}'.*tx\.init"):
        convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert listing() == before


def test_an_adam_train_state_of_flax_goes_on(case, tmp_path):
    """The whole way with msgpack: Flax's own state dict of an optax state."""
    import optax
    from flax import serialization
    from flax.training.train_state import TrainState

    def state(params):
        return TrainState.create(
            apply_fn=lambda *_: None, params=params, tx=optax.adam(1e-2)
        )

    def step(train_state, conv):
        def loss(params):
            head = params["head"]["kernel"]
            head = head if conv else case.conv_head(head)
            weight = jnp.arange(head.size).reshape(head.shape)
            return jnp.sum(jnp.sin(head * weight))

        return train_state.apply_gradients(grads=jax.grad(loss)(train_state.params))

    dense = step(state(case.dense), conv=False)
    (tmp_path / "dense").write_bytes(serialization.to_bytes(dense))
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    like = jax.tree.map(np.copy, case.dense)
    like["head"]["kernel"] = case.conv_head(like["head"]["kernel"])
    like["block"]["mix"]["kernel"] = like["block"]["mix"]["kernel"].reshape(1, 1, 6, 4)
    conv = serialization.from_bytes(state(like), (tmp_path / "conv").read_bytes())
    got = step(conv, conv=True).params["head"]["kernel"]
    want = case.conv_head(step(dense, conv=False).params["head"]["kernel"])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prefix", ["", "params", "model", "state/params/params"])
def test_the_params_are_found_under_the_levels_above_them(
    case, write, tmp_path, prefix
):
    tree = case.dense
    for level in reversed([part for part in prefix.split("/") if part]):
        tree = {level: tree}
    src = write(tmp_path / "src", tree, "msgpack")
    report = convert_checkpoint(src, tmp_path / "conv", case.plan)
    lead = f"{prefix}/" if prefix else ""
    assert {name for name, *_ in report.converted} == {
        f"{lead}head/kernel",
        f"{lead}block/mix/kernel",
    }


def test_a_plan_that_starts_at_params_still_moves_the_moments(case, write, tmp_path):
    layers = tuple((f"params/{path}", layer) for path, layer in case.plan.items())
    tree = {"params": case.dense, "opt_state": {"mu": case.dense}}
    src = write(tmp_path / "src", tree, "msgpack")
    report = convert_checkpoint(src, tmp_path / "conv", Plan("conv", layers))
    assert "opt_state/mu/head/kernel" in {name for name, *_ in report.converted}


def test_a_plan_that_fits_twice_is_refused(case, write, tmp_path):
    other = {**case.dense, "more": np.ones(3)}
    tree = {"g": {"params": case.dense}, "d": {"params": other}}
    src = write(tmp_path / "src", tree, "msgpack")
    with pytest.raises(CheckpointError, match="under 'g/params' and under 'd/params'"):
        convert_checkpoint(src, tmp_path / "conv", case.plan)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scanned_stacks_move_below_their_layer_axis(write, tmp_path, axis):
    kernel = Rearrangement.reshape((6, 4), (1, 1, 6, 4))
    layer = LayerPlan(
        "pointwise",
        "Dense",
        (1, 1),
        "C",
        (("kernel", kernel),),
        (1, 6),
        (1, 1),
        stack_axes=(axis,),
    )
    plan = Plan("conv", (("layers/fc", layer),))
    stack = np.arange(72.0).reshape(3, 6, 4)
    tree = {"params": {"layers": {"fc": {"kernel": np.moveaxis(stack, 0, axis)}}}}
    src = write(tmp_path / "src", tree, "msgpack")
    convert_checkpoint(src, tmp_path / "conv", plan)
    got = read_checkpoint(tmp_path / "conv").tree["params"]["layers"]["fc"]["kernel"]
    want = np.moveaxis(stack.reshape(3, 1, 1, 6, 4), 0, axis)
    np.testing.assert_array_equal(got, want)
