"""An exact certificate that two forms of a layer are the same multilinear map.

Both forms are compiled and fed small integers, chosen so that every partial sum is
exactly representable in the arithmetic that was measured on the device. No rounding,
so no tolerance: every difference is a defect.

**Random probes.** An output is a polynomial in the entries of x, kernel and bias, of
degree at most one in each and with at most one x and one kernel factor in a term. If
the polynomials of the two forms differ, a probe drawn uniformly from m integers misses
it with probability at most 2/m (Schwartz 1980, Zippel 1979): the coefficient of some
x_i (or of 1) is a nonzero polynomial of degree one in kernel and bias and vanishes with
probability at most 1/m; where it does not, the value vanishes for at most one x_i. Only
draws with a fresh kernel count as independent. When the output is too narrow for a
dense x (bf16 holds integers to 256), the entries of x are split into classes, few to
each sum, and one kernel draw runs each class once: entry x_i is drawn uniformly
in one of them, so the same 2/m holds, for that is all that the argument needs.

**Wide draws.** Long sums leave only entries of few bits, which bfloat16 or TF32 would
keep too: a backend that lowers the precision of one form, for some shapes only, would
pass. So each side of the products is also drawn from integers of 12 bits, the other
from -1, 0 and 1, wherever the arithmetic that was measured promises to keep them.

**Placement.** For small layers, x runs over the one-hot vectors and the kernel's
entries are their own numbers (in digits, where the dtype is too narrow). Under the
premise that each output is then one kernel entry or zero, and that all examples of a
batch are treated alike, agreement is a proof.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..backends.name import Device
from ..tracing import jaxprs
from .arithmetic import (
    Arithmetic,
    Contraction,
    measure_precision,
    unit_roundoff,
)
from .compiling import BackgroundProgram
from .integer_draws import (
    integer_limit,
    number_classes,
    placement_draws,
    plan_draws,
    plan_wide_draws,
    random_draws,
    wide_draws,
)


def prepare_certificate(
    source_form: Callable[[Any, Any, Any], Any],
    target_form: Callable[[Any, Any, Any], Any],
    *,
    x: jax.ShapeDtypeStruct,
    kernel: jax.ShapeDtypeStruct,
    bias: jax.ShapeDtypeStruct | None = None,
    map_kernel: Callable[[Any], Any],
    map_bias: Callable[[Any], Any] = lambda bias: bias,
    reduction: int,
    reduction_index: np.ndarray | None = None,
    probes: int | None = None,
    precision: PrecisionLike = None,
    seed: int = 0,
    device: Device | None = None,
) -> Callable[[], Certificate]:
    """Check ``source_form(x, k, b) == target_form(x, map_kernel(k), map_bias(b))``.

    Both forms compile in the background until the result is called.

    Args:
      source_form: the layer as it is, a function of x, kernel and bias (None without).
      target_form: the layer in the other form; outputs of the same shape and dtype.
      x: shape ``(N, *rest)`` and dtype of the input.
      kernel: shape and dtype of the source's kernel.
      bias: shape and dtype of the source's bias.
      map_kernel: the source's kernel to the target's.
      map_bias: the source's bias to the target's.
      reduction: number of matmuls summed into one output.
      reduction_index: integers of shape ``rest``; no output may sum two entries of x
        of the same index in [0, reduction). Only used where x has to be sparse; without
        it, and unless the last axis is a multiple of the reduction or x as a whole is
        one reduction, at most a few entries of a whole example are nonzero, and a
        large x takes many calls.
      probes: kernel draws; None takes as many as bring the probability of a miss to
        1e-9.
      precision: the precision that the forms ask for.
      seed: seeds the draws.
      device: where to run; None is JAX's default device.

    Returns:
      A function that runs the probes and gives the certificate; ``passed`` is False
      with the first mismatch if there is one.

    Raises:
      ValueError: the dtype cannot hold even sums of two matmuls exactly, or
        ``reduction_index`` has the wrong shape.

    Example:
      >>> import jax
      >>> certificate = prepare_certificate(
      ...     lambda x, k, b: x @ k + b,
      ...     lambda x, k, b: (x[:, None] @ k[0] + b)[:, 0],
      ...     x=jax.ShapeDtypeStruct((2, 6), "float32"),
      ...     kernel=jax.ShapeDtypeStruct((6, 3), "float32"),
      ...     bias=jax.ShapeDtypeStruct((3,), "float32"),
      ...     map_kernel=lambda k: k[None],
      ...     reduction=6,
      ... )()
      >>> certificate.passed, certificate.proved, certificate.miss_probability < 1e-9
      (True, True, True)
    """
    shapes = (x, kernel, bias)
    mapped = jax.eval_shape(lambda k, b: (map_kernel(k), map_bias(b)), kernel, bias)
    source = BackgroundProgram(source_form, *_placed(shapes, device))
    target = BackgroundProgram(target_form, *_placed((x, *mapped), device))
    out, other = source.out_info, target.out_info
    matmuls = [found for form in (source, target) for found in _matmuls(form.jaxpr)]
    arithmetic = _arithmetic(matmuls, x.dtype, out.dtype, precision, device)
    held = [*(s.dtype for s in shapes if s is not None)]
    held += [dtype for matmul in matmuls for dtype in matmul.operands]
    sums = [out.dtype, *(matmul.out for matmul in matmuls)]
    limits = min(map(integer_limit, held)), min(map(integer_limit, sums))
    plan = plan_draws(arithmetic, limits, reduction, probes)
    classes = number_classes(x, reduction, reduction_index, plan)
    wide = plan_wide_draws(arithmetic, limits, reduction)
    wide_classes = wide and number_classes(x, reduction, reduction_index, wide)
    wrong = None
    if (out.shape, out.dtype) != (other.shape, other.dtype):
        wrong = Mismatch(
            (), f"{other.dtype}{other.shape}", f"{out.dtype}{out.shape}", "shapes"
        )

    def run() -> Certificate:
        mismatch = wrong
        rng = np.random.default_rng(seed)
        random = random_draws(rng, shapes, plan, classes)
        large = wide_draws(rng, shapes, wide, wide_classes)
        placement = list(placement_draws(shapes, plan)) if not mismatch else []
        seen = 0
        kinds = (("placement", placement), ("random", random), ("12-bit", large))
        for kind, draws in kinds:
            for number, (xs, k, b) in enumerate(draws):
                if mismatch:
                    break
                xs, k = _put(xs, x, device), _put(k, kernel, device)
                b = None if bias is None else _put(b, bias, device)
                want = np.asarray(source(xs, k, b))
                got = np.asarray(target(xs, map_kernel(k), map_bias(b)))
                mismatch = _first_mismatch(want, got, f"{kind} probe {number}")
                seen += 1
        return Certificate(
            passed=mismatch is None,
            proved=mismatch is None and bool(placement),
            probes=plan.probes,
            calls=seen,
            set_size=plan.set_size,
            miss_probability=min(1.0, (2 / plan.set_size) ** plan.probes),
            dtype=str(jnp.dtype(x.dtype)),
            arithmetic=arithmetic,
            mismatch=mismatch,
        )

    return run


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """The first entry in which the two forms differ.

    Attributes:
      index: where in the output; () when the shapes differ.
      got: what the target form gave there.
      want: what the source form gave there.
      probe: the probe that showed it.
    """

    index: tuple[int, ...]
    got: complex | bool | str
    want: complex | bool | str
    probe: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Result of an exact comparison of two forms.

    Attributes:
      passed: no probe showed a difference.
      proved: every kernel entry was also seen at its place (see the module).
      probes: independent kernel draws.
      calls: how often each form ran.
      set_size: number of integers that every entry is drawn from.
      miss_probability: bound on the probability that all probes miss a difference.
      dtype: dtype of the input.
      arithmetic: what was measured on the device, and made the sums exact.
      mismatch: the first difference, or None.
    """

    passed: bool
    proved: bool
    probes: int
    calls: int
    set_size: int
    miss_probability: float
    dtype: str
    arithmetic: Arithmetic
    mismatch: Mismatch | None

    def __str__(self) -> str:
        if self.mismatch is not None:
            m = self.mismatch
            return (
                f"DIFFERENT in {self.dtype} ({m.probe}): expected {m.want}, "
                f"got {m.got} at {m.index}"
            )
        proof = "every kernel entry at its place, and " if self.proved else ""
        return (
            f"bit-identical in {self.dtype}: {proof}{self.probes} draws from "
            f"{self.set_size} integers miss a difference with probability at most "
            f"{self.miss_probability:.1e}"
        )


@dataclasses.dataclass(frozen=True)
class _Product:
    """The products that a form needs of a dot or a convolution."""

    form: Contraction
    operands: tuple[DTypeLike, ...]
    out: DTypeLike
    precision: PrecisionLike


def _matmuls(jaxpr: jaxprs.AnyJaxpr) -> Iterator[_Product]:
    """Yield the dots and convolutions of a trace, wherever they are."""
    forms: dict[str, Contraction] = {
        "dot_general": "dot",
        "conv_general_dilated": "conv",
    }
    for eqn in jaxprs.opened(jaxpr)[0].eqns:
        form = forms.get(eqn.primitive.name)
        if form is not None:
            yield _Product(
                form,
                tuple(v.aval.dtype for v in eqn.invars),
                eqn.outvars[0].aval.dtype,
                eqn.params["precision"],
            )
        for _, inner in jaxprs.subjaxprs(eqn):
            yield from _matmuls(inner)


def _arithmetic(
    matmuls: Sequence[_Product],
    x: DTypeLike,
    out: DTypeLike,
    precision: PrecisionLike,
    device: Device | None,
) -> Arithmetic:
    """Return the worst of what the matmuls of both forms do, measured on the device."""
    found = Arithmetic(0.0, 0.0, unit_roundoff(out))
    if not matmuls:  # none of lax's own: take it for either
        forms: tuple[Contraction, ...] = ("dot", "conv")
        matmuls = [_Product(form, (x,), x, precision) for form in forms]
    # Both forms, and many layers, share kinds of products: each is measured once.
    for matmul in dict.fromkeys(matmuls):
        measured = measure_precision(
            functools.reduce(jnp.promote_types, matmul.operands),
            form=matmul.form,
            precision=matmul.precision,
            out=matmul.out,
            device=device,
        )
        found = found.worse(measured)
    return found


def _placed(shapes: PyTree, device: Device | None) -> Any:
    if device is None:
        return shapes
    where = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes
    )


def _put(
    values: np.ndarray, like: jax.ShapeDtypeStruct, device: Device | None
) -> jax.Array:
    return jax.device_put(np.asarray(values).astype(like.dtype), device)


def _first_mismatch(want: np.ndarray, got: np.ndarray, probe: str) -> Mismatch | None:
    # Integers have one representation, but zero has a sign, which doesn't count.
    wrong = np.argwhere(want != got)
    if not len(wrong):
        return None
    index = tuple(int(i) for i in wrong[0])
    return Mismatch(index, got[index].item(), want[index].item(), probe)
