"""A folder with a model file, as users have it, and params of the model."""

import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.verification import verify as verify_module

from .commands import KEY, MODEL, SHAPES


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder with a model file, as a user does."""
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def params():
    """Parameters of the file's Net."""
    shapes = {**SHAPES, "conv/kernel": (3, 3, 1, 3), "conv/bias": (3,)}
    tree = {}
    for number, (path, shape) in enumerate(shapes.items()):
        layer, name = path.split("/")
        values = jax.random.normal(jax.random.fold_in(KEY, number), shape)
        tree.setdefault(layer, {})[name] = np.asarray(values)
    return tree


@pytest.fixture(scope="session")
def a_report():
    """A small real report."""
    model, x = nn.Dense(2), jnp.ones((1, 3))
    plan = fc.make_plan(model, x)
    return fc.verify(model, model.init(KEY, x), x, plan=plan, gradients=False)


@pytest.fixture
def verified(monkeypatch, a_report):
    """What is handed to the library's verify, which does not run."""
    calls = []

    def record(bound, **options):
        given = {**bound.kwargs, **options}
        calls.append((bound.model, bound.variables, bound.args, given))
        return a_report

    monkeypatch.setattr(verify_module, "verify", record)
    return calls
