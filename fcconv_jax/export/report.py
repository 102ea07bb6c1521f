"""Report on an exported file: its figures and its proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

from ..messages.reports import Report, Table
from ..plan import Plan
from .proof import LayerProof, Proof


@dataclasses.dataclass(frozen=True)
class FormFigures:
    """Figures of the file in one form of the model.

    Args:
      form: ``"conv"``, ``"dense"`` or ``"mix"``.
      bytes: size of the file.
      ops: number of operations of each kind, by the runtime's names.
      transposes: number of operations that only move entries.
      reshapes: number of operations that only change the shape.
      activation_bytes: peak memory of the activations; None if the file was only read.
      milliseconds: time of one run on this machine; None if it wasn't run.
      error: the largest error against the float64 reference, relative to the largest
        value; None if it wasn't run.
      cycles: by accelerator, its compiler's estimate for the int8 file.
    """

    form: str
    bytes: int
    ops: Mapping[str, int]
    transposes: int
    reshapes: int
    activation_bytes: int | None
    milliseconds: float | None = None
    error: float | None = None
    cycles: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExportReport(Report):
    """Report of :func:`fcconv_jax.export`: the file, its checks and its figures.

    Attributes:
      path: the file.
      runtime: name of the runtime, as for ``runtime=``.
      title: the runtime's full name.
      form: the requested form.
      chip: the chip that the file is for.
      plan: which layers were converted, and how.
      proof: the checks of the file.
      figures: the file's figures, and those of the other forms with ``compare=True``.
      products: matmuls between two activations, which are the same in every form.
      left: weights that aren't in the requested form, and why.
      broken: layers that the chip doesn't support, and the rule that they break.
      executed: whether the file was run on this machine.
      notes: other remarks.
      int8: what quantizing changed.
      int8_layers: the checks of the int8 file; ``proof`` is that of the float file that
        it was made from.
      int8_failures: outputs of the int8 file that are too far from the float file's.

    Example:
      >>> proof = Proof((), (), 0, (), ())
      >>> made = "m.onnx", "onnx", "ONNX Runtime", "conv", None, Plan("conv"), proof, ()
      >>> ExportReport(*made).passed
      True
    """

    path: str
    runtime: str
    title: str
    form: str
    chip: str | None
    plan: Plan
    proof: Proof
    figures: tuple[FormFigures, ...]
    products: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    executed: bool = True
    notes: tuple[str, ...] = ()
    int8: Mapping[str, str] = dataclasses.field(default_factory=dict)
    int8_layers: tuple[LayerProof, ...] = ()
    int8_failures: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failed check, by layer or output."""
        found = [*self.proof.all_failures]
        found += [f"int8: {why}" for why in self.int8_failures]
        for layer in self.int8_layers:
            found += [f"int8: layer {layer.name!r}: {why}" for why in layer.failures]
        return tuple(found)

    @property
    def layers(self) -> tuple[LayerProof, ...]:
        """The proof of each linear operation with a parameter, in the file written."""
        found = self.int8_layers or self.proof.layers
        return tuple(layer for layer in found if not layer.constant)

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`."""
        return {**super().content(), "plan": json.loads(self.plan.to_json())}

    @property
    def headline(self) -> str:
        """The verdict, the file, the runtime, and what was compared."""
        verdict = "PROVED" if self.passed else "DIFFERENT"
        if self.passed and not self.executed:
            verdict = "CONVERTED, NOT RUN"
        elif self.passed and not self.proof.outputs:
            verdict = "PROVED WITHOUT OUTPUTS"
        chip = f" for {self.chip}" if self.chip else ""
        form = f"{self.form} form"
        if self.left:
            few = (
                "1 layer is" if len(self.left) == 1 else f"{len(self.left)} layers are"
            )
            form += f" ({few} not)"
        return f"{verdict}: {self.path}, {form}{chip}, {self.title}; {self._compared()}"

    def _compared(self) -> str:
        counts = {
            "weights": sum(layer.bits is not None for layer in self.layers),
            "layers on integers": sum(layer.exact is not None for layer in self.layers),
            "other parameters": self.proof.constants,
            "outputs": len(self.proof.outputs),
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        for stored in dict.fromkeys(x.stored for x in self.layers if x.stored):
            parts.append(f"rounded to {stored}")
        return f"compared: {', '.join(parts) or 'nothing'}"

    @property
    def tables(self) -> Sequence[Table]:
        """The layers, and the figures of each form."""
        return [
            rows for rows in (self._layer_rows(), self._form_rows()) if len(rows) > 1
        ]

    def _layer_rows(self) -> list[tuple[str, ...]]:
        last = ("draws",)
        if any(layer.stored == "int8" for layer in self.layers):
            last = ("entries", "off", "largest off", "rounding")
        rows = [("layer", "op", "weights", "on integers", *last)]
        for layer in self.layers:
            kept = "norm folded in" if layer.folded else "the same bits"
            if layer.stored:
                kept = f"rounded to {layer.stored}"
            more, found = (str(layer.probes),), layer.int8
            if found is not None:
                counts = (found.entries, found.off, found.largest)
                more = (*(f"{n:,}" for n in counts), found.rounding)
            elif len(last) > 1:
                more = ("-",) * len(last)
            bits = {True: kept, False: "OTHER BITS", None: "computed"}
            within = found is not None and found.off
            exact = {
                True: "within rounding" if within else "exact",
                False: "DIFFERENT",
                None: "not run",
            }
            rows.append(
                (
                    *(layer.name or "(root)", layer.op, bits[layer.bits]),
                    *(exact[layer.exact], *more),
                )
            )
        return rows

    def _form_rows(self) -> list[tuple[str, ...]]:
        chips = list(dict.fromkeys(c for f in self.figures for c in f.cycles))
        rows = [
            (
                *("form", "KiB", "ops", "transposes", "reshapes", "activations KiB"),
                *("error", "ms", *(f"{chip} cycles" for chip in chips)),
            )
        ]
        for each in self.figures:
            error = "-" if each.error is None else f"{each.error:.1e}"
            memory = "-"
            if each.activation_bytes is not None:
                memory = f"{each.activation_bytes / 1024:.1f}"
            ms = "-" if each.milliseconds is None else f"{each.milliseconds:.3g}"
            rows.append(
                (
                    *(each.form, f"{each.bytes / 1024:.1f}"),
                    *(str(sum(each.ops.values())), str(each.transposes)),
                    *(str(each.reshapes), memory),
                    *(error, ms),
                    *(
                        f"{each.cycles[c]:,}" if c in each.cycles else "-"
                        for c in chips
                    ),
                )
            )
        return rows

    @property
    def details(self) -> Iterator[str]:
        """Errors, other parameters, notes and failures."""
        for error in self.proof.outputs:
            yield (
                f"{error.path}: error {error.original:.1e} in JAX, "
                f"{error.converted:.1e} in the file ({error.allowed:.1e} allowed)"
            )
        if self.proof.constants:
            yield f"other parameters: {self.proof.constants}, the same bits"
        folded = sum(layer.folded for layer in self.proof.layers)
        if folded:
            yield f"folded: {folded} norms, in float64 and rounded once"
        own = [layer for layer in self.proof.layers if layer.constant]
        if own:
            exact = sum(bool(layer.exact) for layer in own)
            yield f"constant matrices, such as a resize's: {len(own)}, {exact} exact"
        if self.products:
            yield (
                f"matmuls between two activations: {len(self.products)} "
                f"({', '.join(self.products)})"
            )
        for path, why in self.left:
            yield f"not in {self.form} form: {path}: {why}"
        for path, why in self.broken:
            yield f"{self.chip} doesn't support {path}: {why}"
        yield from (f"int8: {key}: {value}" for key, value in self.int8.items())
        yield from (f"note: {note}" for note in (*self.notes, *self.proof.notes))
        yield from (f"FAILED: {failure}" for failure in self.failures)
