import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    read_checkpoint,
    restore_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import msgpack, msgpack_frame
from fcconv_jax.messages.errors import CheckpointError

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=300),
    st.binary(max_size=300),
    st.sampled_from(
        [
            np.float32(1.5),
            np.int8(-3),
            np.array(7.0),
            np.zeros((0, 3), np.int16),
            np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
            np.arange(5).astype(ml_dtypes.bfloat16),
            np.ones(300, np.complex64),
            np.array([True, False]),
        ]
    ),
)
trees = st.recursive(
    leaves,
    lambda nodes: (
        st.lists(nodes, max_size=20) | st.dictionaries(st.text(max_size=40), nodes)
    ),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(tree=st.dictionaries(st.text(), trees, max_size=20))
@example(tree={"": [1.4279765364047872e16]})  # its ninth byte is a brace
def test_flax_and_this_read_and_write_the_same_bytes(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("m") / "tree.msgpack"
    content = serialization.msgpack_serialize(tree)
    path.write_bytes(content)
    opened = read_checkpoint(path) if tree else None
    if opened is not None:
        again = path.with_name("again")
        write_one(again, Checkpoint("msgpack", opened.tree))
        assert again.read_bytes() == content


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays of more than 64 bytes are stored in chunks, as those above 1 GiB are."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    monkeypatch.setattr(msgpack, "_CHUNK", 64)


@pytest.mark.usefixtures("small_chunks")
def test_arrays_in_chunks_are_moved_as_one(case, save, assert_same_bits, tmp_path):
    src = save(case.dense, "msgpack")
    assert src.read_bytes().count(b"__msgpack_chunked_array__") == 3
    names = {leaf.path for leaf in inspect_checkpoint(src).leaves}
    assert "params/head/kernel" in names
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    got = serialization.msgpack_restore((tmp_path / "conv").read_bytes())["params"]
    kernel = case.dense["head"]["kernel"]
    assert_same_bits(got["head"]["kernel"], case.conv_head(kernel))
    assert_same_bits(
        got["block"]["head"]["kernel"], case.dense["block"]["head"]["kernel"]
    )
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == src.read_bytes()


def test_the_way_back_gives_the_same_file(case, save, tmp_path):
    src = save(case.dense, "msgpack")
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    restore_checkpoint(tmp_path / "conv", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == src.read_bytes()


def test_flax_does_not_see_the_plan(case, save, tmp_path):
    convert_checkpoint(save(case.dense, "msgpack"), tmp_path / "conv", case.plan)
    content = (tmp_path / "conv").read_bytes()
    assert b"fcconv_plan" in content
    got = serialization.msgpack_restore(content)["params"]
    assert set(got) == set(case.dense)
    assert set(got["head"]) == {"kernel", "bias"}
    np.testing.assert_array_equal(got["head"]["bias"], case.dense["head"]["bias"])
    target = {"params": {"head": {"bias": np.zeros(5, np.float32)}}}
    read = serialization.from_bytes(target, content)
    np.testing.assert_array_equal(
        read["params"]["head"]["bias"], case.dense["head"]["bias"]
    )


def test_a_file_without_an_array_for_the_plan_is_refused(case, save, tmp_path):
    tree = [{"head": case.dense["head"]}, {"block": case.dense["block"]}]
    record = read_checkpoint(save(case.dense, "msgpack")).record
    assert record is None
    convert_checkpoint(save(case.dense, "msgpack"), tmp_path / "conv", case.plan)
    record = read_checkpoint(tmp_path / "conv").record
    with pytest.raises(CheckpointError, match="to store the plan with"):
        write_one(tmp_path / "no", Checkpoint("msgpack", {"l": tree}, record))
    assert not (tmp_path / "no").exists()


ARRAY = serialization.msgpack_serialize({"a": np.arange(6.0).reshape(2, 3)})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (ARRAY[:-1], "ends at"),
        (ARRAY + b"\xc0", "1 bytes too many"),
        (ARRAY.replace(b"\x93\x92\x02\x03", b"\x93\x92\x02\x04"), "does not fill"),
        (ARRAY.replace(b"float64", b"object_"), "has the dtype 'object_'"),
        (ARRAY.replace(b"float64", b"nothing"), "has the dtype 'nothing'"),
        (b"\x82\xa1a\x01\xa1a\x02", "the key 'a' occurs twice"),
        (b"\x82\xa11\x01\x01\x02", "the key 1 occurs twice"),
        (b"\x81\xa1a" + b"\x91" * 5000 + b"\x01", "more than 100 levels"),
        (b"\xdf\xff\xff\xff\xff\xa1a\x01", "4294967295 nodes are declared"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "4294967295 nodes are declared"),
        (b"\x81\xa1a\xdb\xff\xff\xff\xffabc", "4294967295 bytes are declared"),
        (b"\x81\xa1a\xc1", "no msgpack has the byte 0xc1"),
        (b"\x81\xa1a\xa1\xff", "decode"),
        (b"\x81\x91\x01\x01", "a list for a key"),
    ],
)
def test_damage_is_named(tmp_path, content, why):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"m: not a valid Flax msgpack file: .*{why}"
    ):
        read_checkpoint(tmp_path / "m")


def test_headers_are_read_without_the_entries(tmp_path, monkeypatch):
    tree = {"a": np.zeros(1 << 22, np.uint8), "b": {"c": np.ones(3)}}
    (tmp_path / "m").write_bytes(serialization.msgpack_serialize(tree))
    read: list[int] = []
    take = msgpack_frame.Extent.read
    monkeypatch.setattr(
        msgpack_frame.Extent,
        "read",
        lambda self, start, stop: (read.append(stop - start), take(self, start, stop))[
            1
        ],
    )
    assert [leaf.path for leaf in inspect_checkpoint(tmp_path / "m").leaves] == [
        "a",
        "b/c",
    ]
    assert sum(read) < 1 << 18
