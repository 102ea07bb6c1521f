"""Lists the reasons in ``plan.skipped`` by reading the package's source.

A reason is a string that a ``LeftError`` is raised with, that a function such as
``obstacle`` or ``why_it_fails`` returns, or that is assigned to a name such as
``reason`` or ``left``. The build fails unless ``docs/reasons.toml`` has a workaround
for each reason and a reason for each workaround.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fcconv_jax"
SOURCES = ("geometry/reasons.py", "plan", "planning", "frontends")
_SHORT = 12  # characters; shorter strings are fragments, not reasons

WORKAROUNDS: dict[str, dict[str, str]] = tomllib.loads(
    (PACKAGE.parent / "docs" / "reasons.toml").read_text()
)


def template(node: ast.expr) -> str:
    """Return a string expression as text, with ``...`` for interpolated values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        constants = (part for part in node.values if isinstance(part, ast.Constant))
        known = {id(part): str(part.value) for part in constants}
        return "".join(known.get(id(part), "...") for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return ""


def _texts(node: ast.expr) -> Iterator[str]:
    """Yield the texts that an expression can evaluate to."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.Tuple) and node.elts:
        yield from _texts(node.elts[0])
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value)
    elif isinstance(node, ast.DictComp):
        yield from _texts(node.value)
    else:
        yield template(node)


def _found_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LeftError":
            yield from _texts(node.args[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Use":
            yield from _texts(node.args[1])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                base = target.value if isinstance(target, ast.Subscript) else target
                name = getattr(base, "id", "") or getattr(base, "attr", "")
                if node.value is not None and _is_reason(name):
                    yield from _texts(node.value)
        elif isinstance(node, ast.DictComp) and "failure" in ast.dump(node.value):
            yield from _texts(node.value)
        elif isinstance(node, ast.FunctionDef) and _gives_reasons(node.name):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from _texts(inner.value)


def _is_reason(name: str) -> bool:
    words = ("reason", "obstacle", "left", "tables", "two_roles", "found")
    return any(word in name.lower() for word in words)


def _gives_reasons(name: str) -> bool:
    words = ("obstacle", "why", "failure", "other_uses", "untouched", "left")
    return any(word in name for word in words)


def reasons() -> dict[str, str]:
    """Map each reason to the module that gives it."""
    found: dict[str, str] = {}
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for text in _found_in(ast.parse(file.read_text())):
                text = " ".join(text.split())
                if len(text.replace("...", "").strip()) >= _SHORT:
                    found.setdefault(text, str(file.relative_to(PACKAGE)))
    return found


def table() -> str:
    """Return all reasons and workarounds as Markdown tables.

    Raises:
      ValueError: A reason has no workaround, or a workaround no reason.
    """
    found = reasons()
    used: set[str] = set()
    parts = []
    for heading, workarounds in WORKAROUNDS.items():
        rows = [
            "| reason in `plan.skipped` | workaround |",
            "| --- | --- |",
        ]
        for start, workaround in workarounds.items():
            mine = [text for text in found if text.startswith(start)]
            used.update(mine)
            if not mine:
                raise ValueError(
                    f"reasons: no reason in the code begins with {start!r}"
                )
            rows += [f"| {_escaped(text)} | {_cell(workaround)} |" for text in mine]
        parts.append(f"## {heading}\n\n" + "\n".join(rows) + "\n")
    missing = sorted(found.keys() - used)
    if missing:
        raise ValueError(f"reasons: docs/reasons.toml has no entry for {missing}")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    text = text.removeprefix("..., ").removeprefix("...; ")
    return _cell(text).replace("*", "\\*").replace("_", "\\_")


def _cell(text: str) -> str:
    """Escape what would end a table's cell, even within backticks."""
    return text.replace("|", "\\|")
