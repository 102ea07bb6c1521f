"""``tests/slow.txt`` lists tests that exist."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
LISTED = (HERE / "slow.txt").read_text().splitlines()


@pytest.mark.parametrize("module", sorted({each.partition("::")[0] for each in LISTED}))
def test_each_test_is_in_its_module(module):
    text = (HERE / module).read_text()
    listed = [each for each in LISTED if each.startswith(f"{module}::")]
    names = {each.partition("[")[0].rpartition("::")[2] for each in listed}
    missing = {name for name in names if f"def {name}(" not in text}
    assert not missing, "pytest -n 2 --list-slow writes the list"
