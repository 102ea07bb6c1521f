"""The generations of accelerators: what JAX and libtpu call them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of accelerators.

    Attributes:
      device_kinds: how JAX's ``device_kind`` of such a device may begin.
      libtpu: the name by which libtpu knows a TPU generation.
      topology: the smallest slice that libtpu knows of it.
    """

    device_kinds: tuple[str, ...]
    libtpu: str = ""
    topology: str = ""


GENERATIONS: dict[str, dict[str, Generation]] = {
    "cpu": {},
    "cuda": {
        "a100": Generation(("NVIDIA A100",)),
        "h100": Generation(("NVIDIA H100",)),
        "h200": Generation(("NVIDIA H200",)),
        "b200": Generation(("NVIDIA B200",)),
    },
    "rocm": {},
    "tpu": {
        "v2": Generation(("TPU v2",), "v2", "2x2"),
        "v3": Generation(("TPU v3",), "v3", "2x2"),
        "v4": Generation(("TPU v4",), "v4", "2x2x1"),
        "v5e": Generation(("TPU v5 lite", "TPU v5e"), "v5e", "2x2"),
        "v5p": Generation(("TPU v5p", "TPU v5"), "v5p", "2x2x1"),
        "v6e": Generation(("TPU v6 lite", "TPU v6e"), "v6e", "2x2"),
        "7x": Generation(("TPU7x",), "tpu7x", "2x2x1"),
    },
}
