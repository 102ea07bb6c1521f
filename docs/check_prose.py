"""Prints phrases that the documentation's style avoids; exits with 1 if there are any.

The text should read like JAX's documentation: plain, active, with the field's own
vocabulary. A pattern here is a phrase that has a better standard wording.

    python docs/check_prose.py [FILE OR FOLDER ...]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    ".github",
    "docs",
    "examples",
    "fcconv_jax",
)
_SUFFIXES = {".md", ".py", ".ipynb", ".toml", ".yml"}
# Written by the build from sources that are checked themselves; and this file.
_SKIPPED = {"_build", "_generated", "names", "cli.md", "notebooks", "check_prose.py"}

# A phrase to avoid, and what to write instead.
PHRASES = {
    r"(?:is|are|was|were) no (?!longer|more|less|doubt|need)[a-z]+": "is not a; has no",
    r"at hand": "available",
    r"(?:that|which) (?:is|are) not (?:here|there)": "unavailable; that you don't have",
    r"(?:tells?|told) (?:how|of|that|what|whether|which|the)": "reports; shows; prints",
    r"says? (?:how|so|what|whether|which|why)": "reports; shows; explains",
    r"ways? out": "workaround; fix",
    r"mends?|mended": "fix",
    r"wish|wishes": "option; request",
    r"unless said": "by default",
    r"anew": "again",
    r"hand(?:ed|s)? over": "pass",
    r"for those who": "if you",
    r"left alone": "skipped; unsupported; not modified",
    r"asked of XLA": "before compilation",
    r"where there (?:is|are) (?:one|none|some)": "if present",
    r"(?:where|as) (?:it|they) (?:lies?|stands?|stays?)": "in place; unchanged",
    r"goes? on": "continues; resumes",
    r"by itself": "alone; separately",
    r"to the bit": "bit for bit; bit-identical",
}
_ALL = {re.compile(rf"\b(?:{p})\b", re.IGNORECASE): to for p, to in PHRASES.items()}


def findings(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the phrase and its replacement for each phrase found."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in _ALL.items():
            if found := pattern.search(line):
                yield number, found[0], better


def files(names: list[str]) -> Iterator[Path]:
    """Yield the text files in these files and folders of the repository."""
    for root in (ROOT / name for name in names):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            inside = path.relative_to(ROOT).parts
            if path.suffix in _SUFFIXES and not _SKIPPED & {*inside}:
                yield path


def main() -> int:
    """Print what was found; return 1 if anything was."""
    count = 0
    for path in files(sys.argv[1:] or list(FOLDERS)):
        for number, phrase, better in findings(path.read_text()):
            print(f"{path.relative_to(ROOT)}:{number}: {phrase!r}; write: {better}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
