import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from fcconv_jax.checkpoints import (
    convert_checkpoint,
    entries,
    inspect_checkpoint,
    open_checkpoint,
    read_checkpoint,
    restore_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.checkpoints.checkpoint import OrbaxItems
from fcconv_jax.checkpoints.formats import orbax
from fcconv_jax.messages.errors import CheckpointError


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
    opened = open_checkpoint(tmp_path / "dense")
    assert opened.contents == OrbaxItems("10", ("state",))
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
def run(case, tmp_path):
    """A manager's directory of two steps, with an item that is not a tree."""
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            tree = {"params": dict(case.dense), "step": np.int64(step)}
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave({"at": step})
            )
            manager.save(step, args=args)
    return tmp_path / "run"


def test_one_step_and_all_steps_of_a_manager(case, run, tmp_path):
    report = convert_checkpoint(run, tmp_path / "latest", case.plan)
    assert report.steps == ("10",)
    assert "of step 10" in str(report)
    for step in (9, "9"):
        convert_checkpoint(run, tmp_path / f"nine{step!r}", case.plan, step=step)
        assert read_checkpoint(tmp_path / f"nine{step!r}").tree["step"] == 9
    report = convert_checkpoint(run, tmp_path / "all", case.plan, all_steps=True)
    assert report.steps == ("9", "10")
    assert {name for name, *_ in report.converted} >= {"9/params/head/kernel"}
    with ocp.CheckpointManager(tmp_path / "all") as manager:
        assert sorted(manager.all_steps()) == [9, 10]
        for step in (9, 10):
            assert manager.restore(
                step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
            )["extra"] == {"at": step}
            assert verify_checkpoint(run, tmp_path / "all", step=step).passed
    restore_checkpoint(tmp_path / "all", tmp_path / "back", all_steps=True)
    for step in (9, 10):
        assert verify_checkpoint(run, tmp_path / "back", step=step).passed
    with pytest.raises(CheckpointError, match=r"run: no step '8'; it has the steps"):
        convert_checkpoint(run, tmp_path / "no", case.plan, step=8)
    with pytest.raises(CheckpointError, match="expected a directory of steps"):
        convert_checkpoint(run / "10", tmp_path / "no", case.plan, all_steps=True)


def test_training_may_go_on_in_the_directory(case, run, tmp_path):
    """A step that is added changes nothing in the one that is read."""

    def save_another(*_):
        if not (run / "11").exists():
            with ocp.CheckpointManager(run) as manager:
                tree = {"params": dict(case.dense), "step": np.int64(11)}
                args = ocp.args.Composite(state=ocp.args.StandardSave(tree))
                manager.save(11, args=args)

    convert_checkpoint(run, tmp_path / "conv", case.plan, progress=save_another)
    assert verify_checkpoint(run, tmp_path / "conv", step=10).passed


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_arrays_in_many_chunks_keep_their_way_of_storage(
    case, tmp_path, monkeypatch, zarr3, ocdbt
):
    """Every array is large here: read chunk by chunk, and written from a file."""
    monkeypatch.setattr(entries, "PIECE", 64)
    for module in (entries, orbax):
        monkeypatch.setattr(module, "LARGE", 100)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    tree = {"params": dict(case.dense), "mu": jax.tree.map(lambda x: -x, case.dense)}
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=48), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(tree, save_args)
        checkpointer.save(tmp_path / "dense", args=args)
    convert_checkpoint(tmp_path / "dense", tmp_path / "conv", case.plan)
    conv = tmp_path / "conv"
    assert (conv / "manifest.ocdbt").exists() == ocdbt
    assert json.loads((conv / "_METADATA").read_text())["use_zarr3"] == zarr3
    got = read_checkpoint(conv).tree
    for part, sign in (("params", 1), ("mu", -1)):
        want = case.conv_head(sign * case.dense["head"]["kernel"])
        np.testing.assert_array_equal(got[part]["head"]["kernel"], want)
    with ocp.PyTreeCheckpointer() as checkpointer:
        np.testing.assert_array_equal(
            checkpointer.restore(conv)["mu"]["block"]["norm"]["scale"],
            -case.dense["block"]["norm"]["scale"],
        )
    restore_checkpoint(conv, tmp_path / "back")
    assert verify_checkpoint(tmp_path / "dense", tmp_path / "back").passed


def test_a_directory_cannot_claim_more_than_its_files_hold(case, tmp_path):
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "dense", dict(case.dense))
    file = tmp_path / "dense" / "head.kernel" / ".zarray"
    content = json.loads(file.read_text())
    for chunks in ([2**21, 2**20], [1, 2**20]):
        file.write_text(
            json.dumps({**content, "shape": [2**21, 2**20], "chunks": chunks})
        )
        for look in (read_checkpoint, inspect_checkpoint):
            with pytest.raises(CheckpointError, match=r"'head/kernel' claims to have"):
                look(tmp_path / "dense")


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


def test_damaged_numbers_are_one_error_and_nothing_is_printed(tmp_path, capfd):
    """Orbax's own reads go on behind an error, and find their event loop closed."""
    tree = {f"f{i}": i + 0.5 for i in range(20)} | {"a": np.ones((3, 4))}
    tree |= {"i": 3, "b": True, "n": np.float32(0.1), "h": np.uint8(7), "s": "text"}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "src", tree)
    found = read_checkpoint(tmp_path / "src").tree
    assert {n: type(v) for n, v in found.items()} == {
        n: type(v) for n, v in tree.items()
    }
    assert {n: v for n, v in found.items() if n != "a"} == {
        n: v for n, v in tree.items() if n != "a"
    }
    chunk = tmp_path / "src" / "f7" / "0"
    chunk.write_bytes(b"x")
    capfd.readouterr()
    for _ in range(3):
        with pytest.raises(CheckpointError, match="'f7' can't be read"):
            read_checkpoint(tmp_path / "src")
    assert capfd.readouterr().err == ""
