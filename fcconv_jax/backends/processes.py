"""Runs the ahead-of-time compilers in processes of their own, a few at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ..messages.errors import BackendError
from . import worker
from .name import Backend

_POLL = 0.05
# Each takes up to a GiB.
_PROCESSES = 4
# libtpu looks for the machine that it is on, and locks it, unless told not to.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class CompileJob:
    """What one process compiles.

    Attributes:
      target: the backend, its kind known.
      programs: by name, as ``jax.export`` serialises them.
      mesh: shape and axis names, for programs that are spread over devices.
    """

    target: Backend
    programs: Mapping[str, bytes]
    mesh: Mapping[str, Any] | None

    def write(self, folder: Path) -> None:
        """Write it where the worker looks for it."""
        for name, binary in self.programs.items():
            (folder / f"{name}.bin").write_bytes(binary)
        content = {
            "programs": list(self.programs),
            "topology": topology(self.target),
            "mesh": self.mesh,
            "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore
        }
        (folder / "job.json").write_text(json.dumps(content))

    def split(self, number: int) -> list[CompileJob]:
        """At most so many jobs, with the programs dealt out in turns.

        Example:
          >>> job = CompileJob(Backend("tpu", "v4"), dict.fromkeys("abc", b""), None)
          >>> [list(part.programs) for part in job.split(2)]
          [['a', 'c'], ['b']]
        """
        items = list(self.programs.items())
        return [
            dataclasses.replace(self, programs=dict(items[first::number]))
            for first in range(min(number, len(items)))
        ]

    def read(self, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
        """Return the cost and HLO of each program, as the worker left them."""
        return {
            name: (
                json.loads((folder / f"{name}.json").read_text()),
                (folder / f"{name}.hlo").read_text(),
            )
            for name in self.programs
        }


def topology(target: Backend) -> dict[str, str]:
    """Return how ``jax.experimental.topologies`` is asked for a device.

    Example:
      >>> topology(Backend.parse("tpu:7x"))
      {'platform': 'tpu', 'topology_name': 'tpu7x:2x2x1'}
    """
    if target.platform == "tpu":
        return {"platform": "tpu", "topology_name": target.libtpu_topology()}
    file = Path(__file__).parent / "targets" / f"{target.kind}.txtpb"
    return {
        "platform": "cuda",
        "topology_name": "",
        "target_config": file.read_text(encoding="utf-8"),
        "topology": "1x1x1",
    }


class Pool:
    """Compiles jobs in processes: one a core, and four at most.

    Where there are fewer jobs than that, each is done by several processes.
    """

    def __init__(
        self,
        jobs: Mapping[Backend, CompileJob],
        *,
        timeout: float,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        self._limit = min(_PROCESSES, os.cpu_count() or 1)
        # Cores that would idle compile a part of a job each.
        parts = max(1, self._limit // max(1, len(jobs)))
        self._parts = [
            (backend, part)
            for backend, job in jobs.items()
            for part in job.split(parts)
        ]
        self._timeout = timeout
        self._progress = progress or (lambda running, done, total: None)
        self._results: dict[Backend, Any] = {}
        self._done = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begins, in the background."""
        self._thread.start()

    def wait(self) -> dict[Backend, Any]:
        """Wait for all jobs; return each :meth:`CompileJob.read`, or its error."""
        self._thread.join()
        return self._results

    def stop(self) -> None:
        """End the processes that still run."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        waiting = list(self._parts)
        running: list[_Process] = []
        try:
            while (waiting or running) and not self._stopped.is_set():
                before = len(running)
                while waiting and len(running) < self._limit:
                    running.append(_Process(*waiting.pop(0)))
                if len(running) != before:
                    self._show(running)
                for process in [p for p in running if p.finished(self._timeout)]:
                    running.remove(process)
                    self._add(process.backend, process.result())
                    self._show(running)
                time.sleep(_POLL)  # polled, to notice a stop and a timeout, too
        finally:
            for process in running:
                process.kill()

    def _add(self, backend: Backend, result: Any) -> None:
        """Keep what a process found, unless another of its job has failed."""
        self._done += 1
        known = self._results.setdefault(backend, {})
        if isinstance(result, BackendError):
            self._results[backend] = result
        elif not isinstance(known, BackendError):
            known.update(result)

    def _show(self, running: list[_Process]) -> None:
        names = ", ".join(dict.fromkeys(str(process.backend) for process in running))
        self._progress(names or "done", self._done, len(self._parts))


class _Process:
    """One worker, and the folder that it reads and writes."""

    def __init__(self, backend: Backend, job: CompileJob):
        self.backend, self.job = backend, job
        self.folder = tempfile.TemporaryDirectory(prefix="fcconv-")
        path = Path(self.folder.name)
        self.job.write(path)
        self.log = path / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                # -P: modules beside the worker must not shadow others of their name.
                [sys.executable, "-P", worker.__file__, str(path)],
                # A worker must not read what the user types for this process.
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT},
            )
        self.started = time.monotonic()
        self.late = False

    def finished(self, timeout: float) -> bool:
        if time.monotonic() - self.started > timeout and self.process.poll() is None:
            self.late = True
            self.process.kill()
            self.process.wait()
        return self.process.poll() is not None

    def result(self) -> Any:
        path = Path(self.folder.name)
        with self.folder:
            if self.process.returncode == 0:
                return self.job.read(path)
            said = path / "error.txt"
            if self.late:
                took = time.monotonic() - self.started
                return self._error(f"no end after {took:.0f} s: give a longer timeout")
            if said.exists():
                return self._error(said.read_text())
            log = self.log.read_text(errors="replace").strip().splitlines()
            tail = "\n".join(log[-5:])
            return self._error(f"it died ({self.process.returncode}): {tail}")

    def _error(self, text: str) -> BackendError:
        return BackendError(
            f"{self.backend}: the ahead-of-time compiler failed: {text}"
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()
