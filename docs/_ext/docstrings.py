"""Fails the build if a public name has no page or an incomplete docstring.

Every public name must document its arguments, result and errors, and show an example.
``docs/api/index.md`` must list exactly the names that the package exports.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fcconv_jax as fc

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def complaints() -> Iterator[str]:
    """Yield a message for each missing part of a public docstring."""
    for name in fc.__all__:  # pyright: ignore[reportAttributeAccessIssue]
        value = getattr(fc, name)
        text = inspect.getdoc(value) or ""
        if not text:
            yield f"{name} has no docstring"
            continue
        if inspect.isclass(value) and issubclass(value, fc.FcconvError):
            continue  # only raised: there is nothing to pass it
        if not re.search(r"^Examples?:$", text, re.M):
            yield f"{name} shows no example"
        if inspect.isfunction(value):
            yield from (f"{name} {why}" for why in _lacking(value, text))
        else:
            yield from _members(name, value)


def _lacking(function: Any, text: str) -> Iterator[str]:
    """Yield a message for each missing section or argument."""
    for section in ("Args", "Returns", "Raises", "Source"):
        given = inspect.signature(function)
        if section == "Returns" and given.return_annotation in (None, "None"):
            continue
        if not re.search(rf"^{section}:$", text, re.M):
            yield f"has no section {section!r}"
    described = re.findall(r"^  (\*{0,2}\w+): ", text, re.M)
    for parameter in inspect.signature(function).parameters:
        if parameter not in [each.lstrip("*") for each in described]:
            yield f"does not describe {parameter!r}"


def _members(name: str, value: Any) -> Iterator[str]:
    """Yield a message for each undocumented method or property."""
    for member, each in vars(value).items():
        wanted = inspect.isfunction(each) or isinstance(each, property | classmethod)
        if not member.startswith("_") and wanted and not inspect.getdoc(each):
            yield f"{name}.{member} has no docstring"


def listed(index: Path) -> set[str]:
    """Return the names listed in the API index."""
    return set(re.findall(r"^ +~?fcconv_jax\.(\w+)$", index.read_text(), re.M))


def _check(app: Sphinx) -> None:
    found = list(complaints())
    names = listed(Path(app.srcdir) / "api" / "index.md")
    exported = set(fc.__all__)  # pyright: ignore[reportAttributeAccessIssue]
    found += [f"{name} is not in docs/api/index.md" for name in exported - names]
    found += [
        f"docs/api/index.md lists {name}, which is not exported"
        for name in names - exported
    ]
    if found:
        raise ValueError("docstrings: " + "; ".join(sorted(found)))


def _signature(
    _app: Sphinx,
    _what: str,
    _name: str,
    _obj: Any,
    _options: Any,
    arguments: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Replace ``<factory>`` defaults, which autodoc can't parse, by ``...``."""
    if arguments is None:
        return None
    return arguments.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Checks before anything is read."""
    app.connect("builder-inited", _check, priority=100)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
