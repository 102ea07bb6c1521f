"""verify on named backends: it says what was done about each, and claims no more."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.backends import compilation
from fcconv_jax.backends.name import Backend
from fcconv_jax.backends.resolution import Resolution
from fcconv_jax.messages.errors import BackendError
from fcconv_jax.verification import verify as verify_module


@pytest.fixture(scope="module")
def case():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    return model, model.init(jax.random.key(0), x), x, fc.make_plan(model, x)


@pytest.fixture(scope="module")
def report(case):
    model, variables, x, plan = case
    return fc.verify(
        model, variables, x, plan=plan, backends=["cpu", "rocm"], gradients=False
    )


def test_executed_and_lowered(report):
    cpu, rocm = report.backends
    assert report.passed
    assert (cpu.how, rocm.how) == ("executed", "lowered")
    assert cpu.milliseconds["original"] > 0
    assert cpu.milliseconds["converted"] > 0
    assert rocm.milliseconds == {}
    for found in (cpu, rocm):
        stablehlo = [found.original.stablehlo, found.converted.stablehlo]
        assert [(c.dots, c.convolutions) for c in stablehlo] == [(1, 0), (0, 1)]
    figures = cpu.figures
    flops = figures["flops"]
    assert flops["ratio"] == flops["converted"] / flops["original"]
    assert rocm.figures["flops"] == {"original": None, "converted": None, "ratio": None}


def test_the_texts_say_what_was_done(report):
    text, markdown = str(report), report.to_markdown()
    assert text.startswith("EQUIVALENT: 1 layer to conv, on cpu (cpu)")
    assert "(executed: cpu; lowered: rocm)" in text
    for shown in (text, markdown):
        assert "rocm: lowered to StableHLO, neither compiled nor executed" in shown
        assert re.search(r"converted +\|? *\S*0 ", shown)
    (table,) = re.findall(
        r"(?:^\| .*\n)+", markdown[markdown.index("| backend") :], re.M
    )
    rows = table.splitlines()
    assert len(rows) == 2 + 3 * 2
    assert len({row.count("|") for row in rows}) == 1
    content = json.loads(report.to_json())
    assert [b["how"] for b in content["backends"]] == ["executed", "lowered"]
    assert content["backends"][1]["figures"]["dots"]["original"] == 1
    assert "text" not in json.dumps(content["backends"])


def test_nothing_executed_claims_nothing_more(case):
    model, variables, x, plan = case
    report = fc.verify(model, variables, x, plan=plan, backends=["rocm"])
    assert report.passed
    assert not report.executed
    assert str(report).startswith("LOWERED, NOT EXECUTED: 1 layer to conv, for rocm")
    assert (report.layers, report.arrays, report.executions) == ((), (), ())
    assert "EQUIVALENT" not in str(report) + report.to_markdown()


def test_abstract_params_where_nothing_is_executed(case):
    model, variables, x, plan = case
    shapes = jax.eval_shape(lambda: (variables, x))
    report = fc.verify(model, shapes[0], shapes[1], plan=plan, backends=["rocm"])
    assert report.passed
    assert "same bits" not in str(report)
    with pytest.raises(TypeError, match="Expected arrays to execute on cpu"):
        fc.verify(model, shapes[0], x, plan=plan, backends=["rocm", "cpu"])


def test_wrong_params_fail_though_nothing_is_executed(case):
    model, variables, x, plan = case
    wrong = jax.tree.map(lambda leaf: leaf + 1, fc.convert_params(variables, plan))
    report = fc.verify(
        model, variables, x, plan=plan, converted_params=wrong, backends=["rocm"]
    )
    assert not report.passed
    assert str(report).startswith("FAILED: ")


def test_the_original_stands_first_whichever_way_the_plan_goes():
    model, x = nn.Conv(3, (1, 1)), jnp.ones((2, 4, 4, 2))
    variables, plan = (
        model.init(jax.random.key(0), x),
        fc.make_plan(model, x, to="dense"),
    )
    (rocm,) = fc.verify(model, variables, x, plan=plan, backends=["rocm"]).backends
    before, after = rocm.original.stablehlo, rocm.converted.stablehlo
    assert (before.dots, before.convolutions) == (0, 1)
    assert (after.dots, after.convolutions) == (1, 0)


def test_what_cannot_be_compiled_fails_and_names_its_backend(case, monkeypatch):
    model, variables, x, plan = case
    monkeypatch.setattr(
        verify_module, "resolve", lambda b: Resolution(Backend.parse(b), "compiled")
    )
    error = BackendError("tpu:v4: the ahead-of-time compiler failed: boom")
    monkeypatch.setattr(
        compilation.Compiling, "__init__", lambda self, *args, **kwargs: None
    )
    monkeypatch.setattr(compilation.Compiling, "__enter__", lambda self: self)
    monkeypatch.setattr(compilation.Compiling, "__exit__", lambda self, *exc: None)
    monkeypatch.setattr(
        compilation.Compiling, "results", lambda self: {Backend.parse("tpu:v4"): error}
    )
    report = fc.verify(model, variables, x, plan=plan, backends=["tpu:v4"])
    assert not report.passed
    assert report.failures == (str(error),)
    assert "tpu:v4: FAILED" in str(report)
    assert "| tpu:v4 | failed |" in report.to_markdown()


def test_a_second_device_is_reported_in_full(case, monkeypatch):
    # Stands for a second kind of device: the same one under another name.
    model, variables, x, plan = case
    device = jax.devices()[0]
    monkeypatch.setattr(
        verify_module,
        "resolve",
        lambda b: Resolution(Backend.parse(b), "executed", device=device),
    )
    wrong = jax.tree.map(lambda leaf: leaf + 1, fc.convert_params(variables, plan))
    report = fc.verify(
        model,
        variables,
        x,
        plan=plan,
        backends=["cpu", "tpu:v4"],
        converted_params=wrong,
        gradients=False,
    )
    assert [e.backend for e in report.executions] == ["cpu", "tpu:v4"]
    assert all(
        e.certificates["" if "" in plan else "fc"].passed for e in report.executions
    )
    assert "tpu:v4: 1 of 1 layers exact" in str(report)
    assert any(f.startswith("'output': expected") for f in report.failures)
    assert len(json.loads(report.to_json())["executions"]) == 2


def test_names_are_checked_before_any_work(case):
    model, variables, x, plan = case
    with pytest.raises(BackendError, match="no backend 'npu'"):
        fc.verify(model, variables, x, plan=plan, backends=["cpu", "npu"])
    with pytest.raises(BackendError, match="Expected a backend, got none"):
        fc.verify(model, variables, x, plan=plan, backends=[])


def test_inputs_are_arguments_of_what_is_compiled(case):
    model, variables, x, plan = case
    report = fc.verify(
        model, variables, np.full_like(x, 7), plan=plan, backends=["rocm"]
    )
    assert "dense<7" not in report.backends[0].original.text
