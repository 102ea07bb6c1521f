"""Sets the repository's address in all files, or checks that they agree.

The address is defined in ``[project.urls]`` of ``pyproject.toml``. Files that can't
read it from there (notebooks, badges, forms) contain a copy.

    python docs/set_repository.py --check
    python docs/set_repository.py https://github.com/me/fcconv https://me.github.io/fcconv/
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FILES = (
    "pyproject.toml",
    "README.md",
    "CITATION.cff",
    "SECURITY.md",
    ".github/ISSUE_TEMPLATE/config.yml",
    "docs/gallery/*.md",
    "docs/howto/*.md",
    "docs/index.md",
    "examples/*.ipynb",
)
# Links to this project: a prefix, then owner and name.
_LINKS = re.compile(
    r"(?:colab\.research\.google\.com/github/|git\+https://github\.com/"
    r"|nbviewer\.org/github/|repository-code: https://github\.com/)"
    r"([\w.-]+/[\w.-]+?)(?=[/\"'\s)]|\.git|$)"
)


def addresses() -> tuple[str, str]:
    """Return the repository as ``owner/name``, and the address of the documentation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = project["urls"]
    return urls["Repository"].removeprefix("https://github.com/"), urls["Documentation"]


def files() -> list[Path]:
    """Return the files that contain the address."""
    return [path for name in _FILES for path in sorted(ROOT.glob(name))]


def disagreements() -> list[str]:
    """Return a message for each link to another repository and each missing link."""
    slug, _ = addresses()
    found = []
    for path in files():
        text, name = path.read_text(), path.relative_to(ROOT)
        others = {link for link in _LINKS.findall(text) if link != slug}
        found += [f"{name}: expected {slug}, got {link}" for link in sorted(others)]
        if path.suffix == ".ipynb":
            badge = f"colab.research.google.com/github/{slug}/blob/main/{name}"
            if badge not in text:
                found.append(f"{name}: expected a badge that leads to {badge}")
            if f"git+https://github.com/{slug}" not in text:
                found.append(f"{name}: expected its first cell to install from {slug}")
    return found


def move(repository: str, documentation: str) -> None:
    """Write another address into all files."""
    slug, docs = addresses()
    new = repository.removeprefix("https://github.com/").strip("/")
    for path in files():
        text = path.read_text()
        changed = text.replace(docs, documentation).replace(slug, new)
        if changed != text:
            path.write_text(changed)


def main() -> int:
    """Set or check the address; return status 1 if files disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", nargs="?")
    parser.add_argument("documentation", nargs="?")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    if options.repository and not options.check:
        if not options.documentation:
            parser.error("the address of the documentation is missing")
        move(options.repository, options.documentation)
    found = disagreements()
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
