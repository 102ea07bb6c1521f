import jax
import numpy as np
import optax
import pytest
from flax import serialization

from fcconv_jax import convert_params
from fcconv_jax.checkpoints import convert_checkpoint
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.messages.errors import CheckpointError, PlanError
from fcconv_jax.plan import LayerPlan, Plan


def layer(shape, window, order):
    kernel = kernel_rearrangement(shape, window, order=order)
    return LayerPlan(
        *("full_window", "Dense", window, order, (("kernel", kernel),)),
        *((1, shape[0]), (1, 1)),
    )


FC, OUT = layer((12, 5), (2, 2), "CHW"), layer((5, 3), (1, 1), "HWC")
PLAN = Plan("conv", (("fc", FC), ("out", OUT)))


def params(seed=0, out=True):
    rng = np.random.default_rng(seed)
    tree = {"fc": {"kernel": rng.normal(size=(12, 5)).astype(np.float32)}}
    if out:
        tree["out"] = {"kernel": rng.normal(size=(5, 3)).astype(np.float32)}
    return tree


@pytest.fixture
def converted(tmp_path):
    """Names of the leaves that move when a tree is converted."""

    def converted(tree, **options):
        src = tmp_path / "src.msgpack"
        src.write_bytes(serialization.to_bytes(tree))
        report = convert_checkpoint(src, tmp_path / "dst.msgpack", PLAN, **options)
        (tmp_path / "dst.msgpack").unlink()
        return {name.removesuffix("/kernel") for name, *_ in report.converted}

    return converted


def moments(tree):
    return optax.adam(1e-2).init(tree)


def test_the_params_of_another_model_stay(converted):
    gen, disc = params(), params(1, out=False)
    tree = {"gen": {"params": gen}, "disc": {"params": disc}}
    assert converted(tree) == {"gen/params/fc", "gen/params/out"}
    assert converted(tree, prefix="gen/params") == {"gen/params/fc", "gen/params/out"}
    with pytest.raises(CheckpointError, match="no leaf 'disc/params/out/kernel'"):
        converted(tree, prefix="disc/params")


def test_each_model_keeps_its_own_optimizer(converted):
    gen, disc = params(), params(1, out=False)
    tree = {
        name: {"params": p, "opt_state": moments(p)}
        for name, p in (("gen", gen), ("disc", disc))
    }
    assert converted(tree) == {
        f"gen/{part}/{name}"
        for part in ("params", "opt_state/0/mu", "opt_state/0/nu")
        for name in ("fc", "out")
    }
    both = {"gen": gen, "disc": disc}
    tree = {
        "gen": {"params": gen},
        "disc": {"params": disc},
        "opt_state": moments(both),
    }
    assert {n for n in converted(tree) if "opt" in n} == {
        f"opt_state/0/{m}/gen/{name}" for m in ("mu", "nu") for name in ("fc", "out")
    }
    tree["opt_state"] = moments(gen)
    with pytest.raises(
        CheckpointError, match="may follow the params of several models"
    ):
        converted(tree)


def test_two_alike_move_both_or_by_the_prefix(converted):
    tree = {"gen": {"params": params()}, "disc": {"params": params(1)}}
    both = {f"{m}/params/{n}" for m in ("gen", "disc") for n in ("fc", "out")}
    assert converted(tree) == both
    assert converted(tree, prefix="disc/params") == {
        "disc/params/fc",
        "disc/params/out",
    }
    assert converted(tree, prefix=["gen/params", "disc/params"]) == both
    tree["disc"]["params"]["more"] = np.ones(3)
    with pytest.raises(CheckpointError, match=r"fits under .*prefix= \(--prefix\)"):
        converted(tree)


def test_single_numbers_for_each_leaf_stay(converted):
    one = jax.tree.map(lambda _: np.ones(1, np.float32), params())
    tree = {"params": params(), "opt_state": {"init_dist": one}}
    assert converted(tree) == {"params/fc", "params/out"}


def test_averages_move_along_and_what_is_like_one_in_part_is_asked(converted):
    tree = {"params": params(), "ema_params": params(1), "step": 3}
    assert converted(tree) == {
        f"{part}/{name}" for part in ("params", "ema_params") for name in ("fc", "out")
    }
    tree = {"params": params(), "teacher": params(1, out=False)}
    with pytest.raises(
        CheckpointError, match=r"'teacher' may be a copy.*lacks 'out/kernel'"
    ):
        converted(tree)
    assert converted(tree, prefix="params") == {"params/fc", "params/out"}


@pytest.mark.parametrize(
    "tx",
    [
        optax.flatten(optax.adam(1e-2)),
        optax.chain(optax.clip(1.0), optax.flatten(optax.sgd(0.1, momentum=0.9))),
        optax.masked(
            optax.flatten(optax.adam(1e-2)),
            lambda p: {k: {"kernel": k == "fc"} for k in p},
        ),
    ],
)
@pytest.mark.parametrize("place", ["opt_state", "optimizer"])
def test_moments_in_one_vector_are_refused(converted, tx, place):
    tree = {"params": params(), place: tx.init(params())}
    with pytest.raises(CheckpointError, match=r"may hold entries .*optax\.flatten"):
        converted(tree)


def test_one_vector_of_what_keeps_its_order_stays_right(tmp_path):
    tree = {
        "params": params(),
        "opt_state": optax.flatten(optax.adam(1)).init(params()),
    }
    src = tmp_path / "src.msgpack"
    src.write_bytes(serialization.to_bytes(tree))
    plan = Plan("conv", (("fc", layer((12, 5), (2, 2), "HWC")), ("out", OUT)))
    report = convert_checkpoint(src, tmp_path / "dst.msgpack", plan)
    assert len(report.converted) == 2


@pytest.mark.parametrize(
    "extra",
    [
        {"batch_stats": {"norm": {"mean": np.ones(75, np.float32)}}},
        {"rng": np.arange(4, dtype=np.uint32), "loss": np.ones(60, np.float32)},
    ],
)
def test_other_arrays_stay(converted, extra):
    tree = {"params": {**params(), "norm": {"scale": np.ones(9, np.float32)}}, **extra}
    assert converted(tree) == {"params/fc", "params/out"}


@pytest.mark.parametrize("order", [1, -1])
def test_a_copy_without_names_is_refused(converted, order):
    leaves = [layer["kernel"] for layer in params(1).values()][::order]
    tree = {"params": params(), "ema": leaves}
    with pytest.raises(CheckpointError, match="'ema' is a list of 2 leaves"):
        converted(tree)
    with pytest.raises(PlanError, match="'ema' is a list of 2 leaves"):
        convert_params(tree, PLAN)
    assert converted(tree, prefix="params") == {"params/fc", "params/out"}
    # Lists of anything else stay.
    tree["ema"] = [leaves[0], leaves[0]]
    assert converted(tree) == {"params/fc", "params/out"}
