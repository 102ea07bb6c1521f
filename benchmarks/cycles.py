"""Whole models on TPUs that are not present: cycles that XLA estimates.

    pip install '.[tpu-aot]'

A loop's body counts once there, so that the cases are models without loops.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
from models import MAKE
from running import TPUS, Case, MissingError, as_record, bound

import fcconv_jax as fc
from fcconv_jax.backends.resolution import resolve

_QUICKER = {
    ("vit-b-8", "tpu:v5e"): 0.92,
    ("vit-b-8", "tpu:v5p"): 0.95,
    ("vit-b-8", "tpu:v6e"): 0.95,
}


def estimate(model: str, backend: str) -> dict[str, Any]:
    """Tunes a model for a TPU that is not present."""

    def shapes() -> Any:
        module, *arrays = MAKE[model]()
        made.append(module)
        return arrays

    chosen = resolve(backend)
    if chosen.how != "compiled":
        raise MissingError(f"{backend}: {chosen.reason or 'it is present'}")
    made: list[Any] = []
    params, x = jax.eval_shape(shapes)
    start = time.perf_counter()
    plan = fc.tune(made[0], params, x, backend=backend)
    seconds = time.perf_counter() - start
    assert plan.tuning is not None
    print(plan.tuning.headline(), file=sys.stderr)
    most = _QUICKER.get((model, backend), 1.0)
    return {
        "device": backend,
        "cycles": {name: figure.median for name, figure in plan.tuning.programs},
        "bounds": [bound("tuned / original", plan.tuning.ratio, most)],
        **as_record(plan, seconds),
    }


def name(model: str, backend: str) -> str:
    """What the case is called."""
    return f"{model} for {backend}"


CASES: dict[str, Case] = {
    name(model, backend): functools.partial(estimate, model, backend)
    for backend in TPUS
    for model in MAKE
    if model.endswith("-8")
}
