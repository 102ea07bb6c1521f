"""``fcconv tune``."""

import json
import re
from pathlib import Path

import numpy as np

import fcconv_jax as fc

from .commands import fails, run, save


def test_the_gain_comes_first_and_the_plan_is_written():
    line = "tune model.py:Net --input 2,8,8,1 --budget 0.5 --timings t.json"
    told = run(f"{line} --out tuned.json")
    first, *rest = told.stdout.splitlines()
    assert re.fullmatch(r"[01]\.\d\dx: \S+ -> \S+ \w+ on cpu.*", first)
    assert any(row.startswith("fc1 ") for row in rest)
    assert told.stderr.endswith("wrote tuned.json\n")
    plan = fc.Plan.from_json(Path("tuned.json").read_text())
    assert plan.tuning is not None
    content = json.loads(run(f"{line} --json").stdout)
    assert content["ratio"] == plan.tuning.ratio <= 1
    assert fc.Plan.from_json(json.dumps(content["plan"])) == plan
    run("verify model.py:Net --input 2,8,8,1 --no-gradients")


def test_what_it_cannot_do_is_one_line():
    line = "tune model.py:Net --input 2,8,8,1"
    assert "error: rocm" in run(f"{line} --for rocm", 1).stderr
    assert "cycles are estimated" in run(f"{line} --objective cycles", 1).stderr
    assert "no backend 'abacus'" in run(f"{line} --for abacus", 2).stderr


def test_params_of_a_checkpoint(params):
    save("ckpt", params)
    line = "tune model.py:Net --input 2,8,8,1 --budget 0 --objective memory"
    assert " on cpu" in run(f"{line} --params ckpt").stdout
    save("other", {**params, "fc3": {"bias": np.ones(4)}})
    fails(f"{line} --params other", "the leaf 'fc3/bias', which the model lacks")
