"""Writes llms.txt (a line per page) and llms-full.txt (all text) into the site.

The format is https://llmstxt.org: a title, a summary, and lists of links.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.text import TextBuilder
from sphinx.writers.text import TextTranslator

_SECTIONS = {
    "howto/": "How-to",
    "gallery/": "Gallery",
    "notebooks/": "Notebooks",
    "api/": "API reference",
}


class _Text(TextTranslator):
    """Translates to text, ignoring unknown nodes of extensions."""

    def unknown_visit(self, node: nodes.Node) -> None:
        """Visit the children."""

    def unknown_departure(self, node: nodes.Node) -> None:
        """Do nothing."""


def _first_paragraph(doctree: nodes.document) -> str:
    """Return a page's first paragraph as one line of at most 200 characters."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 20:
            return text if len(text) <= 200 else text[:197].rsplit(" ", 1)[0] + " ..."
    return ""


def _write(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    base = app.config.html_baseurl.rstrip("/")
    out = Path(app.outdir)
    builder = TextBuilder(app, app.env)
    builder.secnumbers = {}  # pages are not numbered
    sections: dict[str, list[str]] = {}
    full = []
    for page in sorted(app.env.found_docs):
        doctree = app.env.get_doctree(page)
        title = app.env.titles[page].astext()
        section = next((s for p, s in _SECTIONS.items() if page.startswith(p)), "Pages")
        line = f"- [{title}]({base}/{page}.html): {_first_paragraph(doctree)}"
        sections.setdefault(section, []).append(line.rstrip(": "))
        translator = _Text(doctree, builder)
        doctree.walkabout(translator)
        full.append(f"<{base}/{page}.html>\n\n{translator.body}")
    order = ["Pages", *dict.fromkeys(_SECTIONS.values())]
    lines = [f"# {app.config.html_title}", "", f"> {app.config.summary}"]
    for section in order:
        if section in sections:
            lines += ["", f"## {section}", "", *sections[section]]
    (out / "llms.txt").write_text("\n".join(lines) + "\n")
    (out / "llms-full.txt").write_text("\n\n".join(full))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the writer, which runs after all pages are written."""
    app.add_config_value("summary", "", "env", str)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
