"""Released versions of XLA whose CPU backend is known to compute wrong results."""

from __future__ import annotations

import dataclasses

import jaxlib.version


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of XLA's CPU backend.

    Args:
      what: comes out wrong.
      first: jaxlib version that has it.
      fixed: jaxlib version that does not have it any more; None if none is known.
      handled: what this package does about it.
      test: shows that the fault is still there, so fails once it can be struck out.
    """

    what: str
    first: tuple[int, ...]
    fixed: tuple[int, ...] | None
    handled: str
    test: str

    def is_in(self, version: str) -> bool:
        """Return whether a jaxlib version, such as ``"0.10.2"``, has the fault."""
        have = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        return self.first <= have and (self.fixed is None or have < self.fixed)


POOL = Fault(
    "a max pool behind an addition that broadcasts, of some shapes, in YNNPACK",
    *((0, 10), (0, 11)),
    "slide compiles its own programs without YNNPACK",
    "tests/backends/test_faults.py::test_a_pool_behind_an_addition",
)
PACKED = Fault(
    "a transpose, pad or gather of entries of 2 or 4 bits, which writes past them",
    *((0, 7), (0, 8)),
    "refused by name",
    "tests/backends/test_faults.py::test_packed_integers",
)
STALE = Fault(
    "a matmul in XNNPACK, which reads the previous kernel where the next one lies at "
    "the same address; set XLA_FLAGS=--xla_cpu_use_xnnpack=false before importing jax",
    *((0, 7), (0, 8, 3)),
    "verify, slide, tune and converted models compile without XNNPACK",
    "tests/backends/test_faults.py::test_a_matmul_with_another_kernel",
)
CROP = Fault(
    "a convolution with negative padding, of some shapes, which reads what the padding "
    "crops",
    *((0, 7), None),
    "phases slices its input; in your own model, slice before the convolution",
    "tests/backends/test_faults.py::test_a_convolution_with_negative_padding",
)
FAULTS = (POOL, PACKED, STALE, CROP)


def cpu_notes(version: str = jaxlib.version.__version__) -> list[str]:
    """Return a sentence on each fault of a jaxlib version that a later one lacks.

    Example:
      >>> cpu_notes("0.9.2")
      []
    """
    return [
        f"jaxlib {version} on CPU is known to compute wrongly: {fault.what} "
        f"({fault.handled})"
        for fault in FAULTS
        if fault.is_in(version) and fault.fixed is not None
    ]
