"""Optional extras: their modules, and the line that installs them."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .errors import MissingExtraError

_NAME = "fcconv-jax"


def require(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional extra.

    Raises:
      MissingExtraError: it is not installed; the message has the line that installs it.

    Example:
      >>> require("json", "litert", "Reading").__name__
      'json'
      >>> require("no_such_module", "litert", "Writing LiteRT files")
      Traceback (most recent call last):
        ...
      fcconv_jax.messages.errors.MissingExtraError: Writing LiteRT files needs ...
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {module!r} ({error}). Install it with: "
            f"{install_command(extra)}"
        ) from None


@functools.cache
def install_command(extra: str) -> str:
    """Return the shell line that installs an extra of this very package.

    Every message uses it. An index may have no ``fcconv-jax``, so the line names the
    place that the package came from: a clone, a git address, a file, or an index.

    Example:
      >>> install_command("litert").startswith("pip install ")
      True
    """
    try:
        installed = importlib.metadata.distribution(_NAME)
    except importlib.metadata.PackageNotFoundError:
        # Run from its source, which pip has never seen.
        return _of_folder(Path(__file__).parents[1], extra, editable=True)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    urls = installed.metadata.get_all("Project-URL") or []
    addresses = dict(url.split(", ", 1) for url in urls)
    return _command(origin, extra, addresses.get("Repository", ""))


def _command(origin: dict[str, Any], extra: str, repository: str) -> str:
    """Return the line for a ``direct_url.json`` (PEP 610), empty if from an index."""
    wanted, url = f"{_NAME}[{extra}]", origin.get("url", "")
    if "dir_info" in origin:
        folder = Path(url2pathname(urlsplit(url).path))
        if (folder / "pyproject.toml").is_file():
            return _of_folder(folder, extra, origin["dir_info"].get("editable", False))
        # The clone is gone; its home is not.
        url = f"git+{repository}"
    elif "vcs_info" in origin:
        info = origin["vcs_info"]
        url = f"{info['vcs']}+{url}@{info['commit_id']}"
    return f"pip install {shlex.quote(f'{wanted} @ {url}' if url else wanted)}"


def _of_folder(folder: Path, extra: str, editable: bool) -> str:
    place = shlex.quote(f"{folder}[{extra}]")
    return f"pip install {'-e ' if editable else ''}{place}"
