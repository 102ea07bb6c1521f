"""The pytest plugin, in pytest runs of its own."""

import subprocess
import sys

import pytest

import fcconv_jax as fc
from fcconv_jax.backends import resolution
from fcconv_jax.backends.name import names
from fcconv_jax.messages.extras import install_command

# The runs below forget what they import: what is heavy is imported once, here.
assert fc.verify
assert fc.make_plan
pytest_plugins = "pytester"

TESTS = """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import pytest

    import fcconv_jax as fc


    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))


    MODEL, X = Net(), jnp.arange(24.0).reshape(2, 2, 3, 2)
    PLAN, PARAMS = fc.make_plan(MODEL, X), MODEL.init(jax.random.key(0), X)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest on a file of tests; gives its result."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(test, *args):
        pytester.makepyfile(TESTS + test)
        return pytester.runpytest_inprocess(
            "-p", "fcconv_jax.pytest_plugin", "-p", "no:cacheprovider", "-rs", *args
        )

    return run


EQUIVALENT = """
    def test_net(assert_equivalent):
        report = assert_equivalent(MODEL, PARAMS, X, plan=PLAN, gradients=False)
        assert report.passed
"""


def test_each_backend_is_a_test_and_the_summary_says_how_far_it_went(run):
    result = run(EQUIVALENT, "-v", "--fcconv-backends", "cpu,rocm")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "fcconv backends: cpu, rocm",
            "*test_net[[]cpu[]] PASSED*",
            "*test_net[[]rocm[]] PASSED*",
            "*fcconv: conversions checked*",
            "1 x cpu: executed on cpu",
            "1 x rocm: lowered to StableHLO, neither compiled nor executed*",
        ]
    )


WRONG = """
    import dataclasses

    from fcconv_jax.geometry.kernels import Rearrangement

    def test_wrong_map(assert_equivalent):
        layer = PLAN["head"]
        swapped = Rearrangement((12, 2), (2, 6, 2), (1, 0, 2), (2, 3, 2, 2))
        layer = dataclasses.replace(
            layer, leaves=(("kernel", swapped), *layer.leaves[1:])
        )
        bad = dataclasses.replace(PLAN, layers=(("head", layer),))
        assert_equivalent(MODEL, PARAMS, X, plan=bad, gradients=False)
"""


def test_a_wrong_plan_fails_with_its_backend_and_layer(run):
    result = run(WRONG, "--fcconv-backends", "cpu")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*cpu: layer 'head': DIFFERENT in float32*"])


STILL_DENSE = """
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (2, 3, 2, 2))
            bias = self.param("bias", nn.initializers.zeros, (2,))
            return x @ kernel.reshape(12, 2) + bias


    class StillDense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Head(name="head")(x.reshape(x.shape[0], -1))


    def test_still_dense(assert_equivalent):
        assert_equivalent(
            MODEL, PARAMS, X, plan=PLAN, converted_model=StillDense(), gradients=False
        )
"""


def test_a_layer_that_stays_dense_fails_where_nothing_is_executed(run):
    result = run(STILL_DENSE, "--fcconv-backends", "rocm")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*rocm: planned to conv: 'head', yet the original program has 1 dots and 0 *"]
    )


def test_an_unknown_backend_is_refused_with_those_that_there_are(run):
    result = run(EQUIVALENT, "--fcconv-backends", "cpu,tpu:v9")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stderr.str()
    assert "--fcconv-backends: no backend 'tpu:v9'" in said
    assert all(name in said for name in names())


def test_no_name_at_all_is_refused(run):
    result = run(EQUIVALENT, "--fcconv-backends", "")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no backend ''" in result.stderr.str()


NAME = """
    def test_name(fcconv_backend):
        pass
"""


def test_the_configuration_file_names_backends_and_the_command_line_wins(run, pytester):
    pytester.makeini("[pytest]\nfcconv_backends = cpu rocm")
    ids = run(NAME, "--collect-only", "-q").stdout
    ids.fnmatch_lines(["*test_name[[]cpu[]]", "*test_name[[]rocm[]]"])
    ids = run(NAME, "--collect-only", "-q", "--fcconv-backends=gpu:h100").stdout
    ids.fnmatch_lines(["*test_name[[]cuda:h100[]]"])
    ids.no_fnmatch_line("*cpu*")


@pytest.mark.parametrize("installed", [(), ("tpu",), ("tpu", "cuda")])
def test_the_default_is_what_is_here_and_what_can_be_compiled_for(
    run, monkeypatch, installed
):
    monkeypatch.setattr(
        resolution,
        "missing_extra",
        lambda platform: "" if platform in installed else "pip install it",
    )
    here = ["a device"]
    monkeypatch.setattr(
        resolution, "present", lambda backend: here * (backend.platform == "cpu")
    )
    shown = run(NAME, "--collect-only", "-q").stdout.str()
    for name, there in (
        ("cpu", True),
        ("tpu:v5e", "tpu" in installed),
        ("cuda:h100", "cuda" in installed),
    ):
        assert (f"test_name[{name}]" in shown) == there


def test_a_compiler_that_is_missing_skips_with_its_install_line(run, monkeypatch):
    monkeypatch.setattr(resolution, "_installed", lambda module: False)
    result = run(EQUIVALENT, "--fcconv-backends", "tpu:v4")
    result.assert_outcomes(skipped=1)
    assert "tpu:v4" in result.stdout.str()
    assert install_command("tpu-aot") in result.stdout.str()


def test_a_test_may_choose_its_backends_itself(run):
    own = """
    @pytest.mark.parametrize("fcconv_backend", ["cpu"], indirect=True)
    def test_net(fcconv_backend):
        assert fcconv_backend == "cpu"
"""
    run(own, "--fcconv-backends", "rocm,cuda").assert_outcomes(passed=1)


def test_pytest_does_not_import_jax_for_it(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    code = (
        "import pytest, sys; "
        "pytest.main(['-q', '-p', 'fcconv_jax.pytest_plugin', "
        "'--fcconv-backends=tpu']); "
        "sys.exit([m for m in ('jax', 'flax') if m in sys.modules] or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
