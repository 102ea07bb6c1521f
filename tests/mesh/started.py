"""Starts processes that work together, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def outputs(
    program: Sequence[str], count: int, devices: int, *arguments: str
) -> list[str]:
    """Run a program once per process; return the last line that each prints.

    Args:
      program: arguments of Python, such as a file.
      count: how many processes.
      devices: CPU devices of each.
      *arguments: further ones, behind the process's number.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    started = [
        subprocess.Popen(
            [sys.executable, *program, str(number), *arguments],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    found = []
    for process in started:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for other in started:
                other.kill()
            raise
        assert process.returncode == 0, err[-3000:]
        found.append(out.splitlines()[-1])
    return found


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
