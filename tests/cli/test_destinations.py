"""Options are checked, and the folders of results made, before any work."""

from pathlib import Path

import numpy as np
import pytest

from .commands import fails, run, save

NET = "model.py:Net --input 2,8,8,1"
WORK = {
    "plan": f"plan {NET} --out",
    "tune": f"tune {NET} --budget 0 --objective memory --out",
    "verify": f"verify {NET} --no-gradients --out",
}


@pytest.fixture
def never_loaded(folder):
    """A model whose import fails the test: nothing may come so far."""
    (folder / "late.py").write_text("raise SystemExit('the model was loaded')\n")
    save("ckpt", {"fc": {"kernel": np.ones((4, 3), np.float32)}})
    np.save("canvas.npy", np.ones((9, 9, 3), np.float32))
    (folder / "file").touch()
    (folder / "place").mkdir()


@pytest.mark.parametrize("command", WORK)
def test_a_missing_folder_is_made(command):
    run(f"{WORK[command]} new/deep/result.json")
    assert Path("new/deep/result.json").is_file()


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan late.py:Net --out place", "--out: .* got the folder place"),
        ("plan late.py:Net --out file/plan.json", "--out: the folder file can't be"),
        ("verify late.py:Net --out place", "--out: .* got the folder place"),
        (
            "plan late.py:Net --out late.py",
            r"--out: expected a file that ends in \.json",
        ),
        ("tune late.py:Net --out ckpt.msgpack", r"--out: .* ends in \.json, got ckpt"),
        (
            "verify late.py:Net --out late.py",
            r"--out: expected .* in \.json, \.md, got",
        ),
        ("export late.py:Net --out m.onnx --report m.onnx", r"--report: expected a"),
        (
            "slide late.py:Net canvas.npy --window 8 --out canvas.npy",
            "--out: canvas.npy is an input of this command",
        ),
        (
            "slide late.py:Net canvas.npy --window 8 --heatmap canvas.npy",
            "--heatmap: canvas.npy is an input of this command",
        ),
        (
            "slide late.py:Net canvas.npy --window 8 --out a.tif --heatmap ./a.tif",
            "--heatmap: expected another file than --out, got a.tif",
        ),
        (
            "tune late.py:Net --out a.json --timings b/../a.json",
            "--timings: expected another file than --out, got b/../a.json",
        ),
        ("verify late.py:Net --against ckpt", "by fcconv export with --against"),
        ("verify m.onnx --against ckpt --to conv", "which contains its plan"),
        ("verify m.onnx --against ckpt --input 1,2", "Pass --model MODULE:NAME"),
        (
            "export late.py:Net --out m.onnx --plan none --to dense",
            "Expected --plan alone",
        ),
        ("verify late.py:Net --backend npu", "--backend: no backend 'npu'"),
        ("tune late.py:Net --out file/plan.json", "--out: the folder file can't be"),
        ("tune late.py:Net --timings place", "--timings: .* the folder place"),
        ("tune late.py:Net --for tpu:v9", "--for: .*v9"),
        ("export late.py:Net --out file/m.tflite", "--out: the folder file can't be"),
        (
            "export late.py:Net --out m.tflite --report place",
            "--report: .* folder place",
        ),
        ("export late.py:Net --out m.tflite --plan none", "none: .*No such file"),
        (
            "export late.py:Net --out m.tflite --int8 --calibrate file",
            "--calibrate: expected a file written by np.savez, got file",
        ),
        (
            "export late.py:Net --out m.tflite --int8 --calibrate canvas.npy",
            "--calibrate: expected a file written by np.savez, got canvas.npy",
        ),
        (
            "slide late.py:Net canvas.npy --params ckpt --window 8x8 --out grid.txt",
            "--out: expected a file that ends in .npy, .zarr, .tif, .tiff, got "
            "grid.txt",
        ),
        (
            "slide late.py:Net canvas.npy --params ckpt --window 8x8 --heatmap place",
            "--heatmap: .* got the folder place",
        ),
    ],
)
def test_a_bad_destination_or_name_is_found_first(command, message):
    fails(command, message, status=2)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export late.py:Net --out m.txt", "Expected a path that ends in"),
        ("export late.py:Net --out m.onnx --runtime litert", "ends in .tflite"),
        ("export late.py:Net --out m.tflite --chip abacus", "abacus"),
    ],
)
def test_a_runtime_or_chip_that_does_not_exist_is_found_first(command, message):
    fails(command, message)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("tune late.py:Net --budget -1", "--budget"),
        ("verify late.py:Net --timeout 0", "--timeout"),
        ("export late.py:Net --out m.tflite --unroll -1", "--unroll"),
        ("slide late.py:Net canvas.npy --params c --window 8x8 --scale 0", "--scale"),
        ("slide late.py:Net canvas.npy --params c --window 8x8 --memory 0", "--memory"),
    ],
)
def test_an_impossible_number_is_wrong_usage(command, option):
    assert option in run(command, 2).stderr


HELD = """
from flax import nnx

def make():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))
"""


def test_a_mistake_in_the_call_is_one_line(folder):
    (folder / "held.py").write_text(HELD)
    message = (
        r"--kwarg: expected a keyword argument of held\.py:make, got 'trian'\. Pass"
    )
    fails("export held.py:make --input 2,4 --out m.onnx --kwarg trian=1", message, 2)
    fails("export model.py:Net --out m.onnx", "inputs, got none. Pass --input", 2)


def test_the_layouts_of_a_backend_that_does_not_exist():
    fails(f"plan {NET} --for tpu:v9", "--for: .*v9", status=2)


def test_a_folder_that_cannot_be_written_to_is_refused(folder, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: False)  # root may write
    fails(f"plan {NET} --out {folder}/p.json", "isn't writable", status=2)
