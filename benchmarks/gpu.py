"""Executes both forms of typical layers on a GPU and keeps a record of what it showed.

    python benchmarks/gpu.py    # writes to benchmarks/results, prints a table

Each layer is verified on the device (certificate, error against float64)
and timed in its dense form, and in the conv form that is planned for CUDA.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from layouts import LAYERS

import fcconv_jax as fc
from fcconv_jax.backends.resolution import resolve


def measure(model: nn.Module, shape: tuple[int, ...], rules: Any, backend: str) -> Any:
    """Verifies one layer on a device; its verdict and figures."""
    x = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)
    plan = fc.make_plan(model, x, rules=rules, backend=backend)
    report = fc.verify(model, params, x, plan=plan, backends=[backend], gradients=False)
    return {
        "passed": report.passed,
        "failures": report.failures,
        "figures": report.backends[0].figures,
    }


def main() -> None:
    """Writes one JSON file and prints its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="cuda", help="default: %(default)s")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=folder, help="default: %(default)s")
    arguments = parser.parse_args()
    found = resolve(arguments.backend)
    if found.how != "executed":
        sys.exit(f"no {arguments.backend} device is present: nothing can be executed")
    kind = found.device.device_kind
    record: dict[str, Any] = {
        "device": kind,
        "platform": found.device.client.platform_version,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "layers": {},
    }
    print(f"{kind}, jax {jax.__version__}, {record['date']}\n")
    print("| layer | equivalent | dense, ms | conv, ms | conv / dense |")
    print("| --- | --- | --- | --- | --- |")
    for name, (model, shape, rules) in LAYERS.items():
        layer = record["layers"][name] = measure(model, shape, rules, arguments.backend)
        ms = layer["figures"]["milliseconds"]
        print(
            f"| {name} | {'yes' if layer['passed'] else 'NO'} | {ms['original']:.3g} "
            f"| {ms['converted']:.3g} | {ms['ratio']:.2f}x |"
        )
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{slug}-{record['date']}.json"
    file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"\nwritten: {file}", file=sys.stderr)
    if not all(layer["passed"] for layer in record["layers"].values()):
        sys.exit("some forms differ")


if __name__ == "__main__":
    main()
