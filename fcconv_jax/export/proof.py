"""Proves a file: its weights' bits, its layers on integers, its whole on real inputs.

1. Each weight in the file is the parameter's bits, moved as the record says.
2. Each linear operation, cut out of the file and run in its runtime with other numbers
   in its buffers, equals integer arithmetic, bit for bit.
3. The whole file, on real inputs, against the original model read in float64: no worse
   than twice the model's own error in JAX, and a few units in the last place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..frontends.bound import BoundModel
from ..messages.errors import ExportError
from ..messages.progress import Progress
from ..params.leaves import flatten_with_path
from ..tracing.arguments import is_key
from ..tracing.jaxprs import evaluate
from ..verification.agreement import WorkingError, named_leaves, working_errors
from ..verification.obstacles import obstacles
from ..verification.perturbed import PERTURBED, perturbed_by_an_ulp
from ..verification.reading import Reading
from ..verification.reference import free_memory
from .layers import Layer, compute, expected
from .probes import probes, small_probes
from .record import FileRecord, digest_of
from .shipped import Shipped, ShippedLayer


@dataclasses.dataclass(frozen=True)
class Int8Comparison:
    """An int8 layer of a file, compared with integer arithmetic.

    Args:
      entries: how many numbers of its results were compared.
      off: how many of them differ.
      largest: by how many steps of the output at most.
      rounding: how the sums are brought to the output's scale.
    """

    entries: int
    off: int
    largest: int
    rounding: str


@dataclasses.dataclass(frozen=True)
class LayerProof:
    """The checks of one linear operation of a file.

    Args:
      name: the layer.
      op: the runtime's word for it.
      form: ``"conv"`` or ``"dense"``.
      bits: whether its weights are the parameters' bits; None where they are computed
        from parameters.
      exact: whether it equals integer arithmetic; None where it was not run.
      probes: how many draws it was given.
      failures: what is wrong.
      stored: the dtype that the weights are rounded to; empty for their own.
      constant: whether the weights come from no parameter, as those of a resize.
      folded: whether the weights contain a norm; their bits are then those computed.
      int8: of an int8 layer, how it compares with integer arithmetic.
    """

    name: str
    op: str
    form: str
    bits: bool | None
    exact: bool | None
    probes: int
    failures: tuple[str, ...] = ()
    stored: str = ""
    constant: bool = False
    folded: bool = False
    int8: Int8Comparison | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures


@dataclasses.dataclass(frozen=True)
class Proof:
    """The checks of a file.

    Args:
      layers: one entry for each linear operation.
      outputs: the whole file's outputs against the float64 reference.
      constants: how many other parameters were found bit by bit.
      failures: what is wrong with the file as a whole.
      notes: what could not be checked, and why.
    """

    layers: tuple[LayerProof, ...]
    outputs: tuple[WorkingError, ...]
    constants: int
    failures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def all_failures(self) -> tuple[str, ...]:
        """Every failed check, by layer or output."""
        found = [*self.failures]
        for layer in self.layers:
            found += [f"layer {layer.name!r}: {why}" for why in layer.failures]
        found += [f"{e.path!r}: {e.reason}" for e in self.outputs if not e.passed]
        return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """A model's outputs in float64, and as JAX computes them.

    Args:
      exact: path and array, in float64.
      own: the outputs in the model's precision, on its params and on moved ones.
      inputs: what it was called on.
    """

    exact: Sequence[tuple[str, np.ndarray]]
    own: Sequence[Sequence[Any]]
    inputs: Sequence[np.ndarray]


def reference_of(
    bound: BoundModel, stored: str | None = None
) -> tuple[ReferenceOutputs | None, list[str]]:
    """Return a model on its inputs, in float64 and in its own precision.

    Args:
      bound: the model.
      stored: the dtype that the file's weights are rounded to: the model's own error is
        then that with weights moved as far as rounding moves them.

    Returns:
      The reference, or None and the reasons why there is none.
    """
    variables, arrays = bound.variables, bound.arrays
    jaxpr, tree = bound.traced
    why = obstacles(jaxpr)
    if why:
        return None, [f"no float64 reference: {reason}" for reason in why]
    reading = Reading(jaxpr)
    if reading.bytes > free_memory():
        return None, ["no float64 reference: it needs more memory than is free"]
    outs, _ = reading(jax.tree.leaves((variables, arrays)))
    names = [path for path, _ in named_leaves(tree, "output")]
    # Of the trace: tracing a model takes far longer than what it computes.
    run = jax.jit(lambda *flat: evaluate(jaxpr, flat))
    leaves = [run(*jax.tree.leaves((variables, arrays)))]
    for seed in range(PERTURBED):
        params = perturbed_by_an_ulp(variables["params"], seed, stored)
        leaves.append(run(*jax.tree.leaves(({**variables, "params": params}, arrays))))
    inputs = [np.asarray(x) for x in arrays]
    return ReferenceOutputs(list(zip(names, outs)), leaves, inputs), []


def parameter_leaves(tree: PyTree) -> dict[str, np.ndarray]:
    """Return the arrays of a tree of variables by path."""
    found = {}
    for path, node in flatten_with_path(tree)[0]:
        for leaf in jax.tree.leaves(node):
            if not is_key(leaf):
                found[path] = np.asarray(leaf)
    return found


def prove(
    shipped: Shipped,
    record: FileRecord,
    leaves: Mapping[str, np.ndarray],
    show: Progress,
    computed: Mapping[str, np.ndarray] | None = None,
    reference: ReferenceOutputs | None = None,
    names: Sequence[str] = (),
) -> Proof:
    """Verify a file.

    Args:
      shipped: the file, read back.
      record: what its layers are to be; of the model if there is one, else its own.
      leaves: the parameters in the file's form, by path.
      show: takes the progress.
      computed: kernels that are computed from parameters, by layer.
      reference: the model's outputs, for the whole file.
      names: the outputs that the file has, as the reference names them.
    """
    failures, notes, proofs = [], [], []
    mine = {layer.name: layer for layer in shipped.layers()}
    wanted = [layer.name for layer in record.layers]
    for name in wanted:
        if name not in mine:
            failures.append(f"the file has no layer {name!r}")
    for name in mine:
        if name not in wanted:
            failures.append(f"the file has a layer {name!r} that the model has not")
    for done, layer in enumerate(record.layers):
        show(f"{shipped.runtime}: exact layers", done, len(record.layers))
        if layer.name in mine:
            found = mine[layer.name]
            proofs.append(_prove_layer(shipped, layer, found, leaves, computed or {}))
    show(f"{shipped.runtime}: exact layers", len(record.layers), len(record.layers))
    made_of = sorted({leaf for layer in record.layers for leaf in layer.made_of})
    if made_of:
        notes.append(f"computed from parameters, not their bits: {', '.join(made_of)}")
    if not any(proof.failures for proof in proofs):
        notes += shipped.remarks(record)
    lost, count = _other_constants(shipped, record, leaves)
    wrong, doubtful = about_parameters(record, leaves, lost)
    failures += [*wrong, *lost.values()]
    notes += doubtful
    outputs: tuple[WorkingError, ...] = ()
    if reference is not None and shipped.executed:
        show(f"{shipped.runtime}: the whole file", 0, 1)
        try:
            outputs = whole_errors(shipped, reference, names)
            failures += [
                f"no entry of {path!r} is finite: nothing was compared"
                for path, exact in reference.exact
                if exact.size and not np.isfinite(exact).any()
            ]
        except (RuntimeError, ValueError) as error:
            failures.append(f"the file does not run: {first_line(error)}")
        show(f"{shipped.runtime}: the whole file", 1, 1)
    return Proof(tuple(proofs), outputs, count, tuple(failures), tuple(notes))


def about_parameters(
    record: FileRecord, leaves: Mapping[str, np.ndarray], lost: Container[str] = ()
) -> tuple[list[str], list[str]]:
    """Return what is wrong with the parameters but those that are lost, and notes.

    Those that are not a layer's kernel or bias must have the record's digests. Files
    with the same NaN agree bit by bit, and show nothing: some number must be finite.
    """
    failures, notes = _not_finite(record, leaves)
    return failures + _other_digests(record, leaves, lost), notes


def _not_finite(
    record: FileRecord, leaves: Mapping[str, np.ndarray]
) -> tuple[list[str], list[str]]:
    """A failure if no number of the parameters is finite, a note if some are not."""
    named = [s for layer in record.layers for s in (layer.kernel, layer.bias) if s]
    names = {source.leaf for source in (*named, *record.constants)}
    names |= {leaf for layer in record.layers for leaf in layer.made_of}
    names |= {name for name, _ in record.digests}
    arrays = [leaves[name] for name in sorted(names & leaves.keys())]
    floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    total = sum(a.size for a in floats)
    bad = total - sum(int(np.isfinite(a).sum()) for a in floats)
    if total and bad == total:
        return ["no number of the parameters is finite: nothing was compared"], []
    share = f"{bad:,} of {total:,} numbers of the parameters are NaN or infinite"
    return [], [share] if bad else []


def _prove_layer(
    shipped: Shipped,
    layer: Layer,
    found: ShippedLayer,
    leaves: Mapping[str, np.ndarray],
    computed: Mapping[str, np.ndarray],
) -> LayerProof:
    failures = []
    kernel, bias = expected(layer, leaves)
    if kernel is None:
        kernel = computed.get(layer.name)
    bits: bool | None = None if layer.kernel is None else True
    for what, want, got in (
        ("kernel", kernel, found.kernel),
        ("bias", bias, found.bias),
    ):
        if want is None:
            continue
        why = _other_bits(want, got)
        if why is not None:
            bits = False
            failures.append(f"its {what} {why}")
    if layer.form != found.form:
        failures.append(f"expected {layer.op}, the file has {found.op}")
    failures += shipped.geometry_failures(layer)
    exact, count, why = on_integers(shipped, layer, found.kernel.dtype.itemsize < 4)
    failures += why
    return LayerProof(
        *(layer.name, found.op, found.form, bits, exact, count, tuple(failures)),
        stored=layer.stored,
        constant=layer.constant,
        folded=layer.folded is not None,
    )


def on_integers(
    shipped: Shipped, layer: Layer, half: bool = False
) -> tuple[bool | None, int, Sequence[str]]:
    """Return whether a layer of a file equals integer arithmetic.

    Args:
      shipped: the file.
      layer: which.
      half: whether its numbers have 16 bits, which hold small integers only.

    Returns:
      Whether it does, None where it was not run; the number of draws; what is wrong.
    """
    failures: list[str] = []
    exact, count = None, 0
    try:
        draws = small_probes(layer) if half else probes(layer)
        for probe in draws if shipped.executed else ():
            count += 1
            want = compute(layer, probe.x, probe.kernel, probe.bias)
            got = shipped.run_layer(layer, probe.x, probe.kernel, probe.bias)
            why = _difference(want, got)
            exact = why is None
            if why is not None:
                of_precision = "" if half else _of_precision(shipped, layer)
                failures.append(f"on integers: {why}{of_precision}")
                break
    except (ExportError, RuntimeError, ValueError) as error:
        exact = False
        failures.append(f"it does not run on its own: {first_line(error)}")
    return exact, count, failures


def _of_precision(shipped: Shipped, layer: Layer) -> str:
    """Add a note if only entries of many bits differ."""
    for probe in small_probes(layer):
        want = compute(layer, probe.x, probe.kernel, probe.bias)
        got = shipped.run_layer(layer, probe.x, probe.kernel, probe.bias)
        if _difference(want, got) is not None:
            return ""
    return (
        f"; small integers are exact and those of 12 bits are not: {shipped.runtime} "
        "lowers the precision here without being asked"
    )


def _other_bits(want: np.ndarray, got: np.ndarray | None) -> str | None:
    if got is None:
        return "is not in the file"
    if want.shape != got.shape or want.dtype != got.dtype:
        return (
            f"should be {want.dtype}{list(want.shape)}, the file has "
            f"{got.dtype}{list(got.shape)}"
        )
    # As bytes: NaN doesn't equal itself, and -0 equals 0.
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(-1) for x in (want, got))
    if np.array_equal(a, b):
        return None
    # The first number to show is one whose value differs: two NaN differ in bits alone.
    off = np.argwhere((want != got) & ~((want != want) & (got != got)))
    if not len(off):
        return "has other bits (of a zero or a NaN)"
    index = tuple(int(i) for i in off[0])
    return (
        f"has other bits: expected {want[index].item()!r} at {index}, got "
        f"{got[index].item()!r} ({len(off)} of {want.size} entries differ)"
    )


def _difference(want: np.ndarray, got: np.ndarray) -> str | None:
    if want.shape != got.shape:
        return f"expected shape {want.shape}, got {got.shape}"
    off = np.argwhere(got.astype(np.float64) != want)
    if not len(off):
        return None
    index = tuple(int(i) for i in off[0])
    return (
        f"expected {int(want[index])} at {index}, got {got[index].item():.9g} "
        f"({len(off)} of {want.size} differ)"
    )


def _other_digests(
    record: FileRecord, leaves: Mapping[str, np.ndarray], lost: Container[str]
) -> list[str]:
    """Return a failure for each parameter that isn't the one the file was made from."""
    found = []
    for name, digest in record.digests:
        if name in lost:
            continue
        if name not in leaves:
            found.append(f"the checkpoint lacks {name!r}, which the file depends on")
        elif digest_of(leaves[name]) != digest:
            found.append(f"parameter {name!r} is not the one the file was made from")
    return found


def _other_constants(
    shipped: Shipped, record: FileRecord, leaves: Mapping[str, np.ndarray]
) -> tuple[dict[str, str], int]:
    """Find the other parameters among the file's constants; return failures, count."""
    have = {np.ascontiguousarray(x).tobytes() for x in shipped.constants()}
    lost, count = dict[str, str](), 0
    for source in record.constants:
        if source.leaf not in leaves:
            lost[source.leaf] = f"the checkpoint lacks {source.leaf!r}"
            continue
        want = np.ascontiguousarray(source.apply(leaves[source.leaf]))
        count += 1
        if want.tobytes() not in have:
            lost[source.leaf] = (
                f"parameter {source.leaf!r} is in no constant of the file bit by bit"
            )
    return lost, count


def whole_errors(
    shipped: Shipped, reference: ReferenceOutputs, names: Sequence[str] = ()
) -> tuple[WorkingError, ...]:
    """Return the errors of a file and of the model itself against the reference."""
    got = shipped.run(reference.inputs)
    paths = [path for path, _ in reference.exact]
    kept = [paths.index(name) for name in names] if names else range(len(paths))
    if len(got) != len(kept):
        raise ValueError(f"expected {len(kept)} outputs, got {len(got)} in the file")
    return tuple(
        working_errors(
            "outputs",
            [reference.exact[i] for i in kept],
            [[run[i] for i in kept] for run in reference.own],
            got,
        )
    )


def whole_error(
    shipped: Shipped, reference: ReferenceOutputs, names: Sequence[str]
) -> float:
    """Return the largest error of a file against the reference."""
    errors = whole_errors(shipped, reference, names)
    return max((error.converted for error in errors), default=0.0)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
