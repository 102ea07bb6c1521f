"""The command line itself: its errors, its help and its exit status.

A command's result goes to stdout; progress and messages go to stderr. Exit status 0
means that it succeeded, 1 that it failed or found a difference, 2 wrong usage. Whatever
is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .inputs import ArgumentError


class _Commands(TyperGroup):
    """Turns the errors that this package explains into one line and a status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except Exception as error:
            # Typer's own, for an exit and for wrong usage, it shows itself.
            typers = type(error).__module__.startswith(("typer", "click"))
            line = _in_one_line(error)
            # An error of this package's own, which no one explains, is shown whole.
            if typers or line is None or os.environ.get("FCCONV_TRACEBACK"):
                raise
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(1) from None


def _in_one_line(error: Exception) -> str | None:
    """What this package explains, as it says it; else the user's own line and error."""
    from ..errors import FcconvError
    from ..tracing.user_code import users_line, way_out

    if isinstance(error, FcconvError):
        return str(error).partition("\n--------------------\n")[0]
    said = str(error).strip().splitlines() or [""]
    whole = "(FCCONV_TRACEBACK=1 shows all of it)"
    help_ = way_out(error)
    message = f"{type(error).__name__}: {said[0]}" if help_ is None else help_
    called = [n for n in getattr(error, "__notes__", ()) if n.startswith("It was")]
    message = ". ".join([message.rstrip("."), *called])
    line = users_line(error)
    if line is not None:
        return f"{line.rstrip(':')}: {message} {whole}"
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parents[1]
    # What comes out of a trace has lost the frames of JAX and Flax that raised it.
    traced = "JAX has removed" in "".join(
        [str(error), *getattr(error, "__notes__", ())]
    )
    if frames and here in Path(frames[-1].filename).parents and not traced:
        return None
    return f"{message} {whole}"


def examples(*commands: str) -> str:
    """An epilog; in those of Typer a blank line stands for the end of a line."""
    return "\n\n".join(["Examples:", *(f"  fcconv {command}" for command in commands)])


app = typer.Typer(
    name="fcconv",
    cls=_Commands,
    help="Turn trained Flax models from Dense to Conv and back: same code, same "
    "numbers, proved.",
    epilog="Each command has examples in its own --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fcconv {version('fcconv-jax')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; the entry point ``fcconv``."""
    app()
