"""The record of a file: all that was written is read, and the bits of folded norms."""

import json

import numpy as np
import pytest

from fcconv_jax import ExportError, Plan
from fcconv_jax.export.fingerprint import BLANK
from fcconv_jax.export.graph import Folded
from fcconv_jax.export.layers import Layer
from fcconv_jax.export.record import FileRecord

RNG = np.random.default_rng(0)


def record(columns):
    rows = np.stack([np.full(3, 2.0), np.zeros(3)])
    folded = Folded(rows, columns, frozenset({"scale", "mean"}))
    shapes = (2, 3), (2, 5)
    layer = Layer("fc", "dense", None, (3, 5), None, True, *shapes, (), (), folded)
    return FileRecord((layer,), Plan("conv"), "conv", fingerprint=BLANK)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_what_is_written_is_read(dtype):
    columns = RNG.normal(size=(2, 5)).astype(dtype).astype("f8")
    made = record(columns)
    for found in (
        FileRecord.from_bytes(made.to_bytes()),
        FileRecord.from_text(made.to_text()),
    ):
        (layer,), folded = found.layers, found.layers[0].folded
        assert found.fingerprint == BLANK
        assert found.to_json() == made.to_json()
        assert layer.kernel_shape == (3, 5)
        np.testing.assert_array_equal(folded.columns, columns)
        np.testing.assert_array_equal(folded.rows, made.layers[0].folded.rows)
        assert folded.leaves == {"scale", "mean"}


def test_float32_takes_half_the_space():
    narrow, wide = (
        len(record(RNG.normal(size=(2, 5)).astype(d).astype("f8")).to_bytes())
        for d in ("f4", "f8")
    )
    assert narrow < wide


@pytest.mark.parametrize("damaged", ["", "sha256:0 ", "sha256:0 abc", "sha256:0 é"])
def test_damaged_records(damaged):
    with pytest.raises(ExportError, match="manifest is damaged"):
        FileRecord.from_text(damaged)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_version_is_named(version):
    content = json.loads(record(np.zeros((2, 5))).to_json())
    text = json.dumps({**content, "version": version})
    with pytest.raises(ExportError, match=rf"version 1, got {version!r}\. Use the"):
        FileRecord.from_json(text)


def test_the_bits_decide_whether_float32_is_enough():
    """A bias of the layer's own makes the shift one of two terms that are added."""
    kernel = RNG.normal(size=(3, 5)).astype("f4")
    columns = np.stack([RNG.normal(size=5).astype("f4"), RNG.normal(size=5)])
    rows = np.stack([np.ones(3), np.zeros(3)])
    folded = Folded(rows, columns)
    short = folded.narrowed(kernel, None)
    assert (short.columns == short.columns.astype("f4")).all()
    bias = (RNG.normal(size=5) * 1e-3).astype("f4")
    for own in (None, bias):
        for got, want in zip(
            folded.narrowed(kernel, own).apply(kernel, own), folded.apply(kernel, own)
        ):
            np.testing.assert_array_equal(got, want)
