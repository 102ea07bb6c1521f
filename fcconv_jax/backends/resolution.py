"""What can be done about a backend here: execute, compile ahead of time, or lower."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from typing import Any, Literal

import jax

from ..messages.extras import install_command
from .name import Backend, Platform, jax_platform

How = Literal["executed", "compiled", "lowered"]


@dataclasses.dataclass(frozen=True)
class Resolution:
    """How far a backend can be checked on this machine.

    Attributes:
      backend: which one.
      how: 'executed' on a device that is present, 'compiled' ahead of time without
        one, or only 'lowered' to StableHLO.
      reason: why it is not more.
      device: the device, where it is present.
    """

    backend: Backend
    how: How
    reason: str = ""
    device: Any = dataclasses.field(default=None, compare=False, repr=False)


def resolve(backend: str | Backend) -> Resolution:
    """Find out what this machine can do for a backend.

    Raises:
      BackendError: the backend is unknown.

    Example:
      >>> resolve("cpu").how, resolve("rocm").how
      ('executed', 'lowered')
    """
    backend = Backend.parse(backend)
    devices = present(backend)
    if len(devices) >= backend.size:
        return Resolution(backend, "executed", device=devices[0])
    absent = f"no {backend} device is present"
    if devices:
        absent = f"only {len(devices)} of the {backend.size} devices are present"
    missing = missing_extra(backend.platform)
    if missing:
        return Resolution(backend, "lowered", f"{absent}, and {missing}")
    return Resolution(backend, "compiled", absent)


def resolve_default() -> Resolution:
    """Return the platform and the device that JAX uses by default.

    Example:
      >>> resolve_default().how
      'executed'
    """
    device = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore
    platform: Any = jax_platform(device)
    return Resolution(Backend(platform), "executed", device=device)


def present(backend: Backend) -> list[Any]:
    """Return the devices of this process that are such ones."""
    try:
        devices = jax.devices(_pjrt(backend))
    except RuntimeError:  # no such platform here, or JAX_PLATFORMS hides it
        return []
    return [device for device in devices if backend.describes(device)]


def missing_extra(platform: Platform) -> str:
    """Return what to install to compile ahead of time; '' if nothing.

    Example:
      >>> missing_extra("rocm")
      'ROCm programs cannot be compiled without a device'
    """
    if platform == "rocm":
        return "ROCm programs cannot be compiled without a device"
    if platform == "cpu":
        return "JAX was told to leave out its CPU backend (JAX_PLATFORMS)"
    needed = {
        "tpu": {"libtpu": _installed("libtpu")},
        "cuda": {
            "the CUDA plugin of JAX": any(
                _installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
            ),
            "ptxas": shutil.which("ptxas") is not None
            or _installed("nvidia.cuda_nvcc")
            or _installed("nvidia.cu13"),
        },
    }[platform]
    needed["flatbuffers"] = _installed("flatbuffers")
    absent = [name for name, there in needed.items() if not there]
    if not absent:
        return ""
    return (
        f"compiling for it ahead of time needs {' and '.join(absent)}: "
        f"{install_command(f'{platform}-aot')}"
    )


def _pjrt(backend: Backend) -> str:
    # JAX has one name for both; the device's client shows which it is.
    return "gpu" if backend.platform in ("cuda", "rocm") else backend.platform


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    # A parent package of the module is missing.
    except ModuleNotFoundError:
        return False
