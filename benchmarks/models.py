"""Whole models: as they are, all in one form, and tuned.

`fc.tune` measures the forms of the model; then its plan runs afresh, in turns with the
original and with the default plans that take all layers to one form. Where norms can be
folded, so do the folded model and the plan of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
from running import Case, as_record, compare, linen, tuned

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
    ids = jnp.asarray(np.random.default_rng(0).integers(30522, size=(batch, 128)))
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
# Those whose norms inference can fold.
_NORMED = ("resnet50", "mobilenet")
# Tuned ones that are to be quicker.
_QUICKER = {"vgg16-head-8": 0.80, "vit-b-8": 0.80, "resnet50-8": 0.80}


def measure(name: str) -> dict[str, Any]:
    """Tunes a model, and measures the plan against the other forms."""
    model, variables, x = MAKE[name]()
    forms = tuned(model, variables, x)
    runs = dict(forms.runs)
    if name.startswith(_NORMED):
        function, folded = fc.fold_norms(model, variables, x)
        runs["norms folded"] = functools.partial(jax.jit(function), folded, x)
        plan = fc.tune(function, folded, x)
        runs["norms folded, tuned"] = functools.partial(
            fc.convert_model(function, plan), fc.convert_params(folded, plan), x
        )
    most = {"tuned": _QUICKER.get(name, TUNED), "all to conv": ALL_TO_CONV}
    return {
        **compare(runs, "original", most, _SECONDS),
        **as_record(forms.plan, forms.seconds),
    }


CASES: dict[str, Case] = {name: functools.partial(measure, name) for name in MAKE}
