"""Exported files against those of keras -> TFLite and of jax2onnx with onnxsim.

    pip install '.[litert,onnx,vela]'
    python -m venv peers && peers/bin/pip install -r benchmarks/peers.txt
    PEERS_PYTHON=peers/bin/python python benchmarks operators peers

The peers write their files of the same network and weights in a process of that
environment; all files run in turns here, in the same runtime.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer_networks import DESCRIPTIONS, NETWORKS, examples, flax_network
from running import Case, MissingError, bound, largest_error, race

import fcconv_jax as fc
from fcconv_jax.export import vela
from fcconv_jax.export.chips import CHIPS
from fcconv_jax.export.int8 import check
from fcconv_jax.export.runtimes import runtime_of
from fcconv_jax.export.size import size_of

_SECONDS = 3.0  # of a race
_SCRIPT = Path(__file__).with_name("peer_files.py")
_CHIP = "ethos-u55"


def peer_files(network: str, folder: Path) -> None:
    """Lets the peers write their files.

    Raises:
      MissingError: they are not installed.
    """
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import jax2onnx, onnxsim, tensorflow"])
    if found.returncode:
        raise MissingError(
            "needs PEERS_PYTHON=..., an interpreter with benchmarks/peers.txt"
        )
    command = [python, str(_SCRIPT), network, str(folder)]
    quiet = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=quiet)


def written(network: str, folder: Path, suffix: str, peer: str) -> dict[str, Path]:
    """The files of a network in both forms, and that of a peer, which is there."""
    model, variables, x = flax_network(network)
    paths = {peer: folder / f"{peer}{suffix}"}
    for form in ("conv", "dense"):
        paths[form] = folder / f"{form}{suffix}"
        options = {"path": paths[form], "to": form, "progress": False}
        report = fc.export(model, variables, x, **options)
        assert report.passed, report.failures
    return paths


def opened(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The files, read for their runtimes."""
    return {form: runtime_of(path).open(path) for form, path in paths.items()}


def operators(
    files: Mapping[str, Any], peer: str, about: str = ""
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """The operators of files by form, and bounds: no more than a peer's file has.

    Keras may have one less: it knows no other layout than LiteRT's.
    """
    found = {form: dict(file.ops()) for form, file in files.items()}
    counts = {form: sum(each.values()) for form, each in found.items()}
    transposes = {form: file.moves()[0] for form, file in files.items()}
    more = int(peer == "keras")
    limits = []
    for form in ("conv", "dense"):
        for what, each in (("operators", counts), ("transposes", transposes)):
            limits.append(
                bound(f"{about}{form}: {what}", each[form], each[peer] + more, what)
            )
    return found, limits


def count(network: str) -> dict[str, Any]:
    """Counts the operators of files in both forms, and of each peer's file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer_files(network, folder)
        peers = {".onnx": "jax2onnx"}
        if network in DESCRIPTIONS:
            peers[".tflite"] = "keras"
        found: dict[str, Any] = {"operators": {}, "bounds": []}
        for suffix, peer in peers.items():
            title = runtime_of(Path(f"m{suffix}")).title
            files = opened(written(network, folder, suffix, peer))
            counts, limits = operators(files, peer, f"{title}, ")
            found["operators"][title] = counts
            found["bounds"] += limits
        return found


def compare(network: str, suffix: str, peer: str) -> dict[str, Any]:
    """Exports a network in both forms, and compares the files with a peer's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer_files(network, folder)
        paths = written(network, folder, suffix, peer)
        _, variables, x = flax_network(network)
        files = opened(paths)
        image = [np.asarray(x)]
        outs = {form: file.run(image)[0] for form, file in files.items()}
        runs = {form: file.runner(image) for form, file in files.items()}
        found = race(runs, _SECONDS, opponents=[peer])
        ms = found["milliseconds"]
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        counts, limits = operators(files, peer)
        for form in ("conv", "dense"):
            limits += [
                bound(f"{form}: time / {peer}", ms[form] / ms[peer], 1.05),
                bound(f"{form}: bytes / weights", size_of(paths[form]) / weights, 1.03),
            ]
        errors = {name: largest_error(outs[name], outs[peer]) for name in outs}
        return {**found, "errors": errors, "operators": counts, "bounds": limits}


def compare_int8(network: str) -> dict[str, Any]:
    """Compares the error of int8 files with that of Keras's, on other images.

    All are calibrated on the same images; the float file is that of this package.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer_files(network, folder)
        model, variables, x = flax_network(network)
        names = {"keras": "keras-int8.tflite", "litert": "m.tflite", "onnx": "m.onnx"}
        for suffix, calibrate in ((".tflite", 1), (".onnx", 1), ("-float.tflite", 0)):
            report = fc.export(
                *(model, variables, x),
                path=folder / f"m{suffix}",
                calibrate=[examples(network, 16, seed=1)] if calibrate else None,
                progress=False,
            )
            assert report.passed, report.failures
        files = {
            key: runtime_of(folder / n).open(folder / n) for key, n in names.items()
        }
        original = runtime_of(folder / "m.tflite").open(folder / "m-float.tflite")
        calls = [[image[None]] for image in examples(network, 64, seed=2)]
        off = {
            key: check(file, original, calls, None, lambda *_: None)
            .differences[0]
            .share
            for key, file in files.items()
        }
        # ONNX Runtime's quantizer has no peer here: its error is shown alone.
        limits = [bound("error / keras", off["litert"] / off["keras"], 1.05)]
        return {"errors": off, "bounds": limits}


def compare_cycles(network: str) -> dict[str, Any]:
    """Compares the cycles of an Ethos-U with those of Keras's int8 file."""
    if not vela.available():
        raise MissingError("needs: pip install '.[litert,vela]'")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer_files(network, folder)
        model, variables, x = flax_network(network)
        calibrate = [examples(network, 16, seed=1)]
        report = fc.export(
            *(model, variables, x),
            path=folder / "m.tflite",
            to="mix",
            chip=_CHIP,
            calibrate=calibrate,
            progress=False,
        )
        assert report.passed, report.failures
        accelerator = CHIPS[_CHIP].accelerator
        assert accelerator is not None
        compiled = {
            name: vela.compile_file(
                (folder / f"{file}.tflite").read_bytes(), accelerator
            )
            for name, file in (("keras", "keras-int8"), ("here", "m"))
        }
        here, keras = compiled["here"], compiled["keras"]
        return {
            "cycles": {name: each.cycles for name, each in compiled.items()},
            "bounds": [
                bound("cycles / keras", here.cycles / keras.cycles, 1.05),
                bound("on the CPU", here.cpu, keras.cpu, "operators"),
            ],
        }


# Nothing is timed: these need no idle machine.
COUNTED: dict[str, Case] = {
    f"operators-{name}": functools.partial(count, name) for name in NETWORKS
}
CASES: dict[str, Case] = {
    **{
        f"{name} in LiteRT": functools.partial(compare, name, ".tflite", "keras")
        for name in DESCRIPTIONS
    },
    **{
        f"{name} in ONNX": functools.partial(compare, name, ".onnx", "jax2onnx")
        for name in NETWORKS
    },
    **{
        f"{name} in int8": functools.partial(compare_int8, name)
        for name in ("ds-cnn", "mobilenet-v2", "resnet18")
    },
    **{
        f"{name} on {_CHIP}": functools.partial(compare_cycles, name)
        for name in ("ds-cnn", "mobilenet-v2", "autoencoder")
    },
}
