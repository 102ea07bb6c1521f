"""The record that a file carries about itself, in its own metadata.

With it, the file can be held against a checkpoint later.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..messages.errors import ExportError
from ..plan import Plan
from .graph import Folded, Source
from .layers import Layer

FORMAT = "fcconv_jax.export"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """The record that a file carries about itself.

    Args:
      layers: its linear layers, in the order in which they run.
      plan: which of them were converted, and how.
      form: the form that was asked for.
      chip: the chip that it is for.
      constants: the parameters besides kernels and biases, as the file has them.
      fingerprint: of the file, see :mod:`fcconv_jax.export.fingerprint`.
      digests: of the parameters that are not a layer's kernel or bias, by path.
    """

    layers: tuple[Layer, ...]
    plan: Plan
    form: str
    chip: str | None = None
    constants: tuple[Source, ...] = ()
    fingerprint: str | None = None
    digests: tuple[tuple[str, str], ...] = ()

    def to_bytes(self) -> bytes:
        """Return the record as files carry it: the fingerprint, the rest compressed.

        The plain record of a DS-CNN was a fifth of its file.
        """
        rest = dataclasses.replace(self, fingerprint=None).to_json().encode()
        return (self.fingerprint or "").encode() + b" " + zlib.compress(rest, 9)

    def to_text(self) -> str:
        """Return the same for formats whose metadata are text."""
        start, _, rest = self.to_bytes().partition(b" ")
        return f"{start.decode()} {base64.b85encode(rest).decode()}"

    @classmethod
    def from_bytes(cls, content: bytes) -> FileRecord:
        """Read what :meth:`to_bytes` wrote.

        Raises:
          ExportError: it is not a record, or has another version.
        """
        start, _, rest = content.partition(b" ")
        try:
            record, fingerprint = cls.from_json(zlib.decompress(rest)), start.decode()
        except (zlib.error, UnicodeDecodeError) as error:
            raise ExportError(
                f"the file's manifest is damaged: {error!r}. Export it again."
            ) from error
        return dataclasses.replace(record, fingerprint=fingerprint or None)

    @classmethod
    def from_text(cls, text: str) -> FileRecord:
        """Read what :meth:`to_text` wrote.

        Raises:
          ExportError: it is not a record, or has another version.
        """
        start, _, rest = text.partition(" ")
        try:
            content = base64.b85decode(rest)
        except ValueError as error:
            raise ExportError(
                f"the file's manifest is damaged: {error!r}. Export it again."
            ) from error
        return cls.from_bytes(f"{start} ".encode() + content)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "form": self.form,
                "chip": self.chip,
                "fingerprint": self.fingerprint,
                "plan": json.loads(self.plan.to_json()),
                "layers": [_layer_to_json(layer) for layer in self.layers],
                "digests": self.digests,
                "constants": [dataclasses.asdict(source) for source in self.constants],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> FileRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
          ExportError: the text is not a record, or has another version.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ExportError(
                    f"Expected the file's manifest to have version {VERSION}, got "
                    f"{content['version']!r}. Use the fcconv_jax that wrote the file."
                )
            layers = tuple(map(_layer_from_json, content["layers"]))
            plan = Plan.from_json(json.dumps(content["plan"]))
            constants = tuple(map(_source_from_json, content["constants"]))
            about = content["form"], content["chip"], constants
            digests = _tuples(content["digests"])
            return cls(layers, plan, *about, content["fingerprint"], digests)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(
                f"the file's manifest is damaged: {error!r}. Export it again."
            ) from error


def digest_of(array: np.ndarray) -> str:
    """Return a digest of a parameter's dtype, shape and bits."""
    content = np.ascontiguousarray(array)
    kind = f"{array.dtype}{array.shape}".encode()
    # Half of its digits: there is one for each parameter of a norm.
    return hashlib.sha256(kind + content.tobytes()).hexdigest()[:32]


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    folded = layer.folded
    # Arrays aren't JSON: they are packed below.
    content = dataclasses.asdict(dataclasses.replace(layer, folded=None))
    if folded is not None:
        vectors = map(_packed, (*folded.rows, *folded.columns))
        content["folded"] = [*vectors, sorted(folded.leaves)]
    return content


def _packed(vector: np.ndarray) -> list[Any]:
    """A vector of float64 as its size and one number, or its bits.

    Bytes of one place come together: scales are of one sign and size, which compresses.
    """
    if (vector == vector[0]).all():
        return [len(vector), float(vector[0])]
    # Half the bytes, where they say the same.
    narrow = vector.astype("<f4")
    kept = narrow if (narrow == vector).all() else vector.astype("<f8")
    places = kept.view(np.uint8).reshape(len(kept), -1).T
    return [len(vector), base64.b64encode(places.tobytes()).decode()]


def _unpacked(size: int, content: float | str) -> np.ndarray:
    if not isinstance(content, str):
        return np.full(size, float(content))
    places = np.frombuffer(base64.b64decode(content), np.uint8).reshape(-1, size)
    return places.T.copy().view(f"<f{len(places)}")[:, 0].astype(np.float64)


def _folded_from_json(entry: Sequence[Any]) -> Folded:
    *packed, leaves = entry
    vectors = [_unpacked(*each) for each in packed]
    rows, columns = np.stack(vectors[:2]), np.stack(vectors[2:])
    return Folded(rows, columns, frozenset(leaves))


def _layer_from_json(entry: Mapping[str, Any]) -> Layer:
    values = {key: _tuples(value) for key, value in entry.items()}
    for name in ("kernel", "bias"):
        if entry[name] is not None:
            values[name] = _source_from_json(entry[name])
    if entry.get("folded") is not None:
        values["folded"] = _folded_from_json(entry["folded"])
    return Layer(**values)


def _source_from_json(entry: Mapping[str, Any]) -> Source:
    steps = tuple((kind, _tuples(details)) for kind, details in entry["steps"])
    return Source(entry["leaf"], steps)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
