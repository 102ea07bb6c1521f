"""Installing the package in Colab moves nothing that is installed there."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def freeze(runtime):
    lines = (
        (Path(__file__).parent / "colab" / f"{runtime}.txt").read_text().splitlines()
    )
    pairs = (line.partition("==")[::2] for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_table_of_versions_is_what_ci_installs():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(("| | Python", "| oldest", "| Colab"))
    ]
    (_, _, *packages), (_, python, *oldest), (_, _, *colab) = rows
    assert PROJECT["requires-python"] == f">={python}"
    assert {*map("{}>={}".format, packages, oldest)} <= {*PROJECT["dependencies"]}
    assert colab == [freeze("tpu")[name] for name in packages]


@pytest.mark.parametrize("runtime", ["tpu", "gpu"])
def test_what_colab_has_is_accepted(runtime):
    """Also by what the requirements require, as far as it is installed here."""
    have = freeze(runtime)
    left = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["examples"]]
    seen, refused = set(), []
    while left:
        text = left.pop()
        required = Requirement(text)
        name = canonicalize_name(required.name)
        marker = required.marker
        if text in seen or (marker and not marker.evaluate({"extra": ""})):
            continue
        seen.add(text)
        if name in have:
            # Colab's own packages agree with each other.
            if not required.specifier.contains(have[name], prereleases=True):
                refused.append(f"{text}, got {have[name]}")
            continue
        try:
            left += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
    assert {"jax", "flax"} <= {Requirement(text).name for text in seen}
    assert refused == []


def test_lower_bounds_are_colabs():
    """A bound is neither higher than Colab's nor one that no group of CI runs."""
    have = freeze("tpu")
    bounds = {}
    for text in PROJECT["dependencies"]:
        (only,) = Requirement(text).specifier
        assert only.operator == ">="
        bounds[Requirement(text).name] = only.version
    same = ("jax", "flax", "optax", "orbax-checkpoint")
    assert {name: bounds[name] for name in same} == {name: have[name] for name in same}
