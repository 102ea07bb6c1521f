"""The workflows, hooks and forms name groups, versions and files that there are."""

import re
import subprocess
import tomllib
from pathlib import Path

import conftest
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def groups():
    return re.findall(r"^group_(\w+)\(\)", (ROOT / ".ci" / "run").read_text(), re.M)


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ci_runs_every_group():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["group"]["strategy"]["matrix"]
    run = {*matrix["group"], *(each["group"] for each in matrix["include"])}
    # The matrix runs `tests` on the oldest and the newest versions.
    assert run == set(groups()) - {"oldest", "newest"}


def test_ci_has_every_python_that_the_project_names():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["group"]["strategy"]["matrix"]
    named = [c.rpartition(" ")[2] for c in project()["classifiers"] if "Python ::" in c]
    assert matrix["python"] == [version for version in named if "." in version]


def test_all_groups_run_without_arguments():
    (listed,) = re.findall(r"^all=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.M)
    # In an order of its own: what fails most often runs first.
    assert sorted(listed.split()) == sorted(groups())


def test_the_marker_of_versions_names_test_files_that_there_are():
    for pattern in conftest.VERSIONS:
        assert list((ROOT / "tests").glob(pattern)), pattern


def test_an_unknown_group_is_named():
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "lint", "tset"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "got tset" in done.stderr
    assert done.stdout == ""


def test_contributing_tells_every_group():
    text, _, _ = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layout of the")
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.M)) == sorted(groups())


def test_contributing_names_files_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = text[text.index("## Layout of the package") : text.index("## Style")]
    for name in re.findall(r"`([\w/.]+(?:/|\.py|\.md|\.toml))`", rooms):
        places = (ROOT / name, ROOT / "fcconv_jax" / name)
        assert any(p.exists() for p in places), name


def test_hooks_use_the_pinned_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (ruff,) = (r for r in config["repos"] if "ruff" in r["repo"])
    pinned = [d for d in project()["optional-dependencies"]["test"] if "ruff" in d]
    assert pinned == [f"ruff=={ruff['rev'].removeprefix('v')}"]


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_forms_can_be_read(path):
    assert yaml.safe_load(path.read_text())


def test_a_bug_report_comes_with_the_plan_and_the_versions():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    required = [
        each["attributes"]["label"]
        for each in yaml.safe_load(form)["body"]
        if each.get("validations", {}).get("required")
    ]
    assert any("print(plan)" in label for label in required)
    assert "Versions" in required
