"""Thirty small networks as files for every edge runtime.

    python benchmarks/exports.py [NAME ...] [--runtime onnx ...]

Each is exported to each runtime and verified there. Results go to
``results/exports.json``, of which the documentation makes a table; names renew the
cells of those networks alone. Needs the extras of the runtimes and the libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edge_networks import NETWORKS, Network

import fcconv_jax as fc

RUNTIMES = {
    "litert": "tflite",
    "onnx": "onnx",
    "openvino": "xml",
    "iree": "vmfb",
    "stablehlo": "stablehlo",
    "coreml": "mlpackage",
}
RESULTS = Path(__file__).parent / "results" / "exports.json"


def cell(network: Network, runtime: str) -> dict[str, Any]:
    """What one network is in one runtime: figures, or why it is refused."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net.{RUNTIMES[runtime]}"
        given = network.model, network.params, *network.inputs
        try:
            report = fc.export(*given, path=path, progress=False)
        except fc.FcconvError as error:
            reason = str(error).replace(folder, "").replace("\n", " ")
            return {"verdict": "refused", "reason": reason}
    figures = report.figures[0]
    verdict = "verified" if report.executed else "written, not run"
    return {
        "verdict": verdict if report.passed else "failed",
        "reason": "; ".join(report.failures),
        "operators": sum(figures.ops.values()),
        "bytes": figures.bytes,
        "error": figures.error,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    """Exports; status 1 if a file fails its verification."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks; all if there are none")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES)
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = 0
    for name in options.names or NETWORKS:
        network = NETWORKS[name]()
        row = found.setdefault(name, {})
        for runtime in options.runtime or RUNTIMES:
            row[runtime] = cell(network, runtime)
            failed += row[runtime]["verdict"] == "failed"
            print(name, runtime, row[runtime], file=sys.stderr, flush=True)
            found[name] = {each: row[each] for each in RUNTIMES if each in row}
            ordered = {name: found[name] for name in NETWORKS if name in found}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
