"""The tables of the benchmarks are made from their results."""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(name):
    file = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


report, running = load("report"), load("running")


def found(case, group, value=0.5, **more):
    each = {"what": "tuned / original", "value": value, "bound": 1.02, "unit": "x"}
    return {"case": case, "group": group, "device": "a chip", "bounds": [each], **more}


def test_the_readme_shows_the_results():
    results = report.read(ROOT / "benchmarks" / "results" / "cpu.json")
    assert report.readme(results) in (ROOT / "README.md").read_text()


def test_every_case_has_a_name_in_words():
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        for each in report.read(file):
            assert report.words(each["case"]) != each["case"]


def test_tables_are_there_before_anything_is_measured(tmp_path):
    tables = report.tables(tmp_path)
    groups = "models folded layers loops costs training operators peers chips".split()
    assert {*tables} == {*(f"{group}-cpu" for group in groups), "cycles"}


def test_a_table_has_times_and_what_missed(tmp_path):
    ms = {"original": 10.0, "tuned": 20.0}
    quartiles = {"original": [9.0, 11.0], "tuned": [20.0, 20.0]}
    runs = {"original": 5, "tuned": 1}
    more = {"milliseconds": ms, "quartiles": quartiles, "runs": runs}
    running.write(tmp_path, found("net-8", "models", 2.0, **more))
    *_, row = report.tables(tmp_path)["models-a-chip"].splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["net-8", "10 ms ±10%"]
    missed = "**missed**: tuned / original 2.00x, not 1.02x"
    assert cells[-3:] == ["20 ms", "2.00x", missed]


def test_operators_are_compared_with_each_peer(tmp_path):
    counts = {"conv": 3, "dense": 5, "jax2onnx": 4}
    ops = {k: {"Conv": n - 1, "Transpose": 1} for k, n in counts.items()}
    what = {"what": "ONNX, dense: operators", "unit": "operators"}
    bounds = [{**what, "value": 5, "bound": 4}]
    operators = {"ONNX": ops, "LiteRT": {"conv": {}, "dense": {}, "keras": {}}}
    case = found("operators-unet", "operators", operators=operators)
    running.write(tmp_path, {**case, "bounds": bounds})
    *_, onnx, litert = report.tables(tmp_path)["operators-a-chip"].splitlines()
    cells = [cell.strip() for cell in onnx.strip("|").split("|")]
    assert cells[:5] == ["U-Net", "ONNX", "3: 1, 0", "5: 1, 0", "4: 1, 0 (jax2onnx)"]
    missed = "**missed**: ONNX, dense: operators 5 operators, not 4 operators"
    assert cells[-1] == missed
    assert litert.endswith("| 0: 0, 0 (keras) | hold |")


def test_files_are_timed_beside_a_peer_s(tmp_path):
    ms = {"conv": 2.0, "dense": 3.0, "keras": 4.0}
    more = {"milliseconds": ms, "quartiles": {}, "runs": dict.fromkeys(ms, 1)}
    running.write(tmp_path, found("unet in LiteRT", "peers", **more))
    running.write(tmp_path, found("ds-cnn in int8", "peers"))
    made = report.tables(tmp_path)
    row = "| U-Net in LiteRT | 2 ms | 3 ms | 4 ms (keras) | hold |"
    assert made["peers-a-chip"].splitlines()[-1] == row
    assert "| DS-CNN in int8 | tuned / original |" in made["chips-a-chip"]


def test_folded_norms_have_a_table_of_their_own(tmp_path):
    ms = {"original": 4.0, "norms folded": 3.0, "norms folded, tuned": 2.0}
    more = {"milliseconds": ms, "quartiles": {}, "runs": dict.fromkeys(ms, 1)}
    running.write(tmp_path, found("resnet50-8", "models", **more))
    *_, row = report.tables(tmp_path)["folded-a-chip"].splitlines()
    assert row == "| ResNet-50, batch 8 | 4 ms | 3 ms | 2 ms | 0.75x |"


def test_what_tuning_leaves_is_not_run_again(tmp_path):
    more = {"milliseconds": {"original": 10.0}, "quartiles": {}, "runs": {}}
    running.write(tmp_path, found("net-8", "models", 1.0, **more))
    *_, row = report.tables(tmp_path)["models-a-chip"].splitlines()
    assert row.endswith("| unchanged | 1.00x | hold |")


def test_a_case_takes_the_place_of_its_own_alone(tmp_path):
    for value in (0.5, 0.7):
        running.write(tmp_path, found("a", "costs", value))
        running.write(tmp_path, found("b", "costs"))
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())["results"]
    assert {each["case"]: each["bounds"][0]["value"] for each in results} == {
        "a": 0.7,
        "b": 0.5,
    }


def test_exported_networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    from export_table import table  # pyright: ignore[reportMissingImports]

    file = ROOT / "benchmarks" / "results" / "exports.json"
    found = json.loads(file.read_text())
    assert len(found) == 30
    text = table(file)
    for runtime, title in (("litert", "LiteRT"), ("onnx", "ONNX")):
        cells = {name: row[runtime] for name, row in found.items()}
        left = [n for n, cell in cells.items() if cell["verdict"] != "verified"]
        assert len(left) <= 2
        assert f"| **{title}** | | {30 - len(left)} of 30 verified |" in text
        for name in left:
            assert f"- {name}, {title}: {cells[name]['reason']}" in text
