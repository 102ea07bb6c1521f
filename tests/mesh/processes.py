"""Converts arrays that are spread over two processes; started by test_processes.py.

`python processes.py NUMBER PORT FOLDER`: one of two processes with four devices each.
Prints a line of JSON with what it held and what memory it took.
"""

import functools
import json
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import kernel_rearrangement
from fcconv_jax.plan import LayerPlan, Plan

MIB = 1 << 20
ROWS, COLUMNS, WINDOW = 4096, 8192, (4, 4)  # 128 MiB of float32


def layer(order):
    kernel = kernel_rearrangement((ROWS, COLUMNS), WINDOW, order=order)
    return LayerPlan(
        *("full_window", "Dense", WINDOW, order, (("kernel", kernel),)),
        *((1, ROWS), (1, 1)),
    )


PLAN = Plan("conv", (("hwc", layer("HWC")), ("chw", layer("CHW"))))
SPECS = {"hwc": P("data", "model"), "chw": P(("data", "model"), None), "norm": P()}


def entries(name, shape):
    """Entries that tell where they come from, of any part of an array."""

    def part(index):
        grid = np.ogrid[tuple(slice(*s.indices(n)) for s, n in zip(index, shape))]
        strides = (7919, 31, 3)
        value = np.asarray(sum(a * s for a, s in zip(grid, strides)))
        return ((value + len(name)) % 1021).astype(np.float32)

    return part


def spread(mesh, scale=1) -> Any:
    """Params over all devices: each process makes its own parts alone."""

    def make(name, shape):
        sharding = NamedSharding(mesh, SPECS[name])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: scale * entries(name, shape)(index)
        )

    return {
        "hwc": {"kernel": make("hwc", (ROWS, COLUMNS))},
        "chw": {"kernel": make("chw", (ROWS, COLUMNS))},
        "norm": {"scale": make("norm", (24,))},
    }


def whole(scale=1):
    """The same in one process."""
    return {
        name: {leaf: scale * entries(name, shape)(tuple(slice(None) for _ in shape))}
        for name, leaf, shape in (
            ("hwc", "kernel", (ROWS, COLUMNS)),
            ("chw", "kernel", (ROWS, COLUMNS)),
            ("norm", "scale", (24,)),
        )
    }


def local(tree):
    """The most bytes of one array that this process holds."""
    return max(
        sum(shard.data.nbytes for shard in leaf.addressable_shards)
        for leaf in jax.tree.leaves(tree)
        if leaf.size > 1000
    )


class Anonymous:
    """The most anonymous memory while it is open, above what there was, in MiB."""

    def __enter__(self):
        self._done, self.most, self._base = threading.Event(), 0, self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.001):
            self.most = max(self.most, self._now() - self._base)

    @staticmethod
    def _now():
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) >> 10


def main():
    number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    found = {}

    # Under one jit, the arrays given up to it.
    params = spread(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    there = fc.convert_params(shardings, PLAN)
    move = jax.jit(
        functools.partial(fc.convert_params, plan=PLAN),
        donate_argnums=0,
        out_shardings=there,
    )
    found["before"] = local(params)
    with Anonymous() as watch:
        conv = jax.block_until_ready(move(params))
    found["jitted"] = {"local": local(conv), "MiB": watch.most}
    assert conv["chw"]["kernel"].sharding == there["chw"]["kernel"]

    # What is watched would be seen.
    gather = jax.jit(lambda x: x * 1, out_shardings=NamedSharding(mesh, P()))
    with Anonymous() as watch:
        jax.block_until_ready(gather(conv["chw"]["kernel"])).delete()
    found["gathered"] = watch.most

    # With an optimizer, and the checkpoint that all processes write together.
    params, tx = spread(mesh), optax.adam(1e-2)
    start: Any = jax.jit(tx.init)(params)
    adam, *rest = start
    everywhere = NamedSharding(mesh, P())
    count = jax.make_array_from_callback((), everywhere, lambda _: np.int32(7))
    adam = adam._replace(count=count, mu=spread(mesh, 2), nu=spread(mesh, 3))
    opt_state = (adam, *rest)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "dense", {"params": params, "opt_state": opt_state})
    with Anonymous() as watch:
        opt_state = fc.convert_opt_state(opt_state, PLAN, tx=tx, params=params)
        params = fc.convert_params(params, PLAN)
        jax.block_until_ready((opt_state, params))
    found["state"] = {"local": local((params, opt_state)), "MiB": watch.most}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "conv", {"params": params, "opt_state": opt_state})
    grads = jax.tree.map(jnp.ones_like, params)
    found["step"] = local(jax.jit(tx.update)(grads, opt_state, params)[0])
    print(json.dumps(found), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
