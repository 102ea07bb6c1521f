"""Output of the commands: tables, progress bars, files."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..files.install import replacing
from .inputs import ArgumentError

if TYPE_CHECKING:
    from ..messages.reports import Report
    from ..plan import Plan


# Of reports, and of plans: a model or a checkpoint is not replaced by mistake.
REPORTS, PLANS = (".json", ".md"), (".json",)


def check_destination(
    option: str,
    file: Path | None,
    suffixes: Sequence[str] = (),
    read: Sequence[Path] = (),
    out: Path | None = None,
) -> None:
    """Check a destination before any work, and make its folder if that is missing.

    Args:
      option: that names the file.
      file: the destination.
      suffixes: that a file there may have; any, if there are none.
      read: files that the command reads, which it must not replace.
      out: the file of ``--out``, if this one is of another option.

    Raises:
      ArgumentError: it is a folder or one of these files, or has another suffix, or its
        folder cannot be made or written to.
    """
    if file is None:
        return
    if file.is_dir() and file.suffix != ".mlpackage":  # Core ML's files are folders
        raise ArgumentError(
            f"{option}: expected the name of a file, got the folder {file}. Pass a "
            "file."
        )
    device = file.exists() and not (file.is_file() or file.is_dir())  # /dev/stdout
    if suffixes and file.suffix.lower() not in suffixes and not device:
        raise ArgumentError(
            f"{option}: expected a file that ends in {', '.join(suffixes)}, got "
            f"{file}. Pass {file.with_suffix(suffixes[0])}."
        )
    if any(file.exists() and each.exists() and file.samefile(each) for each in read):
        raise ArgumentError(
            f"{option}: {file} is an input of this command, which would replace it. "
            "Pass another name."
        )
    if out is not None and file.resolve() == out.resolve() and not device:
        raise ArgumentError(
            f"{option}: expected another file than --out, got {file}. Pass another "
            "name."
        )
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"{option}: the folder {folder} can't be created ({error.strerror}). Pass "
            "another destination."
        ) from None
    if not os.access(folder, os.W_OK):
        raise ArgumentError(
            f"{option}: {folder} isn't writable. Pass another destination."
        )


def write_text(file: Path, text: str) -> None:
    """Write a file, whole or not at all, and report it on stderr."""
    text = text if text.endswith("\n") else f"{text}\n"
    # A device or a pipe, such as /dev/stdout, is written to.
    in_place = file.exists() and not file.is_file()
    try:
        with contextlib.nullcontext(file) if in_place else replacing(file) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"{file}: can't be written ({error.strerror}). Pass another path."
        ) from None
    typer.echo(f"wrote {file}", err=True)


def show_report(
    found: Report, out: Path | None, as_json: bool, as_markdown: bool
) -> None:
    """Print and write a report, and exit with status 1 if it did not pass."""
    if out is not None:
        to_json = out.suffix == ".json"
        write_text(out, found.to_json() if to_json else found.to_markdown())
    if as_json:
        typer.echo(found.to_json())
    else:
        typer.echo(found.to_markdown() if as_markdown else str(found))
    if not found.passed:
        raise typer.Exit(1)


def print_plan(made: Plan, err: bool = False) -> None:
    """Print what converts, and what does not and why; ``err``: to stderr."""
    typer.echo(str(made).partition("\n")[0], err=err)
    headings, *rows = made.table()
    print_table(headings, rows, err)
    if made.skipped:
        typer.echo(f"{len(made.skipped)} skipped", err=err)
        print_table(("path", "reason"), list(made.skipped.items()), err)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], err: bool = False
) -> None:
    """Print a table, folded to a terminal's width and only to that."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..messages.reports import printable

    if not rows:
        return
    console = Console(stderr=err)
    if not console.is_terminal:
        console = Console(stderr=err, width=1 << 16)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:  # names may come from files
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def human(size: int) -> str:
    """Return a number of bytes as people write it.

    Example:
      >>> human(40), human(20480), human(3 << 30)
      ('40 B', '20 KiB', '3 GiB')
    """
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def start_jax() -> None:
    """Let JAX find its devices without showing what its plugins print.

    An accelerator's plugin that finds no device prints a page about it, past Python.
    It is shown where no backend starts, or with FCCONV_TRACEBACK=1.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        failed = True
        try:
            import jax

            jax.devices()
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if failed or os.environ.get("FCCONV_TRACEBACK"):
                said.seek(0)
                os.write(2, said.read())
