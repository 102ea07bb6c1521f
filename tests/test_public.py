"""The names of the package, which are imported when they are first asked for."""

import ast
from pathlib import Path

import pytest

import fcconv_jax as fc


def _imports_for_type_checkers():
    tree = ast.parse(Path(fc.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_and_python_see_the_same_names():
    assert _imports_for_type_checkers() == fc._HOMES


@pytest.mark.parametrize("name", fc.__all__)
def test_every_name_is_there(name):
    value = getattr(fc, name)
    assert value.__name__ == name
    assert value.__module__.startswith("fcconv_jax.")
    assert name in dir(fc)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fcconv_jax' has no attribute 'convret'"):
        fc.convret  # noqa: B018
