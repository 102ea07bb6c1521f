"""Runs the code in the tabs of a page.

MyST-NB can't execute cells inside a tab-set. So each Python block in a tab-set is
repeated as a hidden cell after the set; later cells see its variables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_SETS = re.compile(r"^::::\{tab-set\}\n.*?^::::$\n", re.M | re.S)
_BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def with_cells(text: str) -> str:
    r"""Return a page with the hidden cells that run its tabs.

    Example:
      >>> tabs = "::::{tab-set}\n```python\nx = 1\n```\n::::\n"
      >>> print(with_cells("file_format: mystnb\n" + tabs).partition("\n::::\n")[2])
      <BLANKLINE>
      ```{code-cell} ipython3
      :tags: [remove-cell]
      x = 1
      ```
      <BLANKLINE>
    """
    if "file_format: mystnb" not in text:
        return text

    def run(found: re.Match[str]) -> str:
        cells = (
            f"\n```{{code-cell}} ipython3\n:tags: [remove-cell]\n{code}```\n"
            for code in _BLOCKS.findall(found[0])
        )
        return found[0] + "".join(cells)

    return _SETS.sub(run, text)


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = with_cells(source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook that adds the cells when a page is read."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
