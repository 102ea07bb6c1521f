"""Converted models are pickled and copied as their originals are."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import fcconv_jax as fc


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


def call(params, x):
    return x @ params["w"]


X = np.ones((2, 5), np.float32)


def converted(kind):
    model, params = Net(), {"w": np.ones((5, 3), np.float32)}
    if kind == "linen":
        variables = model.init(jax.random.key(0), X)
        plan = fc.make_plan(model, X)
        return fc.convert_model(model, plan), fc.convert_params(variables, plan)
    plan = fc.make_plan(call, params, X)
    return fc.convert_model(call, plan), fc.convert_params(params, plan)


def run(model, params):
    return np.asarray(getattr(model, "apply", model)(params, X))


@pytest.mark.parametrize("kind", ["linen", "function"])
@pytest.mark.parametrize("used", [False, True])
def test_pickles_and_copies(kind, used):
    model, params = converted(kind)
    want = run(*converted(kind))
    if used:
        run(model, params)
    for make in (pickle.dumps, copy.deepcopy, copy.copy):
        again = make(model)
        again = pickle.loads(again) if isinstance(again, bytes) else again
        assert again.plan == model.plan
        np.testing.assert_array_equal(run(again, params), want)


def test_a_plan_of_another_process_has_the_hash_of_this_one(tmp_path):
    """The hash of a string is another one in each process."""
    model, params = converted("linen")
    run(model, params)
    hash(model.plan)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(model.plan))
    code = (
        "import pickle, sys, fcconv_jax as fc;"
        "plan = pickle.loads(open(sys.argv[1], 'rb').read());"
        "assert hash(plan) == hash(fc.Plan.from_json(plan.to_json()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, file],
        check=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
