"""What the documentation is made of is complete, and says what the package says."""

import random
import re
import subprocess
import sys
from pathlib import Path

import chapter_data
import check_prose
import docstrings
import generated_pages
import pytest
import reasons
import run_tabs

import fcconv_jax as fc

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_documented():
    assert list(docstrings.complaints()) == []


def test_the_reference_lists_every_public_name():
    assert docstrings.listed(ROOT / "docs" / "api" / "index.md") == set(fc.__all__)  # pyright: ignore


def test_a_function_without_sections_is_complained_about():
    def bare(x):
        return x

    complaints = list(docstrings._lacking(bare, "Does something.\n\nArgs:\n  y: no."))
    assert "has no section 'Returns'" in complaints
    assert "does not describe 'x'" in complaints


def test_every_reason_has_a_workaround():
    table = reasons.table()
    # From each place that gives reasons.
    for words in (
        "Padding enlarges the input",
        "excluded by rule",
        "has a mask on its kernel",
        "mutable references",
        "inside a custom\\_vjp",
        "two roles",
    ):
        assert words in table


def test_a_reason_without_a_workaround_is_an_error(monkeypatch):
    found = {**reasons.reasons(), "the moon is full, and so is the kernel": "plan.py"}
    monkeypatch.setattr(reasons, "reasons", lambda: found)
    with pytest.raises(ValueError, match="the moon is full"):
        reasons.table()


def test_a_workaround_without_a_reason_is_an_error(monkeypatch):
    monkeypatch.setattr(reasons, "reasons", dict)
    with pytest.raises(ValueError, match="no reason in the code"):
        reasons.table()


def test_the_prose_avoids_the_listed_phrases(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_prose.py"])
    assert check_prose.main() == 0


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("A TPU that is not here.", "that is not here"),
        ("It tells whether they differ.", "tells whether"),
        ("There Is No Kernel; it is no matrix.", "Is No Kernel"),
    ],
)
def test_a_phrase_to_avoid_is_found(text, phrase):
    assert [found for _, found, _ in check_prose.findings(text)][:1] == [phrase]


def test_plain_prose_is_not_complained_about():
    text = "The batch is no longer static. Rules are not merged; see the way it works."
    assert list(check_prose.findings(text)) == []


def cut_rows(text):
    """Yield table rows with another number of cells than their header.

    Markdown drops the cells that are too many without a word; within backticks, too,
    a bar ends a cell unless it is escaped.
    """
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        width = width or cells
        if cells != width:
            yield line


def test_no_cell_of_a_table_is_cut():
    texts = {
        path.relative_to(ROOT): path.read_text()
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        if not {"_build", "_generated"} & {*path.parts}
    }
    texts["reasons"] = reasons.table()
    texts |= generated_pages.benchmark_parts()
    assert {
        name: rows for name, text in texts.items() if (rows := [*cut_rows(text)])
    } == {}


def test_a_bar_within_backticks_cuts_a_cell():
    table = "| a | b |\n| --- | --- |\n| x | `y | z` |\n| x | `y \\| z` |"
    assert list(cut_rows(table)) == ["| x | `y | z` |"]


@pytest.mark.parametrize("rank", [1, 2])
def test_the_chapter_says_what_explain_says(rank):
    keys = random.Random(rank).sample(list(chapter_data.keys(rank)), 500)
    texts = {key: chapter_data.text_of(rank, key) for key in keys}
    assert any("hold the same parameters" in text for text in texts.values())
    sentences, which = chapter_data.slots(texts, rank)
    for (key, text), number in zip(texts.items(), which, strict=True):
        numbers = chapter_data.quantities(rank, key)
        assert chapter_data.filled(sentences[number], numbers) == text


def test_a_number_that_the_page_cannot_compute_is_an_error():
    keys = [(3, 2, 1, 0, 1, 1), (5, 2, 1, 0, 1, 1)]
    with pytest.raises(ValueError, match="no quantity is number 0"):
        chapter_data.slots(dict(zip(keys, ["17 lambs", "91 lambs"])), 1)


def test_the_windows_are_those_of_the_geometry():
    found = chapter_data.windows()
    assert found["3,3,1,1,1"] == ".01 012 12."
    assert found["5,2,2,0,3"] == "03"
    assert "2,3,1,0,1" not in found


def test_the_address_of_the_repository_is_the_same_everywhere():
    command = [sys.executable, ROOT / "docs" / "set_repository.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 6000
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_the_version_is_the_same_everywhere():
    version = re.search(
        r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert version
    assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version[1]} (" in (ROOT / "CHANGELOG.md").read_text()


def test_code_in_tabs_is_run_behind_them():
    blocks = "```python\nx = 1\n```\n```sh\nls\n```\n```python\ny\n```\n"
    tabs = f"::::{{tab-set}}\n{blocks}::::\n"
    page = f"---\nfile_format: mystnb\n---\n{tabs}rest\n"
    cells = run_tabs.with_cells(page).partition(tabs)[2]
    assert re.findall(r"\[remove-cell\]\n(.*?)```", cells, re.DOTALL) == [
        "x = 1\n",
        "y\n",
    ]
    assert cells.endswith("rest\n")
    assert run_tabs.with_cells(tabs) == tabs, "a page without cells stays as it is"
