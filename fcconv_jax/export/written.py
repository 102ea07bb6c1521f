"""A file with what it was written from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..frontends.bound import BoundModel
from ..plan import Plan
from ..plan.rules import Rule
from .chips import Chip
from .forms import FileForm
from .graph import Graph
from .record import FileRecord
from .runtimes import Runtime


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A file with what it was written from."""

    path: Path
    form: str
    plan: Plan
    graph: Graph
    record: FileRecord
    leaves: Mapping[str, np.ndarray]
    computed: Mapping[str, np.ndarray]


class Call(Protocol):
    """A model on its inputs, on its way to a runtime."""

    chip: Chip | None
    runtime: Runtime
    bound: BoundModel
    input_names: list[str]

    def plan(self, form: FileForm, rules: Sequence[Rule]) -> Plan:
        """Return the plan of a form."""
        ...

    def write(self, plan: Plan, form: str, path: Path) -> Written:
        """Write a file."""
        ...
