"""Whole models: as they are, all in one form, and tuned.

`fc.tune` measures the forms of the model; then its plan runs afresh, in turns with the
original and with the default plans that take all layers to one form.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import networks
import numpy as np
from running import (
    Case,
    as_it_is,
    bound,
    in_form,
    largest_error,
    linen,
    make_plan,
    race,
)

import fcconv_jax as fc

_SECONDS = 20.0
# Tuned, and all to conv by the default plan, as parts of the original's time.
TUNED = 1.02
ALL_TO_CONV = 1.05
_IMAGE = (224, 224, 3)


def images(model: nn.Module, batch: int) -> Any:
    """A model of images, its variables, and images."""
    return linen(model, batch, *_IMAGE)


def texts(batch: int) -> Any:
    """BERT, its variables, and 128 tokens a text."""
    model = networks.Bert()
    ids = jax.numpy.asarray(np.random.default_rng(0).integers(30522, size=(batch, 128)))
    return model, jax.jit(model.init)(jax.random.key(0), ids), ids


_IMAGE_MODELS: dict[str, type[nn.Module]] = {
    "vgg16": networks.Vgg,
    "resnet50": networks.Resnet,
    "convnext-t": networks.Convnext,
    "vit-b": networks.Vit,
    "mixer-b": networks.Mixer,
    "mobilenet": networks.Mobilenet,
}
# What makes a model, its parameters and its input.
MAKE: dict[str, Callable[[], Any]] = {
    **{
        f"vgg16-head-{n}": functools.partial(linen, networks.Head(), n, 7, 7, 512)
        for n in (8, 1)
    },
    **{
        f"{name}-{n}": functools.partial(images, model(), n)
        for name, model in _IMAGE_MODELS.items()
        for n in (8, 1)
    },
    **{f"bert-base-{n}": functools.partial(texts, n) for n in (8, 4, 1)},
}
# Tuned ones that are to be quicker.
_QUICKER = {"vgg16-head-8": 0.80, "vit-b-8": 0.80, "resnet50-8": 0.80}


def measure(
    model: Any,
    params: Any,
    x: jax.Array,
    tuned: float = TUNED,
    all_to_conv: float = ALL_TO_CONV,
    seconds: float = _SECONDS,
) -> dict[str, Any]:
    """Tunes, and measures the plan against the original and all layers in one form.

    Args:
      model: a linen model or a function.
      params: its parameters.
      x: its input.
      tuned: the most that the tuned plan may take of the original's time.
      all_to_conv: likewise, the default plan to conv.
      seconds: of the race.
    """
    start = time.perf_counter()
    plan = fc.tune(model, params, x)
    tuning_seconds = time.perf_counter() - start
    assert plan.tuning is not None
    print(plan.tuning, file=sys.stderr)
    plans = {"all to conv": make_plan(model, params, x, "conv")}
    plans["all to dense"] = make_plan(model, params, x, "dense")
    plans = {name: each for name, each in plans.items() if len(each)} | {"tuned": plan}
    runs = {"original": as_it_is(model, params, x)}
    runs |= {name: in_form(model, params, x, each) for name, each in plans.items()}
    results = {name: np.asarray(run()) for name, run in runs.items()}
    errors = {name: largest_error(results[name], results["original"]) for name in plans}
    found = race(runs, seconds)
    most = {"tuned": tuned, "all to conv": all_to_conv}
    ms = found["milliseconds"]
    return {
        **found,
        "errors": errors,
        "bounds": [
            bound(f"{name} / original", ms[name] / ms["original"], value)
            for name, value in most.items()
            if name in ms
        ],
        "tuning_seconds": tuning_seconds,
        "options": dict(plan.options),
        "tuning": plan.tuning.content(),
    }


def _case(name: str) -> dict[str, Any]:
    return measure(*MAKE[name](), tuned=_QUICKER.get(name, TUNED))


CASES: dict[str, Case] = {name: functools.partial(_case, name) for name in MAKE}
