import functools
import json

import numpy as np
import pytest

from fcconv_jax.checkpoints import (
    Checkpoint,
    convert_checkpoint,
    entries,
    read_checkpoint,
    restore_checkpoint,
    verify_checkpoint,
)
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import FORMATS
from fcconv_jax.messages.errors import CheckpointError


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_conversion_is_verified_without_the_model(
    case, save, tmp_path, format, other
):
    src, conv = save(case.dense, format), tmp_path / "conv"
    convert_checkpoint(src, conv, case.plan, format=other)
    for one, two in ((src, conv), (conv, src), (src, src), (conv, conv)):
        report = verify_checkpoint(one, two)
        assert report.passed, str(report)
        assert report.leaves == 5
        assert (report.plan is None) == (one == two)
    assert json.loads(report.to_json())["passed"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head.kernel", lambda k: k[:, ::-1]),  # a flipped window
        ("head.kernel", lambda k: np.swapaxes(k, 0, 1).reshape(k.shape)),
        (
            "head.kernel",
            lambda k: np.nextafter(k, np.inf, where=k == k.max(), out=k + 0),
        ),
        ("head.bias", lambda b: b[::-1]),
        ("block.norm.scale", lambda s: s + np.float32(1e-7)),
        ("block.mix.kernel", lambda k: k.astype(np.float64)),
        ("block.mix.kernel", lambda k: k.reshape(1, 6, 4)),
    ],
)
def test_every_planted_defect_is_named(case, save, tmp_path, format, name, change):
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    conv = read_checkpoint(tmp_path / "conv")
    flat = FORMATS[format].flat
    node = conv.tree if flat else conv.tree["params"]
    *levels, last = (name,) if flat else name.split(".")
    for level in levels:
        node = node[level]
    node[last] = np.ascontiguousarray(change(node[last]))
    write_one(tmp_path / "wrong", conv)
    report = verify_checkpoint(src, tmp_path / "wrong")
    assert not report.passed
    (difference,) = report.differences
    assert difference.path.replace("/", ".").endswith(name)
    assert difference.path in str(report)
    assert difference.path in report.to_markdown()


def test_leaves_that_are_missing_or_new_are_named(case, save, tmp_path):
    src = save(case.dense, "msgpack")
    tree = {"params": {**case.dense, "new": np.ones(3)}, "step": 4}
    write_one(tmp_path / "other", Checkpoint("msgpack", tree))
    report = verify_checkpoint(src, tmp_path / "other")
    assert [(d.path, d.what) for d in sorted(report.differences, key=str)] == [
        ("params/new", "is not expected"),
        ("step", "is not expected"),
    ]
    report = verify_checkpoint(tmp_path / "other", src)
    assert {d.what for d in report.differences} == {"is missing"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("back", [False, True])
def test_a_move_that_goes_wrong_is_caught_before_anything_is_kept(
    case, save, tmp_path, monkeypatch, format, back
):
    src = save(case.dense, format)
    convert_checkpoint(src, tmp_path / "conv", case.plan)
    scatter, done = entries._scatter, []

    def wrong(out, shape, start, box):
        done.append(start)
        scatter(out, shape, start, box[..., ::-1])

    monkeypatch.setattr(entries, "_scatter", wrong)
    if format == "orbax":
        moved = entries.LazyLeaf.array
        monkeypatch.setattr(entries.LazyLeaf, "array", lambda s: moved(s)[..., ::-1])
    once_more = (
        functools.partial(restore_checkpoint, tmp_path / "conv")
        if back
        else functools.partial(convert_checkpoint, src, plan=case.plan)
    )
    with pytest.raises(CheckpointError, match=r"'.*head.kernel' reads back as"):
        once_more(tmp_path / "again")
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "conv"}
    assert done or format == "orbax"
    # Not looked for, it is not found.
    once_more(tmp_path / "again", check=False)


@pytest.mark.parametrize("format", FORMATS)
def test_a_dry_run_writes_nothing(case, save, tmp_path, listing, format):
    src = save(case.dense, format)
    before = listing()
    report = convert_checkpoint(src, tmp_path / "conv", case.plan, dry_run=True)
    assert listing() == before
    assert report.dry
    assert report.free
    assert len(report.converted) == 2
    assert "would be converted" in str(report)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(src, _touched(tmp_path / "taken"), case.plan, dry_run=True)


def _touched(path):
    path.touch()
    return path
