"""Progress of long work: bars on stderr, and a word before what takes minutes."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

# Called with "row: step", how many steps are done, and how many there are.
Progress = Callable[[str, int, int], None]
# What every progress= takes: None and True show bars, False shows nothing.
ProgressOption = Progress | bool | None


@contextlib.contextmanager
def shown(progress: ProgressOption) -> Iterator[Progress]:
    """Yield the function to call while work proceeds.

    Args:
      progress: the caller's function ``(what, done, total)``, where ``what`` reads
        ``"row: step"``; None or True for bars on stderr if that is a terminal or a
        notebook, one for each row; False for nothing.

    Raises:
      TypeError: it is something else.

    Example:
      >>> with shown(lambda what, done, total: print(what, done, total)) as show:
      ...     show("cpu: tracing", 1, 3)
      cpu: tracing 1 3
    """
    if progress is False:
        yield lambda what, done, total: None
        return
    if callable(progress):
        yield progress
        return
    if progress is not None and progress is not True:
        raise TypeError(
            "Expected progress=True, False, None or a function (what, done, total), "
            f"got {progress!r}. Pass one of these."
        )
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.speed))

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # In a notebook rich draws bars with ipywidgets, and warns if it isn't installed.
    widgets = importlib.util.find_spec("ipywidgets") is not None
    # With FORCE_COLOR, as Jupyter sets it, a pipe is a terminal to rich.
    hidden = not (widgets if console.is_jupyter else console.file.isatty())
    bars = Bars(*columns, console=console, transient=True, disable=hidden)
    # In rich 13, disabled bars still end with an empty line.
    with contextlib.nullcontext() if hidden else bars:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            row = what.partition(":")[0]
            if row not in rows:
                rows[row] = bars.add_task(what, total=None)
            bars.update(rows[row], description=what, completed=done, total=total)
            if (
                hidden and "minutes" in what
            ):  # a log should show the reason for a wait, too
                console.print(what, markup=False)

        yield show


def rate(speed: float | None) -> str:
    """Return a speed in steps a second as people read it.

    Example:
      >>> rate(12.34), rate(0.05), rate(None)
      ('12.3/s', '20 s each', '')
    """
    if not speed:
        return ""
    return f"{speed:.3g}/s" if speed >= 1 else f"{1 / speed:.3g} s each"
