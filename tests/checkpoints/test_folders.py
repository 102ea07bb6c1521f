import json

import flax
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from fcconv_jax.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.messages.errors import CheckpointError


@pytest.fixture
def hub(case, tmp_path):
    """Saves params as a model of the hub, in one file or in several."""

    def hub(format: str, several: bool):
        folder = tmp_path / "hub"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
        keys = flax.traverse_util.flatten_dict(dict(case.dense), sep="/")
        name, suffix = {
            "safetensors": ("model", "safetensors"),
            "msgpack": ("flax_model", "msgpack"),
        }[format]
        if not several:
            path = folder / f"{name}.{suffix}"
            if format == "msgpack":
                path.write_bytes(serialization.to_bytes(case.dense))
            else:
                save_file({k.replace("/", "."): v for k, v in keys.items()}, path)
            return folder
        index = {}
        for number in (1, 2):
            path = folder / f"{name}-0000{number}-of-00002.{suffix}"
            part = dict(list(keys.items())[number - 1 :: 2])
            if format == "msgpack":
                path.write_bytes(serialization.to_bytes(part))
            else:
                part = {key.replace("/", "."): leaf for key, leaf in part.items()}
                save_file(part, path)
            index |= dict.fromkeys(part, path.name)
        (folder / f"{name}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        )
        return folder

    return hub


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("format", ["safetensors", "msgpack"])
def test_a_model_of_the_hub_converts_with_what_lies_beside_it(
    case, hub, assert_same_bits, tmp_path, format, several
):
    src = hub(format, several)
    before = {p: p.read_bytes() for p in src.rglob("*") if p.is_file()}
    report = convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert report.leaves == 5
    assert {name.replace("/", ".") for name, *_ in report.converted} == {
        "head.kernel",
        "block.mix.kernel",
    }
    conv = tmp_path / "conv"
    assert {p.name for p in conv.iterdir()} == {p.name for p in src.iterdir()}
    for name in ("config.json", "tokenizer/vocab.txt"):
        assert (conv / name).read_bytes() == (src / name).read_bytes()
    tree = read_checkpoint(conv).tree
    got = {key.replace("/", "."): v for key, v in _flat(tree).items()}
    assert_same_bits(got["head.kernel"], case.conv_head(case.dense["head"]["kernel"]))
    assert inspect_checkpoint(conv).plan == case.plan
    assert verify_checkpoint(src, conv).passed
    restore_checkpoint(conv, tmp_path / "back")
    for path, content in before.items():
        assert path.read_bytes() == content
        back = tmp_path / "back" / path.relative_to(src)
        if back.suffix != ".safetensors":  # whose header may be padded otherwise
            assert back.read_bytes() == content
    assert verify_checkpoint(src, tmp_path / "back").passed


def _flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_links_as_in_the_cache_of_the_hub(case, hub, tmp_path):
    folder = tmp_path / "models--x--y" / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    hub("safetensors", False).rename(folder)
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in folder.iterdir() if p.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    convert_checkpoint(folder, tmp_path / "conv", case.plan)
    assert not any(p.is_symlink() for p in (tmp_path / "conv").iterdir())
    assert json.loads((tmp_path / "conv" / "config.json").read_text())
    assert verify_checkpoint(folder, tmp_path / "conv").passed
    alone = next(p for p in folder.iterdir() if p.suffix == ".safetensors")
    convert_checkpoint(alone, tmp_path / "one.safetensors", case.plan)
    assert inspect_checkpoint(tmp_path / "one.safetensors").plan == case.plan
    # What is replaced is the link, never what it leads to.
    one = tmp_path / "one.safetensors"
    kept = one.read_bytes()
    target = tmp_path / "target.safetensors"
    target.symlink_to(one)
    convert_checkpoint(alone, target, case.plan, overwrite=True)
    assert not target.is_symlink()
    assert one.read_bytes() == kept


def test_what_is_wrong_with_a_folder_is_named(case, hub, tmp_path, listing):
    folder = hub("safetensors", True)
    first = sorted(folder.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(CheckpointError, match=r"index.json: lists \['model-00001"):
        convert_checkpoint(folder, tmp_path / "conv", case.plan)
    first.write_bytes(content)
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(case.dense))
    with pytest.raises(CheckpointError, match="hub: expected weights in one"):
        convert_checkpoint(folder, tmp_path / "conv", case.plan)
    (folder / "flax_model.msgpack").unlink()
    convert_checkpoint(folder, tmp_path / "conv", case.plan)
    (tmp_path / "conv" / first.name).write_bytes(content)
    before = listing()
    with pytest.raises(
        CheckpointError, match="conv: its files were converted by different"
    ):
        restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    index = next(folder.glob("*.index.json"))
    index.write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        inspect_checkpoint(folder)
    index.unlink()
    assert {p: b for p, b in before.items() if "index" not in p} == {
        p: b for p, b in listing().items() if "index" not in p
    }


def test_a_folder_becomes_one_file_of_another_format(case, hub, tmp_path):
    folder = hub("safetensors", True)
    convert_checkpoint(folder, tmp_path / "conv.msgpack", case.plan)
    assert verify_checkpoint(folder, tmp_path / "conv.msgpack").passed
    restore_checkpoint(tmp_path / "conv.msgpack", tmp_path / "back.msgpack")
    tree = read_checkpoint(tmp_path / "back.msgpack").tree
    np.testing.assert_array_equal(tree["head"]["kernel"], case.dense["head"]["kernel"])


@pytest.fixture
def run(case, tmp_path):
    """A folder as flax.training.checkpoints left it before Orbax."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 9, 10):
        dense = {**case.dense, "step": step}
        (folder / f"checkpoint_{step}").write_bytes(
            serialization.to_bytes({"params": dense})
        )
    (folder / "events.log").write_text("log")
    return folder


def test_old_steps_of_flax_convert_one_by_one_and_all(case, run, tmp_path):
    assert inspect_checkpoint(run).leaves[-1].dtype == "int"
    report = convert_checkpoint(run, tmp_path / "latest", case.plan)
    assert report.steps == ("checkpoint_10",)
    assert {p.name for p in (tmp_path / "latest").iterdir()} == {
        "checkpoint_10",
        "events.log",
    }
    convert_checkpoint(run, tmp_path / "nine", case.plan, step=9)
    assert read_checkpoint(tmp_path / "nine").tree["params"]["step"] == 9
    report = convert_checkpoint(run, tmp_path / "all", case.plan, all_steps=True)
    assert len(report.converted) == 6
    assert {p.name for p in (tmp_path / "all").iterdir()} == {
        p.name for p in run.iterdir()
    }
    for step in (2, 9, 10):
        assert verify_checkpoint(run, tmp_path / "all", step=step).passed
    restore_checkpoint(tmp_path / "all", tmp_path / "back", all_steps=True)
    for path in run.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run: no step '7'; it has the steps"):
        convert_checkpoint(run, tmp_path / "no", case.plan, step=7)
    with pytest.raises(CheckpointError, match="Pass one"):
        convert_checkpoint(run, tmp_path / "no", case.plan, step=2, all_steps=True)
