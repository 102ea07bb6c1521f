"""The name of a backend: parsed from ``"tpu:v5e:4x4"``, compared with devices."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any, Literal, Protocol

from ..messages.errors import BackendError
from .generations import GENERATIONS

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


class Device(Protocol):
    """A device of JAX, whose own class has no type that checkers accept."""

    platform: str
    device_kind: str
    client: Any


# What a platform alone stands for where it has to be compiled for ahead of time.
_DEFAULT_KIND = {"cuda": "h100", "tpu": "v5e"}
_ALIASES = {"gpu": "cuda", "nvidia": "cuda", "amd": "rocm"}


@dataclasses.dataclass(frozen=True)
class Backend:
    """A platform, and if it matters which device and how many.

    Attributes:
      platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
      kind: the generation, such as 'h100' or 'v5e'; None takes any that is present.
      topology: shape of the TPU slice, such as '16x16'; None for a single device.

    Example:
      >>> backend = Backend.parse("tpu:v5e:16x16")
      >>> backend.platform, backend.kind, backend.topology, str(backend)
      ('tpu', 'v5e', '16x16', 'tpu:v5e:16x16')
      >>> Backend.parse("gpu")
      Backend(platform='cuda', kind=None, topology=None)
    """

    platform: Platform
    kind: str | None = None
    topology: str | None = None

    @classmethod
    def parse(cls, text: str | Backend) -> Backend:
        """Read ``platform[:kind[:topology]]``.

        Raises:
          BackendError: the backend is unknown; lists the known ones.
        """
        if isinstance(text, Backend):
            return text
        name, *rest = text.strip().lower().split(":")
        platform: Any = _ALIASES.get(name, name)
        if platform not in GENERATIONS:
            raise _unknown(text)
        kinds = GENERATIONS[platform]
        if not rest:
            return cls(platform)
        kind, *rest = rest
        if platform == "tpu":
            # libtpu's own names: tpu7x and v7x.
            kind = kind.removeprefix("tpu")
            kind = kind if kind in kinds else kind.removeprefix("v")
        if kind not in kinds:
            raise _unknown(text)
        if not rest:
            return cls(platform, kind)
        topology = rest[0]
        if platform != "tpu" or rest[1:] or not re.fullmatch(r"\d+(x\d+)+", topology):
            raise _unknown(text)
        return cls(platform, kind, topology)

    def __str__(self) -> str:
        return ":".join(part for part in dataclasses.astuple(self) if part)

    @property
    def target(self) -> Backend:
        """The backend to compile for without a device: always of a known kind."""
        kind = self.kind or _DEFAULT_KIND.get(self.platform)
        return dataclasses.replace(self, kind=kind)

    @property
    def size(self) -> int:
        """Number of chips of the topology that was asked for; 1 without."""
        return math.prod(map(int, (self.topology or "1").split("x")))

    def libtpu_topology(self) -> str:
        """Return the topology by libtpu's name, such as ``'v5e:2x2'``."""
        kind = GENERATIONS["tpu"][self.target.kind or ""]
        return f"{kind.libtpu}:{self.topology or kind.topology}"

    def describes(self, device: Device) -> bool:
        """Return whether a device of JAX matches this backend.

        Example:
          >>> import jax
          >>> Backend.parse("tpu:v5e").describes(jax.devices("cpu")[0])
          False
        """
        if jax_platform(device) != self.platform:
            return False
        if self.kind is None:
            return True
        found = device.device_kind
        # 'TPU v5' is the beginning of 'TPU v5 lite': the longest name counts.
        matches = {
            name: max(
                (len(k) for k in kind.device_kinds if found.startswith(k)), default=0
            )
            for name, kind in GENERATIONS[self.platform].items()
        }
        return matches[self.kind] > 0 and matches[self.kind] == max(matches.values())


def jax_platform(device: Device) -> str:
    """Return the platform of a device, with 'gpu' told apart.

    Example:
      >>> import jax
      >>> jax_platform(jax.devices("cpu")[0])
      'cpu'
    """
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def names() -> tuple[str, ...]:
    """Return every backend by name, without topologies.

    Example:
      >>> "cuda:h100" in names(), "tpu:7x" in names()
      (True, True)
    """
    return tuple(
        name
        for platform, kinds in GENERATIONS.items()
        for name in (platform, *(f"{platform}:{kind}" for kind in kinds))
    )


def _unknown(text: str) -> BackendError:
    known = names()
    close = difflib.get_close_matches(text, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return BackendError(
        f"no backend {text!r}{hint} There are {', '.join(known)}; a TPU kind may be "
        "followed by a topology, as in tpu:v5e:16x16"
    )
