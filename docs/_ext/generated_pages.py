"""Generates pages and data before a build.

The benchmarks' tables come from ``benchmarks/results``, the notebooks from
``examples``, the help of each command from the command line, the reasons in
``plan.skipped`` from the code, and the interactive page's data from ``classify``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "_generated"


def benchmark_parts() -> dict[str, str]:
    """Return the benchmarks' tables and charts in Markdown, by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from charts import charts  # pyright: ignore[reportMissingImports]
    from report import tables  # pyright: ignore[reportMissingImports]

    results = ROOT / "benchmarks" / "results"
    return {**tables(results), **charts(results)}


def command_line() -> str:
    """Return the page with every command's help."""
    from fcconv_jax import cli

    env = {**os.environ, "COLUMNS": "78", "TERM": "dumb", "NO_COLOR": "1"}
    parts = [
        "# Command line",
        "Output of `fcconv COMMAND --help`. Exit status 0 means success, 1 a failure "
        "or a difference, 2 a usage error. Messages go to stderr; `--json` prints "
        "machine-readable output.",
    ]
    for module in cli.COMMANDS:
        command = module.__name__.rpartition(".")[2]
        done = subprocess.run(
            [Path(sys.executable).with_name("fcconv"), command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts += [f"## `fcconv {command}`", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _copy_notebooks() -> None:
    folder = ROOT / "docs" / "notebooks"
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        shutil.copy(notebook, folder)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _generate(app: Sphinx, config: Any) -> None:
    import chapter_data
    import export_table
    import reasons

    for name, text in benchmark_parts().items():
        _write(OUT / f"{name}.md", text + "\n")
    exports = ROOT / "benchmarks" / "results" / "exports.json"
    _write(OUT / "exports.md", export_table.table(exports))
    _write(OUT / "reasons.md", reasons.table())
    _write(ROOT / "docs" / "cli.md", command_line())
    _write(OUT / "static" / "chapter_data.js", chapter_data.as_script())
    changes = (ROOT / "CHANGELOG.md").read_text()
    # The page has its own title.
    _write(OUT / "changelog.md", re.sub(r"^# .*\n", "", changes, count=1))
    _copy_notebooks()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the generator, which runs before Sphinx collects pages."""
    app.connect("config-inited", _generate, priority=50)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
