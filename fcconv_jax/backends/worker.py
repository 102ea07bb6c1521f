"""Compiles exported programs ahead of time; runs as a script in a process of its own.

It imports only JAX, so that it starts quickly and doesn't need the model's code. The
only argument is a folder: ``job.json`` names the target, each ``NAME.bin`` is a program
from ``jax.export``. The worker writes ``NAME.hlo`` and ``NAME.json``, or ``error.txt``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental import topologies


def compile_job(folder: Path) -> None:
    """Compile every program of a job."""
    job = json.loads((folder / "job.json").read_text())
    jax.config.update("jax_enable_x64", job["x64"])
    _keep_layouts_unasked()
    topology = topologies.get_topology_desc(**job["topology"])
    _warm_up(job, topology.devices)
    for name in job["programs"]:
        exported = export.deserialize(bytearray((folder / f"{name}.bin").read_bytes()))
        started = time.perf_counter()
        compiled = _compile(exported, job, topology.devices)
        record = {
            "seconds": time.perf_counter() - started,
            "device": _device(topology.devices[0].device_kind, exported.nr_devices),
            **describe(compiled),
        }
        (folder / f"{name}.hlo").write_text(compiled.as_text() or "")
        (folder / f"{name}.json").write_text(json.dumps(record))


def _keep_layouts_unasked() -> None:
    """Keep old versions of JAX from asking an absent TPU for its default layout.

    jax 0.8.0: delete. Before, with the libtpu that Colab has beside it, this question
    crashes the process when the program is compiled already. JAX asks in order to run
    the program, which no one does here, and no public function leaves it out.
    """
    if jax.__version_info__ < (0, 8):
        from jax._src.interpreters import pxla

        pxla.is_default_layout = lambda *_: True


def _device(kind: str, number: int) -> str:
    """Return the device, or devices, that a program is compiled for.

    Example:
      >>> _device("TPU v5 lite", 1), _device("TPU v5 lite", 256)
      ('TPU v5 lite', '256 x TPU v5 lite')
    """
    return kind if number == 1 else f"{number} x {kind}"


def _warm_up(job: Any, devices: Any) -> None:
    """Compile something small: the first program would pay for what is set up once."""
    one = jax.sharding.SingleDeviceSharding(devices[0])
    small = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=one)
    traced = jax.jit(lambda x: x @ x + 1).trace(small)
    traced.lower(lowering_platforms=(job["topology"]["platform"],)).compile()


def _compile(exported: Any, job: Any, devices: Any) -> Any:
    if job["mesh"] is None:
        one = jax.sharding.SingleDeviceSharding(devices[0])
        shardings = [one] * len(exported.in_avals)
    else:
        shape = job["mesh"]["shape"]
        mesh = jax.sharding.Mesh(
            np.array(devices[: exported.nr_devices]).reshape(shape),
            job["mesh"]["axis_names"],
        )
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        # None stands for an input whose sharding the program leaves open.
        shardings = [s or replicated for s in exported.in_shardings_jax(mesh)]
    flat = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
        for aval, sharding in zip(exported.in_avals, shardings)
    ]
    args, kwargs = jax.tree.unflatten(exported.in_tree, flat)
    traced = jax.jit(exported.call).trace(*args, **kwargs)
    return traced.lower(lowering_platforms=tuple(exported.platforms)).compile()


def describe(compiled: Any) -> dict[str, Any]:
    """Return a compiled program's own estimates of its cost; None for missing ones.

    Example:
      >>> describe(jax.jit(lambda x: x + 1).lower(1.0).compile())["flops"]
      1.0
    """
    costs = compiled.cost_analysis()
    if isinstance(costs, list):  # older backends: one entry a partition
        costs = costs[0] if costs else None
    memory = compiled.memory_analysis()
    return {
        "flops": costs and costs.get("flops"),
        "bytes_accessed": costs and costs.get("bytes accessed"),
        "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def main() -> None:
    """Run the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    try:
        compile_job(folder)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
