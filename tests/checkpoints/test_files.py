import dataclasses
import json
import pickle
import struct

import numpy as np
import pytest

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    detect,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
    rewrite,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import FORMATS, safetensors
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.messages.errors import CheckpointError
from fcconv_jax.plan import LayerPlan, Plan


def planned(shape, window, order) -> Plan:
    """A plan of one layer, ``fc``."""
    kernel = kernel_rearrangement(shape, window, order=order)
    fc = LayerPlan(
        *("full_window", "Dense", window, order, (("kernel", kernel),)),
        *((1, shape[0]), (1, 1)),
    )
    return Plan("conv", (("fc", fc),))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file ran code')",)


NOT_CHECKPOINTS = {
    "text": (b"hello there, this is a text file\n", "begins with"),
    "empty": (b"", "empty"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "pickle": (pickle.dumps({"params": Bomb()}), "pickle"),
    "pickle2": (pickle.dumps({"params": Bomb()}, protocol=2), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(40), r"zip.*safetensors\.torch\.save_file"),
    "m.safetensors.index.json": (b'{"weight_map": {}}', "Pass the folder"),
    "model.safetensors": (b"no header at all in here", "not a valid safetensors"),
    "number": (b"\x07", "begins with"),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(case, tmp_path, listing, name):
    content, why = NOT_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(content)
    before = listing()
    for read in (
        inspect_checkpoint,
        read_checkpoint,
        lambda path: convert_checkpoint(path, tmp_path / "conv", case.plan),
        lambda path: restore_checkpoint(path, tmp_path / "back"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{why}"):
            read(tmp_path / name)
    assert listing() == before


def test_directories_that_are_none_are_refused(case, tmp_path, listing):
    (tmp_path / "empty").mkdir()
    (tmp_path / "code" / "src").mkdir(parents=True)
    (tmp_path / "run" / "10.orbax-checkpoint-tmp-3").mkdir(parents=True)
    before = listing()
    for name, why in (
        ("empty", "it is empty"),
        ("code", r"it holds \['src'\]"),
        ("run", "unfinished"),
        ("nothing", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{why}"):
            convert_checkpoint(tmp_path / name, tmp_path / "conv", case.plan)
    assert listing() == before


@pytest.mark.parametrize("format", ["msgpack", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.999])
def test_truncated_files_are_refused(case, save, tmp_path, listing, format, part):
    src = save(case.dense, format)
    whole = src.read_bytes()
    src.write_bytes(whole[: int(len(whole) * part)])
    before = listing()
    with pytest.raises(
        CheckpointError, match=r"dense: not a valid .*truncated or damaged"
    ):
        convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert listing() == before


@pytest.mark.parametrize("format", ["msgpack", "safetensors"])
def test_flipped_header_bytes_never_pass_unseen(case, save, format):
    """A flip either raises CheckpointError, or hits entries or names, not structure."""
    src = save(case.dense, format)
    whole = src.read_bytes()
    refused = []
    for at in range(60):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        src.write_bytes(damaged)
        try:
            read_checkpoint(src)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(src) in message for message in refused)


def test_an_unknown_msgpack_extension_is_refused(case, tmp_path):
    import msgpack

    content = msgpack.packb({"params": {"x": msgpack.ExtType(9, b"abc")}})
    (tmp_path / "src").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"src: .*leaf 'params/x'.*type 9"):
        read_checkpoint(tmp_path / "src")


def test_overlapping_or_missing_tensor_data_is_refused(tmp_path):
    for offsets in ([0, 8], [4, 12], [0, 1 << 60]):
        entry = {"dtype": "F32", "shape": [3], "data_offsets": offsets}
        header = json.dumps({"a": entry}).encode()
        path = tmp_path / "m.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
        with pytest.raises(CheckpointError, match=r"m\.safetensors: not a valid"):
            inspect_checkpoint(path)


def test_packed_dtypes_are_bytes_where_their_order_is_kept(tmp_path):
    packed = {"dtype": "F4", "shape": [8, 3], "data_offsets": [0, 12]}
    path = tmp_path / "m.safetensors"
    header = json.dumps({"fc.kernel": packed}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(12)))
    reshaped = planned((8, 3), (2, 2), "HWC")
    convert_checkpoint(path, tmp_path / "conv.safetensors", reshaped)
    (leaf,) = inspect_checkpoint(tmp_path / "conv.safetensors").leaves
    assert (leaf.dtype, leaf.shape) == ("F4", (2, 2, 2, 3))
    assert (tmp_path / "conv.safetensors").read_bytes().endswith(bytes(range(12)))
    restore_checkpoint(tmp_path / "conv.safetensors", tmp_path / "back.safetensors")
    assert inspect_checkpoint(tmp_path / "back.safetensors").leaves[0].shape == (8, 3)

    with pytest.raises(CheckpointError, match=r"fc\.kernel'.*F4.*smaller than a byte"):
        convert_checkpoint(path, tmp_path / "no", planned((8, 3), (2, 2), "CHW"))
    with pytest.raises(CheckpointError, match=r"fc\.kernel'.*F4 can't be loaded"):
        read_checkpoint(path)
    with pytest.raises(
        CheckpointError, match=r"cannot change its format.*fc\.kernel' has dtype F4"
    ):
        convert_checkpoint(path, tmp_path / "no", reshaped, format="msgpack")


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_shapes_and_missing_leaves_name_file_and_leaf(
    case, save, tmp_path, listing, format
):
    sep = "." if FORMATS[format].flat else "/"
    wrong = {**case.dense, "head": {**case.dense["head"], "kernel": np.ones((25, 5))}}
    first = save(wrong, format, "wrong")
    second = save({"head": case.dense["head"]}, format, "short")
    before = listing()
    with pytest.raises(
        CheckpointError,
        match=rf"wrong: leaf '.*head{sep}kernel'.* \(24, 5\), got shape \(25, 5\)",
    ):
        convert_checkpoint(first, tmp_path / "conv", case.plan)
    with pytest.raises(CheckpointError, match=r"short: no leaf '.*block/mix/kernel'"):
        convert_checkpoint(second, tmp_path / "conv", case.plan)
    assert listing() == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_restore_compares_with_what_the_conversion_wrote(
    case, save, tmp_path, listing, format, change
):
    convert_checkpoint(save(case.dense, format), tmp_path / "conv", case.plan)
    conv = read_checkpoint(tmp_path / "conv")
    params = dict(conv.tree if FORMATS[format].flat else conv.tree["params"])
    name = "block.norm.scale" if FORMATS[format].flat else "block"
    if change == "missing":
        del params[name]
    elif change == "extra":
        params["new"] = np.ones(3, np.float32)
    elif FORMATS[format].flat:
        params[name] = np.ones(7, np.float32)
    else:
        params[name] = {**params[name], "norm": {"scale": np.ones(7, np.float32)}}
    tree = params if FORMATS[format].flat else {"params": params}
    changed = Checkpoint(format, tree, conv.record)
    write_one(tmp_path / "changed", changed)
    before = listing()
    why = {
        "missing": "', which .* had, got none",
        "extra": "new', which .* didn't have",
        "shape": r"' of shape \(6,\), as it was written, got \(7,\)",
    }[change]
    with pytest.raises(CheckpointError, match=f"changed: .* leaf '.*{why}"):
        restore_checkpoint(tmp_path / "changed", tmp_path / "back")
    assert listing() == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_of_a_newer_version_is_refused(
    case, save, tmp_path, listing, format, monkeypatch
):
    with monkeypatch.context() as newer:
        newer.setattr("fcconv_jax.plan.plan.VERSION", 9)
        convert_checkpoint(save(case.dense, format), tmp_path / "conv", case.plan)
    before = listing()
    with pytest.raises(CheckpointError, match=r"conv.*version 9.*Upgrade"):
        restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    assert listing() == before


def test_a_damaged_plan_in_a_msgpack_file_is_named(case, save, tmp_path):
    convert_checkpoint(save(case.dense, "msgpack"), tmp_path / "conv", case.plan)
    content = (tmp_path / "conv").read_bytes()
    for old, new in (
        (b'"format"', b'"tamrof"'),
        (b"fcconv_leaves", b"fcconv_LEAVES"),
        (b'"kernel": {', b'"kernel": ['),
    ):
        (tmp_path / "conv").write_bytes(content.replace(old, new))
        assert (tmp_path / "conv").read_bytes() != content
        with pytest.raises(CheckpointError, match=r"conv: .*plan"):
            restore_checkpoint(tmp_path / "conv", tmp_path / "back")


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_unless_asked(case, save, tmp_path, listing, format):
    src = save(case.dense, format)
    dst = tmp_path / "conv"
    convert_checkpoint(src, dst, case.plan)
    before = listing()
    with pytest.raises(CheckpointError, match=r"conv: exists already.*overwrite"):
        convert_checkpoint(src, dst, case.plan)
    assert listing() == before
    convert_checkpoint(src, dst, case.plan, overwrite=True)
    assert inspect_checkpoint(dst).plan == case.plan
    restore_checkpoint(dst, tmp_path / "back")
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "conv", "back"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_checkpoint_of_any_format_is_overwritten(case, save, tmp_path, format, other):
    save({"other": {"kernel": np.ones(3)}}, other, "conv")
    convert_checkpoint(
        save(case.dense, format), tmp_path / "conv", case.plan, overwrite=True
    )
    assert inspect_checkpoint(tmp_path / "conv").plan == case.plan
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "conv"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("what", ["text", "photos", "empty", "link", "code"])
def test_what_is_no_checkpoint_is_never_overwritten(
    case, save, tmp_path, listing, format, what
):
    src, dst = save(case.dense, format), tmp_path / "conv"
    if what == "text":
        dst.write_text("precious")
    elif what == "link":
        dst.symlink_to(tmp_path / "nowhere")
    else:
        dst.mkdir()
        if what == "photos":
            (dst / "thesis.txt").write_text("precious")
        elif what == "code":
            (dst / "2025").mkdir()
    before = listing()
    with pytest.raises(CheckpointError, match=r"conv: is not a checkpoint"):
        convert_checkpoint(src, dst, case.plan, overwrite=True)
    assert listing() == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("moment", ["described", "put", "write_one"])
def test_a_failure_leaves_the_old_and_no_litter(
    case, save, tmp_path, listing, monkeypatch, format, moment
):
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    before = listing()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite, moment, fail)
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        convert_checkpoint(src, tmp_path / "conv", case.plan, overwrite=True)
    assert listing() == before


def test_a_writer_that_drops_a_leaf_is_caught(case, save, tmp_path, monkeypatch):
    src = save(case.dense, "safetensors")
    write = safetensors.write

    def forgetful(path, checkpoint, advance):
        tree = dict(checkpoint.tree)
        tree.pop("head.bias")
        write(path, Checkpoint("safetensors", tree), advance)

    format = dataclasses.replace(safetensors.FORMAT, write=forgetful)
    monkeypatch.setitem(FORMATS, "safetensors", format)
    with pytest.raises(CheckpointError, match=r"leaf 'head\.bias' was written as"):
        convert_checkpoint(src, tmp_path / "conv", case.plan)
    assert not (tmp_path / "conv").exists()


@pytest.mark.parametrize("where", ["dense", "dense/inside", ".."])
def test_places_that_cannot_be_written_are_refused(
    case, save, tmp_path, listing, where
):
    src = save(case.dense, "orbax")
    before = listing()
    with pytest.raises(CheckpointError, match="Pass another destination"):
        convert_checkpoint(src, tmp_path / where, case.plan, overwrite=True)
    assert listing() == before


def test_a_missing_folder_is_made(case, save, tmp_path):
    src = save(case.dense, "msgpack")
    convert_checkpoint(src, tmp_path / "no" / "such" / "conv", case.plan)
    assert (tmp_path / "no" / "such" / "conv").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: not a folder"):
        convert_checkpoint(src, tmp_path / "file" / "conv", case.plan)


@pytest.mark.parametrize("format", FORMATS)
def test_inspect_lists_the_leaves(case, save, tmp_path, format):
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    for path, shape, plan in (
        (src, (24, 5), None),
        (tmp_path / "conv", (3, 2, 4, 5), case.plan),
    ):
        info = inspect_checkpoint(path)
        assert info.format == format
        assert info.plan == plan
        assert info.nbytes == 4 * (24 * 5 + 5 + 6 * 4 + 6 + 24 * 5)
        by_name = {leaf.path.replace("/", "."): leaf for leaf in info.leaves}
        name = "head.kernel" if FORMATS[format].flat else "params.head.kernel"
        assert by_name[name].shape == shape
        assert by_name[name].dtype == "float32"
        assert by_name[name].nbytes == 480
        assert str(shape) in str(info)


def test_safetensors_metadata_and_keys_are_kept(case, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tree = {
        "model/head/kernel": case.dense["head"]["kernel"],
        "model/head/bias": case.dense["head"]["bias"],
        "model/block/mix/kernel": case.dense["block"]["mix"]["kernel"],
        "model/a.b": np.ones((0, 3), np.int8),
    }
    save_file(tree, tmp_path / "src", metadata={"format": "flax", "z": "é"})
    convert_checkpoint(tmp_path / "src", tmp_path / "conv", case.plan)
    with safe_open(tmp_path / "conv", framework="numpy") as opened:
        metadata = opened.metadata()
        assert set(opened.keys()) == set(tree)
        assert opened.get_tensor("model/head/kernel").shape == (3, 2, 4, 5)
    assert (metadata["format"], metadata["z"]) == ("flax", "é")
    assert Plan.from_json(metadata["fcconv_plan"]) == case.plan


@pytest.mark.parametrize("name", ["conv.h5", "conv.PT", "conv.npz", "model.py"])
def test_a_name_of_another_kind_of_file_is_refused(case, save, tmp_path, name):
    src = save(case.dense, "msgpack")
    with pytest.raises(CheckpointError, match=rf"{name}: expected a name .*Pass dst"):
        convert_checkpoint(src, tmp_path / name, case.plan)
    assert not (tmp_path / name).exists()


def test_a_new_format_may_claim_any_suffix(monkeypatch):
    with pytest.raises(CheckpointError, match=r"Pass (dst\.\w+, )+or a folder"):
        detect.format_for("conv.npz", "orbax")
    added = dataclasses.replace(safetensors.FORMAT, name="npz", suffix=".npz")
    monkeypatch.setitem(detect.FILES, ".npz", added)
    assert detect.format_for("conv.npz", "orbax") == "npz"


@pytest.mark.parametrize("suffix", [".safetensor", ".MSGPACK", ".mgspack"])
def test_a_suffix_that_is_nearly_one_of_a_format_is_refused(
    case, save, suffix, tmp_path
):
    dst = tmp_path / f"conv{suffix}"
    with pytest.raises(CheckpointError, match=f"got one that ends in {suffix}"):
        convert_checkpoint(save(case.dense, "msgpack"), dst, case.plan)
    assert not dst.exists()
    convert_checkpoint(save(case.dense, "msgpack"), tmp_path / "step.1000", case.plan)
