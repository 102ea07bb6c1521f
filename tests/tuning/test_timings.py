"""The file of measurements: shared, never lost, and refused when damaged."""

import contextlib
import json
import os
import resource
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc
from fcconv_jax.plan.tuning import Figure
from fcconv_jax.tuning.timings import Timings

ONE, OTHER = Figure(2.0, 1.5, 2.5), Figure(4.0, 3.0, 5.0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "timings.json"


@pytest.fixture
def known(file):
    Timings(file, "latency", "cpu").add({"a": ONE, "b": OTHER})
    return file


def test_figures_are_read_again_in_any_run(known):
    again = Timings(known, "latency", "cpu")
    assert (again.get("a"), again.get("b"), again.get("c")) == (ONE, OTHER, None)
    assert again.passes_over("the head", 0.0)
    assert Timings(known, "latency", "cpu").passes_over("the head", 1.0)
    assert not again.passes_over("the rest", 1.0)


def test_single_runs_are_kept_for_comparisons(file):
    Timings(file, "latency", "cpu").add({"a": Figure.of([2.0, 5.0], "race")})
    found = Timings(file, "latency", "cpu").get("a")
    assert found is not None
    assert (found.runs, found.race) == ((2.0, 5.0), "race")


def test_what_was_measured_is_never_passed_over(known):
    again = Timings(known, "latency", "cpu")
    assert again.passes_over("the head", 0.0)
    Timings(known, "latency", "cpu").finish("the head")
    later = Timings(known, "latency", "cpu")
    assert not later.passes_over("the head", 0.0)
    assert later.passes_over("the rest", 0.0)


def test_two_runs_at_once_keep_the_figures_of_both(file):
    first, second = (Timings(file, "latency", "cpu") for _ in range(2))
    first.add({"a": ONE})
    second.add({"a": OTHER, "b": OTHER})
    assert second.get("a") == ONE  # the one on disk, as the next run will read it
    first.add({"c": OTHER})
    merged = Timings(file, "latency", "cpu")
    assert [merged.get(key) for key in "abc"] == [ONE, OTHER, OTHER]


def test_a_link_stays_a_link(known, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(known)
    Timings(link, "latency", "cpu").add({"c": ONE})
    assert link.is_symlink()
    assert Timings(known, "latency", "cpu").get("c") == ONE


def test_a_full_disk_loses_nothing(known):
    before = known.read_bytes()
    timings = Timings(known, "latency", "cpu")
    with _no_larger_than(len(before) + 5), pytest.raises(fc.PlanError, match="too lar"):
        timings.add(dict.fromkeys("cdefg", ONE))
    assert known.read_bytes() == before
    assert [each.name for each in known.parent.iterdir()] == [known.name]


@contextlib.contextmanager
def _no_larger_than(size):
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


def _content(**changes):
    content = {"format": "fcconv_jax.timings", "version": 1, "figures": {}}
    content |= {"device": "latency on cpu", "no time for": [], "measured": []}
    content |= changes
    return json.dumps({key: value for key, value in content.items() if value != "-"})


def _figure(**changes):
    return _content(figures={"a": {"median": 2, "low": 1, "high": 3} | changes})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[" * 100_000, "\xff\xfe", '{"a": 1, "a": 2}'),
        *(_content(version=2), _content(format="x"), _content(device=3)),
        *(_content(figures=None), _content(figures=[]), _content(figures={"a": 1})),
        *(_content(device="-"), _content(**{"no time for": [1]})),
        *(_content(measured="-"), _content(measured=[1])),
        *(_figure(median="x"), _figure(median=None), _figure(median=True)),
        *(_figure(median=0), _figure(low=0), _figure(median=-2, low=-3)),
        *(_figure(high=float("inf")), _figure(median=float("nan"))),
        *(_figure(low=9), _figure(high=1), _figure(more=1), _figure(high=10**400)),
        *(_figure(runs=1), _figure(runs=["x"]), _figure(runs=[0]), _figure(race=1)),
        _figure(high=8.25).replace("8.25", "1e999"),
    ],
)
def test_a_damaged_file_is_one_error(file, text):
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(fc.PlanError, match=r"expected a file of timings, .*Delete it"):
        Timings(file, "latency", "cpu")


def test_only_scratch_memory_may_be_zero(file):
    nothing = Figure(0.0, 0.0, 0.0)
    Timings(file, "memory", "cpu").add({"a": nothing})
    assert Timings(file, "memory", "cpu").get("a") == nothing


def test_a_file_of_another_device_is_refused(known):
    for objective, device in (("latency", "tpu"), ("memory", "cpu")):
        with pytest.raises(
            fc.PlanError, match=rf"^Expected timings of {objective} on {device}, got"
        ):
            Timings(known, objective, device)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(fc.PlanError, match="not a regular file"):
            Timings(tmp_path / name, "latency", "cpu")
    with pytest.raises(fc.PlanError, match="no such folder"):
        Timings(tmp_path / "none" / "t.json", "latency", "cpu")


@pytest.mark.parametrize("budget", [-1, float("nan")])
def test_an_impossible_budget_is_refused(budget):
    model, x = nn.Dense(3), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    with pytest.raises(fc.PlanError, match="Expected a budget of seconds"):
        fc.tune(model, params, x, budget=budget, progress=False)
