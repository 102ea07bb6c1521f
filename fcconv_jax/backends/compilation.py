"""Compiles programs for backends: on the device, ahead of time, or only lowered."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import PyTree

from ..messages.errors import BackendError
from . import processes
from .census import HLO_CYCLES, OpCounts, count_hlo, count_stablehlo
from .name import Backend
from .options import correct_options
from .relayout import relayout_bytes
from .resolution import Resolution
from .worker import describe

TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and its arguments, which may be abstract.

    Attributes:
      function: any function of PyTrees of arrays.
      args: arrays or ``jax.ShapeDtypeStruct``; their ``NamedSharding``, if they have
        one, determines how the program is partitioned over a mesh.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What became of one program.

    Attributes:
      backend: what it was compiled for, or lowered to.
      how: 'compiled' on a present device or ahead of time, or only 'lowered'.
      reason: why it was not compiled, or not on a device.
      device: kind of the device that the compiler had in mind, and how many of them
        the program is spread over.
      stablehlo: operations that were asked for.
      hlo: operations that the compiler made of them.
      flops: floating point operations; None where XLA does not count them (CUDA ahead
        of time), like the next two.
      bytes_accessed: bytes read and written.
      temp_bytes: scratch memory beyond arguments and results.
      cycles: XLA's estimate, summed over the program; TPUs only. A loop body counts
        once.
      seconds: time to compile.
      text: the compiled HLO, or the StableHLO where it was only lowered.
      executable: runs the program, where the device is present.
    """

    backend: Backend
    how: Literal["compiled", "lowered"]
    reason: str
    device: str
    stablehlo: OpCounts
    hlo: OpCounts | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    temp_bytes: int | None = None
    cycles: int | None = None
    seconds: float | None = None
    text: str = dataclasses.field(default="", repr=False)
    executable: Any = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def relayout_bytes(self) -> int | None:
        """Bytes that the program only moves to another layout; None if not compiled."""
        return None if self.hlo is None else relayout_bytes(self.text)


def compile_present(program: Program, resolution: Resolution) -> Compilation:
    """Compile a program for a device that is present."""
    one = jax.sharding.SingleDeviceSharding(resolution.device)
    # Abstract: compiling needs no copy of the arrays on the device.
    args = jax.tree.map(lambda leaf: abstract(leaf, one), program.args)
    lowered = jax.jit(program.function).trace(*args).lower()
    started = time.perf_counter()
    options = correct_options(resolution.device.platform)
    compiled = lowered.compile(compiler_options=options or None)
    seconds = time.perf_counter() - started
    return _compilation(
        resolution,
        resolution.device.device_kind,
        lowered.as_text(),
        compiled.as_text() or "",
        {"seconds": seconds, **describe(compiled)},
        compiled,
    )


class Compiling:
    """Programs on their way through the compilers of devices that are not present.

    The compilers run in processes of their own while this process does something else;
    leaving the ``with`` block ends those that are still at it.

    Args:
      programs: what to compile, by name.
      resolutions: for which backends; none of them 'executed'.
      timeout: seconds for each backend.
      progress: called with what is running, how many are done, how many there are.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        resolutions: Sequence[Resolution],
        *,
        timeout: float = TIMEOUT,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        self._exported: dict[tuple[str, str], Any] = {}
        self._texts: dict[tuple[str, str], str] = {}
        self._programs = programs
        self._resolutions = resolutions
        self._errors: dict[Backend, BackendError] = {}
        # What is only lowered needs no process: this one lowers it for the results.
        jobs = {r.backend: self._job(r) for r in resolutions if r.how == "compiled"}
        jobs = {b: job for b, job in jobs.items() if job is not None}
        self._pool = processes.Pool(jobs, timeout=timeout, progress=progress)

    def __enter__(self) -> Compiling:
        self._pool.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._pool.stop()

    def results(self) -> dict[Backend, dict[str, Compilation] | BackendError]:
        """Wait for the compilers; return an error in place of each failed program."""
        raw = self._pool.wait()
        found: dict[Backend, dict[str, Compilation] | BackendError] = {}
        for resolution in self._resolutions:
            backend = resolution.backend
            outcome = self._errors.get(backend) or raw.get(backend)
            if isinstance(outcome, BackendError):
                found[backend] = outcome
                continue
            try:
                found[backend] = {
                    name: self._result(resolution, name, outcome)
                    for name in self._programs
                }
            except BackendError as error:
                found[backend] = error
        return found

    def _job(self, resolution: Resolution) -> processes.CompileJob | None:
        backend = resolution.backend
        try:
            binaries = {
                name: _serialized(self._export(backend, name), backend)
                for name in self._programs
            }
        except BackendError as error:
            self._errors[backend] = error
            return None
        args = [program.args for program in self._programs.values()]
        return processes.CompileJob(backend.target, binaries, _mesh(args))

    def _export(self, backend: Backend, name: str) -> Any:
        # TPUs of all generations get the same program: it is lowered once a platform.
        key = (backend.platform, name)
        if key not in self._exported:
            self._exported[key] = _export(self._programs[name], backend)
        return self._exported[key]

    def _result(self, resolution: Resolution, name: str, raw: Any) -> Compilation:
        key = (resolution.backend.platform, name)
        if key not in self._texts:
            self._texts[key] = self._export(resolution.backend, name).mlir_module()
        if raw is None:
            return _lowered(resolution, self._texts[key])
        record, hlo = raw[name]
        return _compilation(
            resolution, record["device"], self._texts[key], hlo, record, None
        )


def _lowered(resolution: Resolution, stablehlo: str) -> Compilation:
    counts = count_stablehlo(stablehlo)
    return Compilation(
        resolution.backend, "lowered", resolution.reason, "", counts, text=stablehlo
    )


def _compilation(
    resolution: Resolution,
    device: str,
    stablehlo: str,
    hlo: str,
    record: Mapping[str, Any],
    executable: Any,
) -> Compilation:
    cycles = [int(number) for number in HLO_CYCLES.findall(hlo)]
    return Compilation(
        backend=resolution.backend,
        how="compiled",
        reason=resolution.reason,
        device=device,
        stablehlo=count_stablehlo(stablehlo),
        hlo=count_hlo(hlo),
        flops=_known(record["flops"]),
        bytes_accessed=_known(record["bytes_accessed"]),
        temp_bytes=record["temp_bytes"],
        cycles=sum(cycles) if cycles else None,
        seconds=record["seconds"],
        text=hlo,
        executable=executable,
    )


def _known(cost: float | None) -> float | None:
    """Return a cost, unless XLA says by a negative number that it does not know."""
    return cost if cost is not None and math.isfinite(cost) and cost >= 0 else None


def _export(program: Program, backend: Backend) -> Any:
    """Lower a program for a platform; arguments become one dict of named leaves.

    The names show in the metadata of the compiled program.

    Raises:
      BackendError: the program cannot be lowered for the platform.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(program.args)
    # Numbered, as a dict sorts its keys: the leaves keep their order.
    names = [
        f"{i:04d}:{jax.tree_util.keystr(path, simple=True, separator='/')}"
        for i, (path, _) in enumerate(leaves)
    ]
    named = {name: abstract(leaf, None) for name, (_, leaf) in zip(names, leaves)}

    def run(args: dict[str, Any]) -> list[Any]:
        operands = jax.tree.unflatten(treedef, [args[name] for name in names])
        return jax.tree.leaves(program.function(*operands))

    try:
        return export.export(jax.jit(run), platforms=[backend.platform])(named)
    except Exception as error:
        raise BackendError(
            f"{backend}: the program can't be lowered for {backend.platform} "
            f"({type(error).__name__}: {error})"
        ) from error


def _serialized(exported: Any, backend: Backend) -> bytes:
    try:
        return bytes(exported.serialize())
    except Exception as error:
        raise BackendError(
            f"{backend}: the program can't be passed to its compiler "
            f"({type(error).__name__}: {error})"
        ) from error


def abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype; the leaf's own spread over a mesh, else the given sharding."""
    own = getattr(leaf, "sharding", None)
    own = own if isinstance(own, jax.sharding.NamedSharding) else sharding
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=own)


def _mesh(trees: PyTree) -> dict[str, Any] | None:
    """Shape and axis names of the mesh that the leaves are spread over, if any."""
    for leaf in jax.tree.leaves(trees):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            mesh = sharding.mesh
            return {
                "shape": list(mesh.axis_sizes),
                "axis_names": list(mesh.axis_names),
            }
    return None
