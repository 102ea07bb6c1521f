"""Damaged and malicious files: only the package's own errors come out, and soon."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import flax.serialization
import numpy as np
import pytest
import safetensors
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st

from fcconv_jax.checkpoints import read_checkpoint
from fcconv_jax.messages.errors import CheckpointError

sys.path.append(str(Path(__file__).parent))
import fuzz

CORPUS = sorted(fuzz.CORPUS.iterdir())


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_what_once_did_harm(file, tmp_path):
    place = tmp_path / "case"
    place.write_bytes(file.read_bytes())
    with fuzz.limits():
        fuzz.look(place, "plan" if file.suffix == ".json" else "converted", True)
        fuzz.look(place, "plan" if file.suffix == ".json" else "dense", True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_thousand_fresh_cases():
    counts, taken = fuzz.run(2000, seed=1)
    assert sum(counts.values()) >= 2000
    # Neither is everything refused nor everything taken.
    for kind in ("safetensors", "msgpack", "plan"):
        assert 0 < taken[kind] < counts[kind] / 2


def test_the_record_is_of_a_million_cases():
    record = json.loads(fuzz.RECORD.read_text())
    assert record["cases"] >= 1_000_000
    assert record["did harm"] == 0


def test_harm_is_seen(tmp_path, monkeypatch):
    """A reader that lets another error out, or takes too long, or all memory."""

    def leak(*_):
        raise RecursionError

    def bloat(*_):
        np.ones(1 << 28)

    def hang(*_):
        while True:
            pass

    monkeypatch.setattr(fuzz, "LONGEST", 1)
    fuzz.KINDS["safetensors"].make(tmp_path / "whole")
    for harm, name in ((leak, "Recursion"), (bloat, "Memory"), (hang, "Timeout")):
        monkeypatch.setattr(fuzz, "inspect_checkpoint", harm)
        arguments = tmp_path / "whole", "safetensors", random.Random(0), tmp_path
        with fuzz.limits(), pytest.raises(fuzz.HarmError, match=name):
            fuzz.one_case(*arguments)


def _theirs(read, path):
    """The tree that a library reads, or None where it refuses."""
    try:
        return read(path)
    except Exception:
        return None


def _read_safetensors(path):
    with safetensors.safe_open(path, "numpy") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def _read_msgpack(path):
    return flax.serialization.msgpack_restore(path.read_bytes())


# Earlier versions of Flax refuse names that damage has turned into numbers.
@pytest.mark.parametrize(
    "kind", ["safetensors", pytest.param("msgpack", marks=needs("flax", "0.12.8"))]
)
@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_formats_own_libraries_refuse_and_read_the_same(
    tmp_path_factory, kind, seed
):
    path = tmp_path_factory.getbasetemp() / f"theirs {kind}"
    path.unlink(missing_ok=True)
    fuzz.KINDS[kind].make(path)
    path.write_bytes(fuzz.damage(path.read_bytes(), random.Random(seed), True))
    want = _theirs(_read_safetensors if kind == "safetensors" else _read_msgpack, path)
    try:
        got = read_checkpoint(path).tree
    except CheckpointError:
        # It may be stricter: about repeated keys, and trees that are none.
        return
    assert want is not None, "what the library refuses was taken"
    np.testing.assert_equal(got, want)


def test_without_fcntl_all_imports_and_files_are_refused(tmp_path):
    """As on Windows: planning and converting params work there."""
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    code = (
        "import asyncio  # which calls os.sysconf, but not on Windows\n"
        "import os, sys; sys.modules['fcntl'] = None; del os.preadv, os.sysconf\n"
        "import jax, flax.linen as nn, numpy as np, fcconv_jax as fc\n"
        "import fcconv_jax.checkpoints, fcconv_jax.cli.app\n"
        "m, x = nn.Dense(3), np.ones((2, 4), np.float32)\n"
        "p = m.init(jax.random.key(0), x)['params']\n"
        "print(fc.convert_params(p, fc.make_plan(m, x))['kernel'].shape)\n"
        f"fcconv_jax.checkpoints.inspect_checkpoint({str(tmp_path)!r} + "
        "'/w.safetensors')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 4, 3)"
    assert "expected Linux or macOS" in done.stderr.splitlines()[-1]
