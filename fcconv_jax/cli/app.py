"""The command line: its errors, help and exit status.

Results go to stdout, progress and messages to stderr. Exit status 0 means success, 1 a
failure or a difference, 2 a usage error. Each command imports slow modules itself, so
that ``--help`` is fast.
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
    """Prints this package's errors as one line and sets the exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            typer.echo(f"error: {_shown(str(error))}", err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # of `| head`, which has read enough: Typer ends quietly
        except Exception as error:
            # Typer shows its own exceptions (exit, wrong usage) itself.
            typers = type(error).__module__.startswith(("typer", "click"))
            line = _in_one_line(error)
            # An unexpected error in this package keeps its traceback: it is a bug.
            if typers or line is None or os.environ.get("FCCONV_TRACEBACK"):
                raise
            typer.echo(f"error: {_shown(line)}", err=True)
            raise typer.Exit(1) from None


def _shown(text: str) -> str:
    """Escape what names in files could do to a terminal, line breaks aside."""
    from ..messages.reports import printable

    return "\n".join(map(printable, text.split("\n")))


def _in_one_line(error: Exception) -> str | None:
    """Return this package's message, or the user's line with its error."""
    from ..messages.errors import FcconvError
    from ..messages.user_code import known_fix, users_line

    if isinstance(error, FcconvError):
        return str(error).partition("\n--------------------\n")[0]
    said = str(error).strip().splitlines() or [""]
    whole = "(FCCONV_TRACEBACK=1 shows all of it)"
    help_ = known_fix(error)
    message = f"{type(error).__name__}: {said[0]}" if help_ is None else help_
    called = [n for n in getattr(error, "__notes__", ()) if n.startswith("It was")]
    message = ". ".join([message.rstrip("."), *called])
    line = users_line(error)
    if line is not None:
        return f"{line.rstrip(':')}: {message} {whole}"
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__).parents[1]
    # JAX removes the frames of JAX and Flax from errors in a trace.
    traced = "JAX has removed" in "".join(
        [str(error), *getattr(error, "__notes__", ())]
    )
    if frames and here in Path(frames[-1].filename).parents and not traced:
        # What this package raises itself explains wrong usage; the rest are bugs.
        raised = (frames[-1].line or "").startswith("raise ")
        return str(error) if raised else None
    return f"{message} {whole}"


def examples(*commands: str) -> str:
    """Return an epilog; Typer joins lines unless a blank line separates them."""
    return "\n\n".join(["Examples:", *(f"  fcconv {command}" for command in commands)])


app = typer.Typer(
    name="fcconv",
    cls=_Commands,
    help="Convert trained JAX models from Dense to Conv and back, and verify that "
    "nothing else changed.",
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
    """Run the command line; the entry point of ``fcconv``."""
    app()
