"""The built site is complete: ready for GitHub Pages, a page a name, llms.txt."""

import os
import re
from pathlib import Path

import pytest

import fcconv_jax as fc

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("FCCONV_SITE") or ROOT / "docs" / "_build" / "html")
pytestmark = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason=f"no site in {SITE}: build it"
)


def pages():
    found = (p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html"))
    generated = ("_modules/", "_static/", "genindex", "search", "py-modindex")
    return {page for page in found if not page.startswith(generated)}


def test_github_pages_serves_folders_with_an_underscore():
    assert (SITE / ".nojekyll").exists()


def test_every_public_name_has_a_page_with_its_example():
    for name in fc.__all__:  # pyright: ignore
        text = (SITE / "api" / "names" / f"fcconv_jax.{name}.html").read_text()
        assert f'id="fcconv_jax.{name}"' in text, name
        raised = isinstance(getattr(fc, name), type) and issubclass(
            getattr(fc, name), fc.FcconvError
        )
        assert "Example" in text or raised, name


def test_llms_txt_lists_every_page():
    text = (SITE / "llms.txt").read_text()
    listed = re.findall(r"^- \[.*?\]\((\S+)\)", text, re.M)
    assert len(listed) == len(set(listed))
    (base,) = {re.match(r"https://[^/]+/[^/]+/", link)[0] for link in listed}
    assert {link.removeprefix(base) for link in listed} == pages()
    assert "full_window" in (SITE / "llms-full.txt").read_text()


def test_cells_were_run():
    for page in ("start", "howto/slide", "howto/huggingface", "notebooks/colab_slide"):
        text = (SITE / f"{page}.html").read_text()
        assert "cell_output" in text, page


def test_tables_are_those_of_the_results():
    text = (SITE / "gallery" / "benchmarks.html").read_text()
    for case in (
        "MobileNet, batch 8",
        "fori_loop of two",
        "ViT-B/16, batch 8, TPU v6e",
    ):
        assert case in text
    assert text.count('<figure class="bars">') == 7
    assert "<p>vit-b-8" not in text, "the key of a case, not its name"


def test_no_cell_of_a_table_ends_in_the_middle_of_code():
    for page in pages():
        for cell in re.findall(r"<t[dh]\b.*?</t[dh]>", (SITE / page).read_text(), re.S):
            assert "`" not in re.sub(r"<code.*?</code>", "", cell, flags=re.S), page


def test_notebooks_are_all_there():
    for path in (ROOT / "examples").glob("*.ipynb"):
        assert (SITE / "notebooks" / f"{path.stem}.html").exists()
