"""The base of all reports: a verdict, tables and details as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Table = Sequence[Sequence[str]]
# Characters with a meaning in Markdown or HTML. Names of layers have underscores, which
# mean nothing inside of a word.
_MARKUP = re.compile(r"[\\|<>*`\[\]]")


class Report:
    """Base of all reports; subclasses add their fields and text.

    A subclass is a dataclass. It defines :attr:`headline`, and those of :attr:`tables`,
    :attr:`details` and :attr:`failures` that it has something for. Names may come from
    files: they are escaped here, so no subclass has to.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Counted(Report):
      ...     layers: int
      ...
      ...     @property
      ...     def headline(self):
      ...         return f"{self.layers} layers"
      >>> found = Counted(2)
      >>> print(found)
      2 layers
      >>> found.passed, found.to_json()
      (True, '{"passed": true, "failures": [], "layers": 2}')
    """

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failed check, with what was expected and got."""
        return ()

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        raise NotImplementedError

    @property
    def tables(self) -> Sequence[Table]:
        """Tables of text, each with its titles as the first row."""
        return ()

    @property
    def details(self) -> Iterable[str]:
        """The lines below the tables."""
        return ()

    def content(self) -> dict[str, object]:
        """Return the content of :meth:`to_json`: the verdict and the fields."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            **{
                field.name: plain(getattr(self, field.name))
                for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            },
        }

    def to_json(self) -> str:
        """Return the report as JSON; numbers that JSON lacks are null."""
        return json.dumps(plain(self.content()), default=str)

    def to_markdown(self) -> str:
        """Return the report as Markdown: the verdict, the tables and the details."""
        parts = [f"**{_escape_markup(self.headline)}**"]
        parts += ["\n".join(markdown_table(table)) for table in self.tables if table]
        if lines := list(self.details):
            parts.append("\n".join(f"- {_escape_markup(line)}" for line in lines))
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        lines = [printable(self.headline)]
        for table in self.tables:
            lines += aligned(table)
        for detail in self.details:
            # A continued line is indented: no name can pass itself off as a verdict.
            first, *rest = detail.splitlines() or [""]
            lines += [printable(first), *(f"  {printable(line)}" for line in rest)]
        return "\n".join(lines)


def aligned(rows: Table) -> list[str]:
    """Return rows of cells as lines, in columns two blanks apart.

    Example:
      >>> aligned([("a", "b"), ("long", "c")])
      ['a     b', 'long  c']
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in cells
    ]


def markdown_table(rows: Table) -> list[str]:
    r"""Return rows of cells, titles first, as the lines of a Markdown table.

    Example:
      >>> markdown_table([("path", "n"), ("a|b", "1")])
      ['| path | n |', '| --- | --- |', '| a\\|b | 1 |']
    """
    head, *rest = [tuple(map(_escape_markup, row)) for row in rows]
    table = [head, ("---",) * len(head), *rest]
    return ["| " + " | ".join(row) + " |" for row in table]


def printable(text: str) -> str:
    r"""Return text with what moves a terminal's cursor or hides letters escaped.

    Example:
      >>> print(printable("fc\x1b[2J/kernel"))
      fc\x1b[2J/kernel
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def plain(value: object) -> object:
    """Return a value as JSON knows it: dataclasses as dictionaries, NaN as None.

    Example:
      >>> plain({"error": float("nan"), "file": Path("a")})
      {'error': None, 'file': 'a'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
        for name in ("passed", "digits"):
            found = getattr(value, name, None)
            if found is not None:
                fields[name] = found
        return fields
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _escape_markup(text: str) -> str:
    lines = (printable(line) for line in text.splitlines())
    return _MARKUP.sub(
        lambda found: {"<": "&lt;", ">": "&gt;"}.get(found[0], f"\\{found[0]}"),
        " ".join(lines),
    )
