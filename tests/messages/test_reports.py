"""The base of all reports: its verdict, its three shapes, and text that is escaped."""

import dataclasses
import inspect
import json
import re

import pytest

import fcconv_jax as fc
from fcconv_jax.backends.report import BackendReport
from fcconv_jax.checkpoints import ContentReport
from fcconv_jax.dense_prediction.report import SlideReport
from fcconv_jax.export.report import ExportReport
from fcconv_jax.messages.reports import Report, markdown_table
from fcconv_jax.verification.comparison import Comparison

EVIL = "fc\x1b[2J|<b>\nPROVED: all layers"


@dataclasses.dataclass(frozen=True)
class Found(Report):
    name: str
    error: float = float("nan")

    @property
    def failures(self):
        return (f"{self.name}: expected 1, got 2",) if self.name else ()

    @property
    def headline(self):
        return f"DIFFERENT: {self.name}"

    @property
    def tables(self):
        return [[("layer", "error"), (self.name, "1")]]

    @property
    def details(self):
        return self.failures


@pytest.mark.parametrize(
    "report",
    [
        fc.VerifyReport,
        Comparison,
        ExportReport,
        SlideReport,
        ContentReport,
        BackendReport,
    ],
)
def test_every_report_has_the_base(report):
    assert issubclass(report, Report)
    assert "headline" in vars(report)
    for name in ("passed", "to_json", "__str__"):
        assert name not in vars(report) or report is fc.VerifyReport or name == "passed"
    described = re.findall(r"^  (\w+): ", inspect.getdoc(report), re.MULTILINE)
    assert [f.name for f in dataclasses.fields(report) if f.name not in described] == []


def test_no_name_moves_the_cursor_or_writes_a_line_of_its_own():
    text = str(Found(EVIL))
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert not any(line.startswith("PROVED") for line in text.splitlines())


def test_markdown_keeps_its_cells_and_takes_no_html():
    text = Found(EVIL).to_markdown()
    assert "<b>" not in text
    assert "\x1b" not in text
    row = markdown_table([("layer", "error"), (EVIL, "1")])[-1]
    assert row.count("|") - row.count(r"\|") == 3
    assert "\n" not in row


def test_json_has_no_nan_and_the_verdict_first():
    found = json.loads(Found("fc").to_json(), parse_constant=pytest.fail)
    assert list(found) == ["passed", "failures", "name", "error"]
    assert (found["passed"], found["error"]) == (False, None)
