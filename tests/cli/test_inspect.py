"""``fcconv inspect``."""

import json
import re
import struct

from typer.testing import CliRunner

from fcconv_jax.cli import app

from .commands import fails, run, save


def test_leaves_and_total(params):
    save("ckpt", params)
    out = run("inspect ckpt").stdout
    assert "ckpt: msgpack, 6 leaves, 1.17 KiB: 299 float32" in out
    assert re.search(r"fc1/\s+2 leaves\s+980 B", out)
    assert re.search(r"fc1/kernel\s+float32\s+\(48, 5\)\s+960 B", out)
    assert "not converted" in out


def test_some_of_the_leaves(params):
    save("ckpt", params)
    out = run("inspect ckpt --match '*/bias'").stdout
    assert "kernel" not in out
    assert re.search(r"fc1/bias\s+float32\s+\(5,\)\s+20 B", out)
    content = json.loads(run("inspect ckpt --match 'fc1/*' --json").stdout)
    assert [leaf["path"] for leaf in content["leaves"]] == [
        "fc1/bias",
        "fc1/kernel",
    ]
    fails("inspect ckpt --match 'f2/*'", r"no leaf of ckpt.*conv/bias", status=2)


def test_stored_plan(params):
    save("ckpt", params)
    run("convert ckpt conv --rule fc1=4x4:HWC")
    assert "(48, 5) -> (4, 4, 3, 5)" in run("inspect conv").stdout
    content = json.loads(run("inspect conv --json").stdout)
    assert content["bytes"] == 1196
    assert content["leaves"][0].keys() == {"path", "dtype", "shape", "bytes"}
    assert list(content["plan"]["layers"]) == ["fc1"]
    assert json.loads(run("inspect ckpt --json").stdout)["plan"] is None


def test_no_checkpoint(folder):
    fails("inspect model.py", "model.py: expected a checkpoint")
    (folder / "empty").mkdir()
    fails("inspect empty", "it is empty")


def test_names_in_files_cannot_drive_the_terminal(tmp_path):
    name = "a\x1b[31m\u202ered\n|x"
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    for command in (
        ["inspect", str(file)],
        ["convert", str(file), str(tmp_path / "x"), "--rule", "a=1"],
    ):
        done = CliRunner().invoke(app, command)
        assert all(line.isprintable() for line in done.output.split("\n"))
        assert r"\x1b[31m\u202ered\n|x" in done.output.replace("\\\\", "\\")
