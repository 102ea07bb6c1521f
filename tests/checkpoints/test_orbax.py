import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from fcconv_jax.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
)
from fcconv_jax.checkpoints.checkpoint import OrbaxLayout


@pytest.fixture
def state(case):
    import optax

    state = TrainState.create(
        apply_fn=lambda *_: None,
        params=jax.tree.map(jnp.asarray, case.dense),
        tx=optax.chain(optax.clip(1.0), optax.adam(1e-2)),
    )
    return state.apply_gradients(grads=state.params)


@pytest.fixture
def converted(case, state):
    def move(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("block/mix/kernel"):
            return leaf.reshape(1, 1, 6, 4)
        if name.endswith("head/kernel") and "block" not in name:
            return case.conv_head(leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(move, state)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_standard_checkpoint_restores_into_the_converted_train_state(
    case, state, converted, tmp_path
):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", state, custom_metadata={"run": 7})
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(jnp.zeros_like, converted)
        assert_equal(checkpointer.restore(tmp_path / "conv", like), converted)
        custom = checkpointer.metadata(tmp_path / "conv").custom_metadata
    assert custom["run"] == 7
    assert custom["fcconv_plan"]["to"] == "conv"
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(jnp.zeros_like, state)
        assert_equal(checkpointer.restore(tmp_path / "back", like), state)
        custom = checkpointer.metadata(tmp_path / "back").custom_metadata
    assert custom == {"run": 7}


def test_everything_a_tree_may_hold_comes_through(case, tmp_path):
    tree = {
        "params": case.dense,
        "tuple": (np.ones(2), np.int32(3)),
        "list": [np.arange(3), None],
        "empty": {},
        "none": None,
        "step": 5,
        "rate": 0.1,
        "name": "fc",
        "wide": np.arange(3) + 2**40,
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", tree)
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    got = read_checkpoint(tmp_path / "conv").tree
    assert type(got["tuple"][1]) is np.int32
    assert type(got["step"]) is int
    assert type(got["rate"]) is float
    assert got["name"] == "fc"
    assert got["none"] is None
    assert got["list"][1] is None
    assert got["empty"] == {}
    assert got["wide"].dtype == np.int64
    assert (got["wide"] == tree["wide"]).all()


def test_a_manager_directory_gives_its_latest_step_as_a_manager_directory(
    case, state, converted, tmp_path
):
    with ocp.CheckpointManager(tmp_path / "dense") as manager:
        for step in (9, 10):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    extra=ocp.args.JsonSave({"data": step}),
                ),
                metrics={"loss": 0.5},
            )
        manager.wait_until_finished()
    info = inspect_checkpoint(tmp_path / "dense")
    assert info.layout == OrbaxLayout("10", ("state",))
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    like = jax.tree.map(jnp.zeros_like, converted)
    with ocp.CheckpointManager(tmp_path / "conv") as manager:
        assert manager.all_steps() == [10]
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore()
        )
        got = manager.restore(10, args=args)
        assert_equal(got["state"], converted)
        assert got["extra"] == {"data": 10}
    report = restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    assert "opt_state/1/0/mu/head/kernel" in {name for name, *_ in report.converted}

    # The step given by its directory, and the item in it.
    for src in ("dense/9", "dense/9/state"):
        name = src.replace("/", "-")
        convert_checkpoint(tmp_path / src, tmp_path / name, case.plan)
        restore_checkpoint(tmp_path / name, tmp_path / f"{name}-back")
    assert (tmp_path / "dense-9" / "extra" / "metadata").exists()
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "dense-9-state", like), converted)


def test_a_step_with_several_trees_converts_as_one(case, tmp_path):
    with ocp.CheckpointManager(tmp_path / "dense") as manager:
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(case.dense)),
            opt_state=ocp.args.StandardSave({"mu": case.dense}),
        )
        manager.save(3, args=args)
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    names = {name for name, *_ in report.converted}
    assert {"params/head/kernel", "opt_state/mu/head/kernel"} <= names
    with ocp.PyTreeCheckpointer() as checkpointer:
        params = checkpointer.restore(tmp_path / "conv" / "3" / "params")
    assert params["head"]["kernel"].shape == (3, 2, 4, 5)


def test_directories_of_the_v1_api_are_read_and_read_back_there(
    case, assert_same_bits, tmp_path
):
    v1 = ocp.v1
    v1.save(tmp_path / "dense", {"params": case.dense}, custom_metadata={"k": "v"})
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    got = v1.load(tmp_path / "conv")["params"]["head"]["kernel"]
    assert_same_bits(got, case.conv_head(case.dense["head"]["kernel"]))
    custom = v1.metadata(tmp_path / "conv").custom_metadata
    assert custom["k"] == "v"
    assert "fcconv_plan" in custom


@pytest.fixture
def late_reads(monkeypatch):
    """Lets the reads that Orbax abandons at the first damaged leaf end in the test.

    They report to an event loop that is closed by then; anything else still fails.
    """
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    yield
    time.sleep(0.1)
    assert all("Event loop is closed" in str(error) for error in seen), seen


@pytest.mark.usefixtures("late_reads")
@pytest.mark.parametrize("how", ["metadata", "cut", "flip", "gone", "manifest"])
def test_damage_is_named(case, save, tmp_path, listing, how):
    src = save(case.dense, "orbax")
    for file in [*(src / "ocdbt.process_0" / "d").iterdir(), *(src / "d").iterdir()]:
        content = bytearray(file.read_bytes())
        if how == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif how == "flip":
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
        elif how == "gone":
            file.unlink()
    if how == "metadata":
        file = src / "_METADATA"
        file.write_bytes(file.read_bytes()[:100])
    if how == "manifest":
        (src / "manifest.ocdbt").unlink()
    before = listing()
    with pytest.raises(CheckpointError, match="dense: damaged Orbax checkpoint"):
        convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert listing() == before
