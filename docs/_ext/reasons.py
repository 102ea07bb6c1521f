"""The reasons for which the code leaves a layer alone, read from the code itself.

A reason is a text that a ``LeftError`` is raised with, that a function named
``obstacle`` or ``why_it_fails`` returns, or that is called ``reason`` or ``left``
on its way into ``plan.skipped``. Each must have a way out in
``docs/reasons.toml``, and each way out a reason: the build fails otherwise.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fcconv_jax"
ROOMS = ("geometry/reasons.py", "planning", "frontends")
_SHORT = 12  # characters: a piece of a sentence, no reason

WAYS_OUT: dict[str, dict[str, str]] = tomllib.loads(
    (PACKAGE.parent / "docs" / "reasons.toml").read_text()
)


def template(node: ast.expr) -> str:
    """A string expression as a text, with ``...`` for what is filled in."""
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
    """The texts that an expression may be."""
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
    """Each reason and the module that gives it."""
    found: dict[str, str] = {}
    for room in ROOMS:
        path = PACKAGE / room
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for text in _found_in(ast.parse(file.read_text())):
                text = " ".join(text.split())
                if len(text.replace("...", "").strip()) >= _SHORT:
                    found.setdefault(text, str(file.relative_to(PACKAGE)))
    return found


def table() -> str:
    """All reasons with their ways out, as tables in Markdown.

    Raises:
      ValueError: a reason has no way out, or a way out no reason.
    """
    found = reasons()
    used: set[str] = set()
    parts = []
    for heading, ways in WAYS_OUT.items():
        rows = [
            "| the reason, as `plan.skipped` gives it | the way out |",
            "| --- | --- |",
        ]
        for start, way in ways.items():
            mine = [text for text in found if text.startswith(start)]
            used.update(mine)
            if not mine:
                raise ValueError(f"reasons: no code says {start!r}")
            rows += [f"| {_escaped(text)} | {way} |" for text in mine]
        parts.append(f"## {heading}\n\n" + "\n".join(rows) + "\n")
    missing = sorted(found.keys() - used)
    if missing:
        raise ValueError(f"reasons: docs/reasons.toml has no way out for {missing}")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    text = text.removeprefix("..., ").removeprefix("...; ")
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
