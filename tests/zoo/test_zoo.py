import pytest

pytest.importorskip(  # which transformers 5 lacks
    "transformers.models.auto.modeling_flax_auto",
    reason="needs: pip install -e '.[zoo]'",
)

from .everyone import everyone
from .examine import examine
from .table import PAGE, names_in

ENTRIES = everyone()
# The library's code calls what newer JAX frowns at.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.group}-{e.name}")
def test_a_model_converts_and_nothing_changes(entry):
    with entry.shim():
        findings = examine(entry.build())
    assert len(findings.plan) + len(findings.left), "no layer found"
    assert findings.failures == ()


def test_the_zoo_is_as_large_as_it_says():
    library = {entry.name for entry in ENTRIES if entry.group == "transformers"}
    assert len(library) >= 25
    assert len({(entry.group, entry.name) for entry in ENTRIES}) == len(ENTRIES)


def test_the_page_shows_exactly_the_zoo():
    shown = names_in(PAGE.read_text())
    assert shown == [(entry.group, entry.name) for entry in ENTRIES]
