"""Writes StableHLO files with jax.export, and reads them back.

JAX itself is the writer here, so whatever JAX does can be in the file, and
``jax.export.deserialize`` reads it: the record of this package stands behind what that
reads. The leading axis of the inputs stays symbolic where the model allows it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ...messages.errors import ExportError
from ...messages.extras import require
from ...tracing.arguments import is_key
from ..open_sizes import OpenSizes
from ..record import FileRecord
from ..shipped import Shipped, ShippedLayer
from . import Runtime

_MARK = b"fcconv_jax.record"
PLATFORMS = ("cpu", "cuda", "tpu")
_CONSTANT = re.compile(
    r'stablehlo\.constant dense<(?P<data>"0x[0-9A-F]*"|[^>]*)> : '
    r"tensor<(?P<type>[^>]*)>"
)
_DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
    "bf16": np.dtype("bfloat16").type,
    "i32": np.int32,
    "i8": np.int8,
}


def write_program(
    call: Callable[..., Any],
    variables: PyTree,
    arrays: Sequence[Any],
    names: Sequence[str],
    record: FileRecord,
    path: Path,
    sizes: OpenSizes | None = None,
) -> list[str]:
    """Write a model with its params as constants.

    The arguments are those of :attr:`Runtime.write_program`. Without ``sizes``, the
    batch is symbolic where it can be; those that are requested can be or are refused.

    Raises:
      ExportError: it can't be written for any size.
      MissingExtraError: flatbuffers is not installed.
    """
    require("flatbuffers", "stablehlo", "Writing a StableHLO file")
    # NNX models hold keys for their dropout, which a call for inference doesn't read.
    constants = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), variables)

    def run(*inputs: PyTree) -> Any:
        return call(constants, list(inputs))

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    exporting = jax_export.export(jax.jit(run), platforms=PLATFORMS)
    notes = [lifetime(datetime.date.today())]
    try:
        made = exporting(*_symbolic(shapes, sizes or OpenSizes(batch=True)))
        if sizes is None:
            notes.append(
                "the leading axis of its inputs is symbolic; pass any_batch=True to "
                "run three sizes"
            )
    except Exception as error:  # whatever the model makes of a symbolic size
        why = str(error).strip().splitlines()[0][:100]
        if sizes is not None:
            raise ExportError(
                f"Expected a model for any size, got one that JAX can't trace with a "
                f"symbolic size: {why}. Drop any_batch=True or any_size=True to export "
                "it for one size."
            ) from error
        notes.append(f"its batch is fixed at {shapes[0].shape[:1]}: {why}")
        made = exporting(*shapes)
    try:
        content = bytes(made.serialize())
    except (TypeError, ValueError):  # integer keys, and classes it doesn't know
        run_made = made.call
        made = jax_export.export(
            jax.jit(lambda *inputs: jax.tree.leaves(run_made(*inputs))),
            platforms=PLATFORMS,
        )(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made.in_avals))
        content = bytes(made.serialize())
        notes.append("its outputs are a list: jax.export can't write their PyTree")
    about = json.dumps({"record": record.to_text(), "outputs": list(names)}).encode()
    size = len(about).to_bytes(8, "little")
    path.write_bytes(content + about + size + _MARK)
    return notes


def lifetime(written: datetime.date) -> str:
    """Return until when JAX promises to read a file, and how to renew it.

    Source:
      JAX's documentation, *Exporting and serializing*: compatibility guarantees.

    Example:
      >>> lifetime(datetime.date(2026, 8, 31))[:51]
      'JAX releases until 2027-02-28 can read this file (6'
    """
    month = written.month + 6
    year, month = written.year + (month > 12), (month - 1) % 12 + 1
    days = (datetime.date(year + month // 12, month % 12 + 1, 1)).toordinal() - 1
    last = min(datetime.date(year, month, 1).toordinal() + written.day - 1, days)
    return (
        f"JAX releases until {datetime.date.fromordinal(last)} can read this file (6 "
        "months, as jax.export promises): export the model again with a newer JAX "
        "before that"
    )


def _symbolic(
    shapes: Sequence[jax.ShapeDtypeStruct], open_: OpenSizes
) -> list[jax.ShapeDtypeStruct]:
    sizes = {x.shape[0] for x in shapes if x.shape}
    if open_.batch and (len(sizes) != 1 or not all(x.shape for x in shapes)):
        raise ValueError(f"the inputs have leading axes of {sorted(sizes)}")
    images = [x for x in shapes if len(x.shape) > 2]
    parts = {0: "batch"} if open_.batch else {}
    least = []
    for name, axis in open_.names.items():
        count, rest = divmod(images[0].shape[axis], open_.step)
        parts[axis] = f"{open_.step}*{name}+{rest}"
        least.append(f"{name} >= {count}")
    scope = jax_export.SymbolicScope(least)

    def symbolic(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        mine = parts if x in images else {k: v for k, v in parts.items() if k == 0}
        text = ", ".join(mine.get(i, str(n)) for i, n in enumerate(x.shape))
        shape = jax_export.symbolic_shape(text, scope=scope)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return [symbolic(x) for x in shapes]


class StableHloFile(Shipped):
    """A .stablehlo file, read back.

    Raises:
      ExportError: it is none.
    """

    runtime = "JAX, from StableHLO"
    native = True
    moving = ("transpose", "reshape")

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes()
        self.about: dict[str, Any] = {}
        if content.endswith(_MARK):
            end = len(content) - len(_MARK) - 8
            size = int.from_bytes(content[end : end + 8], "little")
            self.about = json.loads(content[end - size : end])
            content = content[: end - size]
        self.program = content
        try:
            self.exported = jax_export.deserialize(bytearray(content))
        except Exception as error:  # flatbuffers' and JAX's own kinds
            raise ExportError(
                f"{path} was not written by jax.export: {error}. Export it again."
            ) from None

    @functools.cached_property
    def text(self) -> str:
        """The program. MLIR's parser crashes on some damaged bytes."""
        return self.exported.mlir_module()

    def load(self) -> None:
        """Nothing more: JAX has read the whole file already."""

    def record(self) -> FileRecord | None:
        """Return the file's own record."""
        text = self.about.get("record")
        return None if text is None else FileRecord.from_text(text)

    def ops(self) -> Mapping[str, int]:
        """Return how many operations there are of each kind; constants are none."""
        found = Counter(re.findall(r"= stablehlo\.(\w+)", self.text))
        del found["constant"]
        return found

    def constants(self) -> Sequence[np.ndarray]:
        """Return every constant of a dtype that params have."""
        found = []
        for match in _CONSTANT.finditer(self.text):
            *sizes, kind = match["type"].split("x")
            if kind in _DTYPES:
                shape = tuple(map(int, sizes))
                found.append(_parsed(match["data"], shape, _DTYPES[kind]))
        return found

    def output_names(self) -> Sequence[str]:
        """Return the outputs."""
        return self.about.get("outputs", [])

    def layers(self) -> Sequence[ShippedLayer]:
        """None are cut out: JAX is the writer."""
        return []

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the whole file on JAX's default device."""
        outs = self.exported.call(*inputs)
        return [np.asarray(y) for y in jax.tree.leaves(outs)]

    def runner(self, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """Return one run of the whole file, to be timed."""
        run = jax.jit(self.exported.call)
        return lambda: run(*inputs)

    def remarks(self, record: FileRecord) -> list[str]:
        """Return how the layers are compared instead."""
        return [
            "layers are not cut out of StableHLO, which JAX itself writes: fcconv "
            "verify compares both forms of each"
        ]


def _parsed(data: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Return the entries of a constant as MLIR prints it."""
    if data.startswith('"0x'):
        array = np.frombuffer(bytes.fromhex(data[3:-1]), dtype)
    else:
        numbers = [_number(word, dtype) for word in re.findall(r"[^\s\[\],]+", data)]
        array = np.array(numbers, dtype)
    if array.size == 1:  # said once for all entries
        return np.full(shape, array.reshape(-1)[0])
    return array.reshape(shape)


def _number(word: str, dtype: Any) -> Any:
    if word.startswith("0x"):  # what decimals do not say: infinities, NaN
        size = np.dtype(dtype).itemsize
        return np.frombuffer(bytes.fromhex(word[2:])[::-1][:size], dtype)[0]
    kind = np.dtype(dtype).kind
    return dtype(int(word) if kind == "i" else float(word) if kind == "V" else word)


RUNTIME = Runtime(
    *("stablehlo", "StableHLO", ".stablehlo", StableHloFile),
    write_program=write_program,
    layers=False,
    open_sizes=frozenset({"any_batch", "any_size"}),
)
