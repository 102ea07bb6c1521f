"""Writes IREE modules (.vmfb) from StableHLO, and reads them back.

The params are arguments of the module in a .safetensors file beside it, so one
module runs any params. No operation can be cut out of compiled code: each layer is
compiled again, alone and with the same flags, for the integers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax import lax
from jaxtyping import PyTree

from ...messages.errors import ExportError
from ...messages.extras import require
from ..layers import Layer, expected
from ..proof import parameter_leaves
from ..record import FileRecord
from ..shipped import Shipped, ShippedLayer
from . import Runtime

BACKEND = "llvm-cpu"


def write_program(
    call: Callable[..., Any],
    variables: PyTree,
    arrays: Sequence[Any],
    names: Sequence[str],
    record: FileRecord,
    path: Path,
) -> list[str]:
    """Compile a model for this machine's processor, its params as arguments.

    The arguments are those of :attr:`Runtime.write_program`.

    Raises:
      ExportError: IREE refuses the program; gives its reason.
    """
    leaves = parameter_leaves(variables)
    flat, tree = jax.tree.flatten(variables)
    keys = list(leaves)

    def run(flat: Any, inputs: PyTree) -> list[Any]:
        return jax.tree.leaves(call(jax.tree.unflatten(tree, flat), inputs))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*flat, *arrays)]
    count = len(flat)
    text = _stablehlo(lambda *a: run(list(a[:count]), list(a[count:])), shapes)
    path.write_bytes(compiled(text))
    about = {
        "record": record.to_text(),
        "outputs": list(names),
        "ops": re.findall(r"= stablehlo\.(\w+)", text),
        "params": keys,
    }
    safetensors = require("safetensors.numpy", "iree", "an IREE module's params")
    safetensors.save_file(
        {key: np.ascontiguousarray(leaves[key]) for key in keys},
        path.with_suffix(".safetensors"),
        {"fcconv_jax": json.dumps(about)},
    )
    return [f"its params are arguments, and lie in {path.stem}.safetensors"]


def _stablehlo(function: Callable[..., Any], shapes: Sequence[Any]) -> str:
    # Arguments that the program does not read stay: params are counted by place.
    jitted = jax.jit(function, keep_unused=True)
    return jax_export.export(jitted, platforms=("cpu",))(*shapes).mlir_module()


def compiled(text: str) -> bytes:
    """Return a module of a program's StableHLO."""
    compiler = require("iree.compiler", "iree", "an IREE module (.vmfb)")
    try:
        return compiler.compile_str(
            text,
            target_backends=[BACKEND],
            input_type="stablehlo",
            # By default the code is for a generic processor, without vector extensions.
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
    except compiler.CompilerToolError as error:
        said = str(error).strip().splitlines()
        raise ExportError(f"IREE refuses the model: {' '.join(said[:3])}") from None


class IreeFile(Shipped):
    """A .vmfb file with its params, read back.

    Raises:
      ExportError: the file of params is missing.
    """

    runtime = "IREE, llvm-cpu"
    native = True
    moving = ("transpose", "reshape")

    def __init__(self, path: Path):
        self.path, self.content = path, path.read_bytes()
        beside = path.with_suffix(".safetensors")
        if not beside.exists():
            raise ExportError(
                f"{beside}: no such file, but {path} reads its params from it. Keep "
                "both files together."
            )
        safetensors = require("safetensors", "iree", "an IREE module's params")
        try:
            with safetensors.safe_open(beside, "numpy") as file:
                self.about = json.loads((file.metadata() or {}).get("fcconv_jax", "{}"))
                names = self.about.get("params", list(file.keys()))
                self.params = {name: file.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, ValueError) as error:
            raise ExportError(
                f"{beside} is damaged: {error}. Export it again."
            ) from None
        self._compiled: dict[str, Callable[..., list[np.ndarray]]] = {}

    def load(self) -> None:
        """Load the module in IREE."""
        loaded(self.content)

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        text = self.about.get("record")
        return None if text is None else FileRecord.from_text(text)

    def ops(self) -> Mapping[str, int]:
        """Return how many operations were handed to IREE."""
        found = Counter(self.about.get("ops", ()))
        del found["constant"]
        return found

    def constants(self) -> Sequence[np.ndarray]:
        """Return every parameter."""
        return list(self.params.values())

    def output_names(self) -> Sequence[str]:
        """Return the outputs."""
        return self.about.get("outputs", [])

    def layers(self) -> Sequence[ShippedLayer]:
        """Return the layers of the record, with the params beside the module."""
        record, found = self.record(), []
        for layer in record.layers if record else ():
            kernel, bias = expected(layer, self.params)
            if kernel is None:
                # Computed inside the module, so no file has its entries; only the shape
                # counts here.
                kernel = np.zeros(layer.kernel_shape, np.float32)
            op = {"conv": "convolution"}.get(layer.op, "dot_general")
            found.append(ShippedLayer(layer.name, op, layer.form, kernel, bias))
        return found

    def run_layer(
        self, layer: Layer, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None
    ) -> np.ndarray:
        """Run one layer, compiled alone with the same flags."""
        given = [x, kernel] if bias is None else [x, kernel, bias]
        given = [np.ascontiguousarray(array, np.float32) for array in given]
        # Weights are arguments, so every draw of integers runs the same code.
        if layer.name not in self._compiled:
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given]
            text = _stablehlo(lambda *a: [_as_jax(layer, *a)], shapes)
            self._compiled[layer.name] = loaded(compiled(text))
        return self._compiled[layer.name](*given)[0]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole module on its params."""
        return loaded(self.content)(*self.params.values(), *inputs)

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole module, to be timed."""
        run, params = loaded(self.content), list(self.params.values())
        return lambda: run(*params, *inputs)

    def remarks(self, record: FileRecord) -> list[str]:
        """Return how the layers are run."""
        return ["IREE's layers are compiled again, alone, to be run on integers"]


def loaded(content: bytes) -> Callable[..., list[np.ndarray]]:
    """Return a module's main function, on NumPy arrays."""
    runtime = require("iree.runtime", "iree", "running an IREE module (.vmfb)")
    context = runtime.SystemContext(config=runtime.Config("local-sync"))
    module = runtime.VmModule.copy_buffer(context.instance, content)
    context.add_vm_module(module)
    main = context.modules[module.name]["main"]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        found = main(*(np.ascontiguousarray(array) for array in arrays))
        # One result comes without a list.
        several = found if isinstance(found, tuple | list) else [found]
        return [np.array(each.to_host()) for each in several]

    return run


def _as_jax(layer: Layer, x: Any, kernel: Any, bias: Any = None) -> Any:
    options = layer.options
    if layer.op == "conv":
        y = lax.conv_general_dilated(
            *(x, kernel, options["strides"], options["padding"]),
            rhs_dilation=options["dilation"],
            feature_group_count=options["groups"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    elif layer.op == "dense":
        y = x @ kernel
    else:
        a, b = (kernel, x) if options["side"] == 0 else (x, kernel)
        a = a.swapaxes(-1, -2) if options["adj_a"] else a
        y = a @ (b.swapaxes(-1, -2) if options["adj_b"] else b)
    return y if bias is None else y + bias


RUNTIME = Runtime(
    *("iree", "IREE", ".vmfb", IreeFile),
    write_program=write_program,
    beside=".safetensors",
)
