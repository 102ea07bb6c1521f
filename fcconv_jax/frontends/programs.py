"""A model of any kind on fixed inputs, as functions of its variables."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ..backends.compilation import Program
from ..plan import Plan


@dataclasses.dataclass(frozen=True)
class BothForms:
    """A model and its converted form, on the same inputs."""

    plan: Plan
    original: Any
    changed: Any
    variables: Mapping[str, Any]
    other: Mapping[str, Any]

    def by_form(self) -> dict[str, Program]:
        """What is compiled, under 'original' and 'converted'."""
        return {
            "original": compilable(self.original, self.variables),
            "converted": compilable(self.changed, self.other),
        }

    def on(self, device: Any) -> BothForms:
        """The same with all arrays on one device."""
        moved = [copy.copy(program) for program in (self.original, self.changed)]
        for program in moved:
            program.arrays = jax.device_put(program.arrays, device)
        trees = jax.device_put((self.variables, self.other), device)
        return BothForms(self.plan, *moved, *trees)


def compilable(program: Any, variables: Any) -> Program:
    """A model's call as it is compiled: with its inputs as arguments, not constants."""
    return Program(program.call, (variables, program.arrays))
