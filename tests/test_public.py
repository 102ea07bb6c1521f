"""The public names, which are imported when they are first used."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fcconv_jax as fc

REFERENCE = Path(__file__).parents[1] / "docs" / "api" / "index.md"
SUBMODULES = re.findall(
    r"^ +fcconv_jax\.(\w+(?:\.\w+)*)\.(\w+)$", REFERENCE.read_text(), re.M
)


@pytest.mark.parametrize("name", fc.__all__)  # pyright: ignore
def test_every_name_is_there(name):
    value = getattr(fc, name)
    assert value.__name__ == name
    assert value.__module__.startswith("fcconv_jax.")
    assert name in dir(fc)


@pytest.mark.parametrize(("module", "name"), SUBMODULES)
def test_every_documented_name_of_a_submodule_is_there(module, name):
    value = getattr(importlib.import_module(f"fcconv_jax.{module}"), name)
    assert value.__module__ == f"fcconv_jax.{module}"
    assert value.__doc__
    assert name not in fc.__all__  # pyright: ignore


def test_the_submodules_have_documented_names():
    assert {name for _, name in SUBMODULES} >= {"ConvGeometry", "certify_layer"}


def test_every_error_has_the_one_base():
    errors = [getattr(fc, name) for name in fc.__all__ if name.endswith("Error")]  # pyright: ignore
    assert len(errors) == 6
    for error in errors:
        assert issubclass(error, fc.FcconvError)
        # Code that expects Python's own class goes on.
        assert error is fc.FcconvError or issubclass(error, ValueError)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match=r"'sldie'\. Did you mean 'slide'\?"):
        fc.sldie  # noqa: B018  # pyright: ignore
    with pytest.raises(AttributeError, match=r"no attribute 'qqq'\.$"):
        fc.qqq  # noqa: B018  # pyright: ignore


def _run(code):
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_importing_the_package_imports_no_jax():
    assert _run("import sys, fcconv_jax; sys.exit('jax' in sys.modules)") == 0


def test_a_module_of_the_same_name_hides_no_function():
    code = "import fcconv_jax, fcconv_jax.export.chips; callable(fcconv_jax.export)"
    assert _run(f"{code} or 1 / 0") == 0
