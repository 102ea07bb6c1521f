"""The names of the package, which are imported when they are first asked for."""

import subprocess
import sys

import pytest

import fcconv_jax as fc


@pytest.mark.parametrize("name", fc.__all__)  # pyright: ignore
def test_every_name_is_there(name):
    value = getattr(fc, name)
    assert value.__name__ == name
    assert value.__module__.startswith("fcconv_jax.")
    assert name in dir(fc)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="convret"):
        fc.convret  # noqa: B018  # pyright: ignore


def test_importing_the_package_imports_no_jax():
    code = "import sys, fcconv_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
