import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax.training.train_state import TrainState
from typer.testing import CliRunner

import fcconv_jax as fc
from fcconv_jax.checkpoints import read_checkpoint, write_checkpoint
from fcconv_jax.cli import app
from fcconv_jax.cli.inputs import parse_input, random_inputs
from fcconv_jax.verification import layer_certificates as certificates_module
from fcconv_jax.verification import verify as verify_module

KEY = jax.random.key(0)
COMMANDS = (
    *("plan", "convert", "restore", "verify", "compare"),
    *("hlo", "inspect", "explain", "tune"),
)
MODEL = """
from __future__ import annotations

import flax.linen as nn

NUMBER = 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(5, name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(4, name="fc2")(x)


class Wide(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, name="fc")(x)


class Tokens(nn.Module):
    def setup(self):
        self.embed = nn.Embed(6, 8)
        self.head = nn.Dense(3)

    def __call__(self, ids):
        return self.head(self.encode(ids))

    def encode(self, ids):
        return self.embed(ids)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 4), name="q")(x)


class Plain(nn.Module):
    def __call__(self, x):
        return x + 1


class Holder:
    wide = Wide(3)


def make_wide():
    return Wide(2)


def make_number():
    return 3


wide = Wide(7)
"""
SHAPES = {
    "fc1/kernel": (48, 5),
    "fc1/bias": (5,),
    "fc2/kernel": (5, 4),
    "fc2/bias": (4,),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder with a model file, as a user does."""
    (tmp_path / "model.py").write_text(textwrap.dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture(scope="session")
def params():
    """Parameters of the file's Net."""
    shapes = {**SHAPES, "conv/kernel": (3, 3, 1, 3), "conv/bias": (3,)}
    tree = {}
    for number, (path, shape) in enumerate(shapes.items()):
        layer, name = path.split("/")
        values = jax.random.normal(jax.random.fold_in(KEY, number), shape)
        tree.setdefault(layer, {})[name] = np.asarray(values)
    return tree


@pytest.fixture(scope="session")
def a_report():
    """A small real report."""
    model, x = nn.Dense(2), jnp.ones((1, 3))
    plan = fc.make_plan(model, x)
    return fc.verify(model, model.init(KEY, x), x, plan=plan, gradients=False)


@pytest.fixture
def verified(monkeypatch, a_report):
    """What is handed to the library's verify, which does not run."""
    calls = []

    def record(model, variables, *inputs, **options):
        calls.append((model, variables, inputs, options))
        return a_report

    monkeypatch.setattr(verify_module, "verify", record)
    return calls


def run(command, status=0):
    """Runs ``fcconv COMMAND`` in this process and checks its exit status."""
    result = CliRunner().invoke(app, shlex.split(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    if status:
        assert "Traceback" not in result.output
    return result


BRANCHES = """import flax.linen as nn
class Net(nn.Module):
    def __call__(self, x):
        if x.sum() > 0: return x
        return -x
"""


def fails(command, message, status=1):
    """Runs a command that must fail with one line on stderr, and nothing else."""
    result = run(command, status)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr


def save(path, tree):
    """Writes params as msgpack."""
    Path(path).write_bytes(flax.serialization.msgpack_serialize(tree))


def train_state(path, params):
    """Writes an Orbax checkpoint of a TrainState."""
    state = TrainState.create(apply_fn=print, params=params, tx=optax.adam(1e-3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), state)


class TestHelp:
    def test_names_every_command(self):
        out = run("--help").stdout
        for command in COMMANDS:
            assert command in out

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize("columns", ["40", "80"])
    def test_of_a_command(self, command, columns, monkeypatch):
        monkeypatch.setenv("COLUMNS", columns)
        out = run(f"{command} --help").stdout
        assert "Examples:" in out
        assert f"fcconv {command}" in out
        assert max(map(len, out.splitlines())) <= int(columns)

    def test_says_defaults(self):
        assert "[default: VALID]" in " ".join(run("explain --help").stdout.split())

    def test_examples_are_true(self, params, verified):
        save("ckpt", {"params": params})
        Path("run").mkdir()
        for step in (8, 9):
            save(f"run/checkpoint_{step}", {"params": params})
        ran = 0
        for command in COMMANDS:
            if command in ("hlo", "compare", "export"):  # elsewhere
                continue
            epilog = next(
                c.epilog for c in app.registered_commands if _name(c) == command
            )
            for line in epilog.split("\n\n")[1:]:
                if " back" in line and Path("back").exists():
                    assert "--overwrite" in line
                run(line.strip().removeprefix("fcconv "))
                ran += 1
        assert ran >= 14
        assert len(verified) == 4
        assert {p.name for p in Path().iterdir()} >= {"plan.json", "report.md", "back"}

    def test_version(self):
        assert re.fullmatch(r"fcconv \d+\.\d+\.\d+\n", run("--version").stdout)

    def test_wrong_usage(self):
        assert run("plan", 2).stdout == ""
        assert "--inptu" in run("plan model.py:Net --inptu 1,8", 2).stderr
        assert "nonsense" in run("nonsense", 2).stderr
        assert run("convert a b --plan p --format zip", 2).stdout == ""


def _name(command):
    return command.name or command.callback.__name__


class TestTune:
    def test_the_gain_comes_first_and_the_plan_is_written(self):
        line = "tune model.py:Net --input 2,8,8,1 --budget 0.5 --timings t.json"
        told = run(f"{line} --out tuned.json")
        first, *rest = told.stdout.splitlines()
        assert re.fullmatch(r"[01]\.\d\dx: \S+ -> \S+ \w+ on cpu.*", first)
        assert any(row.startswith("fc1 ") for row in rest)
        assert told.stderr.endswith("wrote tuned.json\n")
        plan = fc.Plan.from_json(Path("tuned.json").read_text())
        assert plan.tuning is not None
        content = json.loads(run(f"{line} --json").stdout)
        assert content["ratio"] == plan.tuning.ratio <= 1
        assert fc.Plan.from_json(json.dumps(content["plan"])) == plan
        run("verify model.py:Net --input 2,8,8,1 --no-gradients")

    def test_what_it_cannot_do_is_one_line(self):
        line = "tune model.py:Net --input 2,8,8,1"
        assert "error: rocm" in run(f"{line} --for rocm", 1).stderr
        assert "cycles are estimated" in run(f"{line} --objective cycles", 1).stderr
        assert "no backend 'abacus'" in run(f"{line} --for abacus", 2).stderr


class TestPlan:
    def test_table(self):
        out = run("plan model.py:Net --input 1,8,8,1").stdout
        lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
        assert lines[0] == ["2 layers to conv"]
        assert lines[1] == ["path", "layer", "case", "kernel", "order"]
        kernel = "(48, 5) -> (4, 4, 3, 5)"
        assert lines[2] == ["fc1", "Dense", "full_window", kernel, "HWC"]

    def test_is_not_folded_where_there_is_no_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "20")
        out = run("plan model.py:Net --input 1,8,8,1").stdout
        assert "(48, 5) -> (4, 4, 3, 5)" in out

    def test_is_folded_on_a_narrow_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        out = run("plan model.py:Net --input 1,8,8,1").stdout
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert max(map(len, plain.splitlines())) <= 40
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", out)

    def test_json_and_file_are_the_plan(self):
        result = run("plan model.py:Net --input 1,8,8,1 --json --out plan.json")
        import_model = fc.Plan.from_json(result.stdout)
        assert list(import_model) == ["fc1", "fc2"]
        assert fc.Plan.from_json(Path("plan.json").read_text()) == import_model
        assert result.stderr == "wrote plan.json\n"

    def test_layouts_for_a_backend(self):
        out = run("plan model.py:Net --input 1,8,8,1 --for cuda:h100").stdout
        assert "(48, 5) -> (5, 4, 4, 3) OHWI flat" in out
        out = run("plan model.py:Net --input 1,8,8,1 --rule '*<100=skip'").stdout
        assert "fc2   excluded by rule '*<100'" in out
        fails("plan model.py:Net --input 1,8,8,1 --for xpu", "backend='xpu'")

    def test_rules_direction_kwargs_and_method(self):
        rules = "--rule fc1=2x2:CHW --rule 'fc2=skip' --kwarg train=false"
        made = fc.Plan.from_json(
            run(f"plan model.py:Net --input 1,8,8,1 {rules} --json").stdout
        )
        assert made["fc1"].window == (2, 2)
        assert made["fc1"].order == "CHW"
        assert made.skipped["fc2"] == "excluded by rule 'fc2'"
        out = run("plan model.py:Net --input 1,8,8,1 --to dense").stdout
        assert "0 layers to dense" in out
        assert re.search(r"conv\s+Padding", out)
        out = run("plan model.py:Tokens --input 2,3:int32 --method encode").stdout
        assert "0 layers" in out

    @pytest.mark.parametrize(
        "name", ["model:make_wide", "model:wide", "model:Holder.wide", "model.py:wide"]
    )
    def test_what_a_name_may_be(self, name, monkeypatch):
        monkeypatch.delitem(sys.modules, "model", raising=False)
        assert "1 layer to conv" in run(f"plan {name} --input 2,4").stdout

    def test_in_a_folder_with_neighbours(self, folder):
        (folder / "nets").mkdir()
        (folder / "nets" / "parts.py").write_text("features = 6\n")
        (folder / "nets" / "whole.py").write_text(
            "import flax.linen as nn\nimport parts\nnet = nn.Dense(parts.features)\n"
        )
        assert "(4, 6)" in run("plan nets/whole.py:net --input 2,4").stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("model.py --input 1", "'model.py' is not of the form MODULE:NAME"),
            ("model.py: --input 1", "not of the form MODULE:NAME"),
            (
                "model.py:Nte --input 1",
                "model.py has no 'Nte'; it has: Net, Wide, Tokens, .*make_wide, ",
            ),
            ("nowhere.py:Net --input 1", "nowhere.py: no such file"),
            ("nowhere.at:Net --input 1", "no module 'nowhere' in .* its ending"),
            ("os.nowhere:Net --input 1", "no module 'os.nowhere'"),
            ("model.py:Wide --input 1", "Wide cannot be called .*'features'"),
            ("model.py:NUMBER --input 1", "NUMBER is a int; name a linen or NNX"),
            ("model.py:make_number --input 1", "makes a int; name a linen or NNX"),
            ("model.py:Net --input 1,8,eight", "'1,8,eight' is not of the form"),
            ("model.py:Net --input 1,8:floaty", "'1,8:floaty' is not of the form"),
            ("model.py:Net --input 1,8:float64", "JAX_ENABLE_X64=1"),
            ("model.py:Net --kwarg train", "--kwarg 'train' is not of the form"),
            ("model.py:wide --input 2,4 --out no/plan.json", "no/plan.json: No such"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        fails(f"plan {arguments}", message, status=2)

    def test_wrong_rules(self):
        fails("plan model.py:wide --input 2,4 --rule f=2", r"'f' matches no.*\['fc'\]")
        fails("plan model.py:wide --input 2,4 --rule fc", "PATTERN=WINDOW")
        fails("plan model.py:wide --input 2,4 --rule fc=3", "does not divide the 4")

    def test_errors_of_the_model_are_one_line_with_its_own(self, folder, monkeypatch):
        (folder / "broken.py").write_text("import no_such_library\n")
        line = "broken.py:1: import no_such_library: ModuleNotFoundError: "
        fails("plan broken.py:Net", line)
        fails("plan broken:Net", line)
        (folder / "broken.py").write_text("raise ValueError('mine')\n")
        fails("plan broken.py:Net", "broken.py:1: .* ValueError: mine")
        fails("plan model.py:Net --kwarg trian=true --input 1,8,8,1", "trian")
        fails("plan model.py:Net", "Pass what it is called on: --input", status=2)
        fails("plan model.py:Net --input 1,8,8", r"It was called on float32\[1, 8, 8\]")
        (folder / "broken.py").write_text(BRANCHES)
        fails("plan broken.py:Net --input 1,4", r"broken.py:4: if .*: .*jax.lax.cond")
        (folder / "broken.py").write_text("raise ValueError('mine')\n")
        monkeypatch.setenv("FCCONV_TRACEBACK", "1")
        with pytest.raises(ValueError, match="mine"):
            run("plan broken.py:Net")


OTHER_KINDS = """
import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(x)

def function():
    return (lambda params, x: jnp.sin(x @ params["w"])), {"w": jnp.ones((4, 3))}

def doubled():
    return (lambda params, x: 2 * (x @ params["w"])), {"w": jnp.ones((4, 3))}

class Linen(nn.Module):
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm(epsilon=self.eps)(x))

def other():
    return Linen(eps=1e-4)
"""


class TestOtherKinds:
    """NNX models and functions, as linen ones; and two models of any kind."""

    @pytest.mark.parametrize("name", ["Nnx", "function"])
    def test_they_are_planned_and_verified(self, folder, name):
        (folder / "kinds.py").write_text(OTHER_KINDS)
        assert run(f"plan kinds.py:{name} --input 2,4").stdout.startswith("1 layer")
        command = f"verify kinds.py:{name} --input 2,4"
        assert run(command).stdout.startswith("EQUIVALENT: 1 layer to conv")
        report = json.loads(run(f"{command} --backend rocm --json").stdout)
        assert report["passed"] is True

    def test_two_models_are_compared(self, folder):
        (folder / "kinds.py").write_text(OTHER_KINDS)
        same = "compare kinds.py:Linen kinds.py:Linen --input 2,4"
        assert run(same).stdout.startswith("THE SAME BITS, to 16.0 digits")
        result = run("compare kinds.py:Linen kinds.py:other --input 2,4", 1)
        assert "they part at 'LayerNorm_0'" in result.stdout
        result = run("compare kinds.py:function kinds.py:doubled --input 2,4 --json", 1)
        assert json.loads(result.stdout)["verdict"] == "different functions"


class TestConvert:
    def test_train_state_there_and_back(self, params):
        train_state("ckpt", params)
        result = run("convert ckpt conv --model model.py:Net --input 1,8,8,1")
        assert "6 of 21 leaves converted" in result.stdout
        assert result.stderr == ""
        conv = read_checkpoint("conv").tree["params"]
        assert conv["fc1"]["kernel"].shape == (4, 4, 3, 5)
        run("restore conv back")
        jax.tree.map(
            np.testing.assert_array_equal,
            read_checkpoint("back").tree["params"],
            params,
        )

    def test_steps_of_a_run(self, params):
        Path("run").mkdir()
        for step in (8, 9):
            save(f"run/checkpoint_{step}", {"params": params, "step": step})
        by_hand = "--rule fc1=4x4:HWC --rule fc2=1x1"
        result = run(f"convert run one --step 8 {by_hand}")
        assert "of step checkpoint_8 converted" in result.stdout
        assert read_checkpoint("one").tree["step"] == 8
        result = run(f"convert run all --all-steps {by_hand}")
        assert "4 of 14 leaves of step checkpoint_8, checkpoint_9" in result.stdout
        assert "step" in run("inspect all --step 8").stdout
        run("restore all back --all-steps")
        assert Path("back/checkpoint_8").read_bytes() == (
            Path("run/checkpoint_8").read_bytes()
        )
        fails(f"convert run no --step 7 {by_hand}", "no step '7'; it has the steps")

    def test_one_of_two_models(self, params):
        save("ckpt", {"gen": {"params": params}, "disc": {"params": params}})
        plan = fc.plan_from_params(params, ["fc1=4x4:HWC", "fc2=1x1"])
        Path("plan.json").write_text(plan.to_json())
        fails("convert ckpt conv --plan plan.json", r"pass prefix= \(--prefix\)")
        run("convert ckpt conv --plan plan.json --prefix gen/params")
        tree = read_checkpoint("conv").tree
        assert tree["gen"]["params"]["fc1"]["kernel"].shape == (4, 4, 3, 5)
        assert tree["disc"]["params"]["fc1"]["kernel"].shape == (48, 5)
        run("restore conv back --prefix gen/params --no-check")
        assert Path("back").read_bytes() == Path("ckpt").read_bytes()

    def test_what_would_be_done(self, params):
        save("ckpt", params)
        line = "convert ckpt conv --model model.py:Net --input 1,8,8,1"
        out = run(f"{line} --dry-run").stdout
        assert "2 of 6 leaves would be converted" in out
        assert re.search(
            r"nothing was written; \d+ bytes are needed, \d+ are free", out
        )
        assert not Path("conv").exists()
        run(line)
        fails(f"{line} --dry-run", "conv: exists already")
        fails(f"{line} --overwrite --step 3", "is one file, and has no step '3'")

    def test_a_plan_from_a_file(self, params):
        save("ckpt", params)
        run("plan model.py:Net --input 1,8,8,1 --out plan.json")
        run("convert ckpt conv.msgpack --plan plan.json")
        conv = read_checkpoint("conv.msgpack")
        assert conv.plan == fc.Plan.from_json(Path("plan.json").read_bytes())

    def test_without_code(self, params):
        save("ckpt", params)
        run("convert ckpt conv --rule fc1=4x4:HWC --rule fc2=1x1")
        run("convert ckpt same --model model.py:Net --input 1,8,8,1")
        a, b = read_checkpoint("conv").tree, read_checkpoint("same").tree
        jax.tree.map(np.testing.assert_array_equal, a, b)

    @pytest.mark.parametrize("separator", [".", "/"])
    def test_safetensors_without_code(self, params, separator):
        flat = {
            f"model{separator}{layer}{separator}{name}": value
            for layer, leaves in params.items()
            for name, value in leaves.items()
        }
        safetensors.numpy.save_file(flat, "ckpt.safetensors")
        run("convert ckpt.safetensors conv.safetensors --rule '*/fc1=4x4:CHW'")
        conv = safetensors.numpy.load_file("conv.safetensors")
        wanted = params["fc1"]["kernel"].reshape(3, 4, 4, 5).transpose(1, 2, 0, 3)
        name = separator.join(["model", "fc1", "kernel"])
        np.testing.assert_array_equal(conv[name], wanted)
        run("restore conv.safetensors back.safetensors")
        back = safetensors.numpy.load_file("back.safetensors")
        np.testing.assert_array_equal(back[name], params["fc1"]["kernel"])

    def test_to_dense_without_code(self):
        kernel = np.arange(48.0).reshape(2, 2, 3, 4)
        save("ckpt", {"a": {"kernel": kernel, "bias": np.ones(4)}})
        run("convert ckpt dense --to dense --rule a=2x2")
        dense = read_checkpoint("dense").tree["a"]["kernel"]
        np.testing.assert_array_equal(dense, kernel.reshape(12, 4))

    def test_ambiguous_is_refused_by_name(self, params):
        save("ckpt", params)
        fails(
            "convert ckpt conv --rule '*=1x1'",
            r"'conv/kernel' of shape \(3, 3, 1, 3\) is ambiguous.*'conv=skip'",
        )
        assert not Path("conv").exists()
        run("convert ckpt conv --rule conv=skip --rule '*=1x1'")

    def test_format_and_overwrite(self, params):
        save("ckpt", params)
        run("convert ckpt conv --rule fc2=1 --format safetensors")
        assert read_checkpoint("conv").format == "safetensors"
        before = Path("conv").read_bytes()
        fails("convert ckpt conv --rule fc1=4x4:HWC", "exists already.*--overwrite")
        assert Path("conv").read_bytes() == before
        run("convert ckpt conv --rule fc1=4x4:HWC --overwrite")
        assert Path("conv").read_bytes() != before
        save("back", params)
        fails("restore conv back", "exists already")
        run("restore conv back --overwrite")

    def test_what_cannot_be_converted(self, params, folder):
        save("ckpt", params)
        run("convert ckpt conv --rule fc2=1")
        fails("convert conv again --rule fc2=1", "converted to conv already")
        fails("restore ckpt back", "holds no plan")
        fails("convert nowhere conv2 --rule fc2=1", "nowhere: no such file")
        fails("convert ckpt conv2 --rule fc3=1", r"'fc3' matches no.*'fc2'")
        fails("convert ckpt conv2 --rule fc1=7x7", "'fc1/kernel'.*no multiple")
        fails("convert ckpt conv2 --rule '*=skip'", "no layer converts.*fc1: excluded")
        plain = "--model model.py:Plain --input 2"
        fails(f"convert ckpt conv2 {plain}", "no layer converts to conv: none is")
        other = "--model model.py:Tokens --input 2,3:int32"
        fails(f"convert ckpt conv2 {other}", "no leaf '.*head/kernel'")
        (folder / "plan.json").write_text("{}")
        fails("convert ckpt conv2 --plan plan.json", "plan.json: not a plan")
        Path("ckpt").write_bytes(Path("ckpt").read_bytes()[:50])
        fails("convert ckpt conv2 --rule fc2=1", "ckpt.*")
        assert not list(Path().glob("conv2*"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("", "give one of --plan FILE, --model"),
            ("--plan p --model model.py:Net", "give one of --plan"),
            ("--plan p --rule a=1", "do not go with --plan"),
            ("--plan p --to dense", "do not go with --plan"),
            ("--rule a=1 --input 1,2", "need --model"),
            ("--plan p", "p: No such file"),
        ],
    )
    def test_wrong_usage(self, options, message):
        fails(f"convert ckpt conv {options}", message, status=2)


class TestVerify:
    def test_gradients_and_rules(self):
        result = run("verify model.py:wide --input 2,4 --rule fc=2")
        assert result.stdout.startswith("EQUIVALENT: 1 layer to conv")
        assert re.search(r"fc\s+full_window\s+proved", result.stdout)
        assert "gradients: " in result.stdout
        assert result.stderr == ""

    def test_what_is_verified(self, verified):
        command = "verify model.py:Tokens --input 2,3:int32 --method __call__"
        for seed in (1, 1, 2):
            run(f"{command} --seed {seed} --no-gradients")
        a, b, c = (call[1]["params"]["head"]["kernel"] for call in verified)
        assert (a == b).all()
        assert (a != c).any()
        _, _, (ids,), options = verified[0]
        assert ids.shape == (2, 3)
        assert ids.dtype == jnp.int32
        assert options["method"] == "__call__"
        assert options["gradients"] is False
        assert options["plan"]["head"].case == "pointwise"
        run("verify model.py:Net --input 2,8,8,1 --kwarg train=false")
        assert verified[-1][-1]["train"] is False
        assert verified[-1][-1]["gradients"] is True

    def test_backends(self, verified):
        command = "verify model.py:wide --input 2,4"
        run(f"{command} --backend rocm --backend CPU --timeout 7")
        _, variables, (x,), options = verified[0]
        assert [str(backend) for backend in options["backends"]] == ["rocm", "cpu"]
        assert options["timeout"] == 7
        assert isinstance(x, jax.Array)
        run(f"{command} --backend rocm")
        _, variables, (x,), _ = verified[1]
        assert isinstance(x, jax.ShapeDtypeStruct)
        assert isinstance(variables["params"]["fc"]["kernel"], jax.ShapeDtypeStruct)
        run(command)
        assert verified[2][-1]["backends"] is None
        fails(f"{command} --backend npu", "--backend: no backend 'npu'", 2)

    def test_a_backend_that_is_not_present(self):
        result = run("verify model.py:wide --input 2,4 --backend rocm")
        assert result.stdout.startswith("LOWERED, NOT EXECUTED: 1 layer to conv")

    def test_json_markdown_and_file(self):
        command = "verify model.py:wide --input 2,4 --no-gradients"
        report = json.loads(run(f"{command} --json --out report.md").stdout)
        assert report["passed"] is True
        assert {array["kind"] for array in report["arrays"]} == {"outputs"}
        assert Path("report.md").read_text().startswith("**EQUIVALENT")
        assert "| fc | pointwise |" in run(f"{command} --markdown").stdout
        run(f"{command} --out report.json")
        assert json.loads(Path("report.json").read_text())["passed"] is True
        fails(f"{command} --json --markdown", "one of --json and --markdown", 2)

    @pytest.mark.parametrize("wrap", ["params", "state", "bare", "safetensors"])
    def test_parameters_of_a_checkpoint(self, params, wrap, verified):
        if wrap == "state":
            train_state("ckpt", params)
        elif wrap == "safetensors":
            flat = {f"{k}.{n}": v for k, d in params.items() for n, v in d.items()}
            safetensors.numpy.save_file(flat, "ckpt")
        else:
            save("ckpt", {"params": params} if wrap == "params" else params)
        run("convert ckpt conv --model model.py:Net --input 1,8,8,1")
        for name in ("ckpt", "conv"):
            run(f"verify model.py:Net --input 2,8,8,1 --checkpoint {name}")
        (_, a, _, before), (_, b, _, after) = verified
        jax.tree.map(np.testing.assert_array_equal, a, {"params": params})
        jax.tree.map(np.testing.assert_array_equal, b, {"params": params})
        assert before["converted_params"] is None
        conv = after["converted_params"]["params"]
        assert conv["fc1"]["kernel"].shape == (4, 4, 3, 5)
        assert list(after["plan"]) == list(before["plan"])

    def test_a_converted_checkpoint(self, params):
        save("ckpt", params)
        run("convert ckpt conv --rule fc2=1")
        command = "verify model.py:Net --input 2,8,8,1 --checkpoint conv"
        out = run(f"{command} --no-gradients").stdout
        assert out.startswith("EQUIVALENT: 1 layer to conv")

    def test_a_conversion_that_was_changed(self, params):
        save("ckpt", params)
        run("convert ckpt conv.msgpack --model model.py:Net --input 1,8,8,1")
        conv = read_checkpoint("conv.msgpack")
        conv.tree["fc2"]["bias"] = np.ones(5, np.float32)
        write_checkpoint("conv.msgpack", conv, overwrite=True)
        command = "verify model.py:Net --input 2,8,8,1 --checkpoint conv.msgpack"
        fails(command, r"'fc2/bias' has shape \(5,\), the model's has \(4,\)")

    def test_another_order_than_the_code_is_said(self, params, verified):
        save("ckpt", params)
        run("convert ckpt conv --rule fc1=4x4:CHW")
        command = "verify model.py:Net --input 2,8,8,1 --checkpoint conv"
        result = run(command)
        assert "'fc1' in the window (4, 4) CHW, the model's code" in result.stderr
        fails(f"{command} --rule fc1=4x4", "do not go with conv", status=2)

    def test_exit_status_when_it_fails(self, monkeypatch):
        prepare = certificates_module.prepare_layer

        def differ(*arguments, **options):
            certificate = prepare(*arguments, **options)
            return lambda: dataclasses.replace(certificate(), passed=False)

        monkeypatch.setattr(certificates_module, "prepare_layer", differ)
        result = run("verify model.py:wide --input 2,4 --no-gradients", 1)
        assert result.stdout.startswith("DIFFERENT")
        result = run("verify model.py:wide --input 2,4 --no-gradients --json", 1)
        assert json.loads(result.stdout)["passed"] is False

    def test_a_checkpoint_of_another_model(self, params):
        command = "verify model.py:Net --input 2,8,8,1 --checkpoint ckpt"
        other = {**params, "fc2": {"kernel": np.ones((5, 9)), "bias": np.ones(9)}}
        save("ckpt", other)
        shapes = r"has shape \((9,|5, 9)\), the model's has \((4,|5, 4)\)"
        fails(command, f"ckpt is not a checkpoint of this model: leaf 'fc2/.*{shapes}")
        save("ckpt", {**params, "fc3": {"bias": np.ones(4)}})
        fails(command, "the leaf 'fc3/bias', which the model lacks")
        save("ckpt", {k: v for k, v in params.items() if k != "conv"})
        fails(command, "no leaf 'conv/(bias|kernel)', the model has one of shape")
        fails(f"{command}x", "ckptx: no such file")

    def test_nothing_to_verify_is_no_success(self):
        fails("verify model.py:Plain --input 2,4", "no layer converts")


class TestVerifyCheckpoints:
    def test_two_checkpoints(self, params):
        save("ckpt", params)
        run("convert ckpt conv --rule fc1=4x4:CHW --rule fc2=1x1 --format orbax")
        out = run("verify ckpt conv").stdout
        assert (
            out == "SAME: 6 leaves, 1196 bytes, bit for bit; 2 of them moved to conv\n"
        )
        content = json.loads(run("verify conv ckpt --json").stdout)
        assert (content["passed"], content["to"]) == (True, "dense")
        kernel = params["fc1"]["kernel"].copy()
        kernel[3, 2] += 1e-6
        params["fc1"]["kernel"] = kernel
        save("other", params)
        result = run("verify other conv --out report.md", 1)
        assert result.stdout.startswith("DIFFERENT: 1 of 6 leaves")
        assert "fc1/kernel" in Path("report.md").read_text()

    def test_wrong_use(self, params):
        save("ckpt", params)
        fails("verify ckpt nothing", "nothing: no such file")
        assert "no other option" in run("verify ckpt ckpt --input 1,8", 2).stderr


class TestInspect:
    def test_leaves_and_total(self, params):
        save("ckpt", params)
        out = run("inspect ckpt").stdout
        assert "ckpt: msgpack, 6 leaves, 1.17 KiB: 299 float32" in out
        assert re.search(r"fc1/\s+2 leaves\s+980 B", out)
        assert re.search(r"fc1/kernel\s+float32\s+\(48, 5\)\s+960 B", out)
        assert "never converted" in out

    def test_some_of_the_leaves(self, params):
        save("ckpt", params)
        out = run("inspect ckpt --match '*/bias'").stdout
        assert "kernel" not in out
        assert re.search(r"fc1/bias\s+float32\s+\(5,\)\s+20 B", out)
        content = json.loads(run("inspect ckpt --match 'fc1/*' --json").stdout)
        assert [leaf["path"] for leaf in content["leaves"]] == [
            "fc1/bias",
            "fc1/kernel",
        ]
        fails("inspect ckpt --match 'f2/*'", r"no leaf of ckpt.*conv/bias", status=2)

    def test_stored_plan(self, params):
        save("ckpt", params)
        run("convert ckpt conv --rule fc1=4x4:HWC")
        assert "(48, 5) -> (4, 4, 3, 5)" in run("inspect conv").stdout
        content = json.loads(run("inspect conv --json").stdout)
        assert content["bytes"] == 1196
        assert content["leaves"][0].keys() == {"path", "dtype", "shape", "bytes"}
        assert list(content["plan"]["layers"]) == ["fc1"]
        assert json.loads(run("inspect ckpt --json").stdout)["plan"] is None

    def test_no_checkpoint(self, folder):
        fails("inspect model.py", "model.py: no checkpoint")
        (folder / "empty").mkdir()
        fails("inspect empty", "it is empty")


class TestExplain:
    def test_the_chapters_exercises(self):
        out = run("explain --input 7x7 --kernel 7x7 --stride 2 --padding VALID").stdout
        assert "case: full_window" in out
        assert "Strides 2x2 change nothing" in out
        out = run("explain --input 7x7 --kernel 7x7 --padding 1").stdout
        assert "case: unrolled" in out
        assert "position (1, 1) of it is the Dense's value" in out
        out = run("explain --input 8x8 --kernel 1 --stride 2").stdout
        assert "strided subsample" in out

    @pytest.mark.parametrize(
        ("options", "case"),
        [
            ("--input 8 --kernel 4 --stride 4", "patchify"),
            ("--input 4x6 --kernel 4x6 --padding 0:0,0:0", "full_window"),
            ("--input 4x6 --kernel 4x6 --padding 0,1", "unrolled"),
            ("--input 4x6 --kernel 3 --padding same", "unrolled"),
            ("--input 4x6 --kernel 1x1 --groups 2", "grouped"),
            ("--input 3 --kernel 3 --kernel-dilation 2 --padding 1", "unrolled"),
            ("--input 3 --kernel 3 --input-dilation 2", "unrolled"),
            ("--input 3,4,5 --kernel 3,4,5 --padding -0:0,0,0", "full_window"),
        ],
    )
    def test_json(self, options, case):
        found = json.loads(run(f"explain {options} --json").stdout)
        assert found["case"] == case
        text = run(f"explain {options}").stdout
        assert f"case: {case}" in text
        assert found["reason"] in text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--input 7x --kernel 7", "--input '7x' is no size"),
            ("--input 7x7 --kernel 0", "kernel_size: every entry"),
            ("--input 7x7 --kernel 9", "span 9 inputs"),
            ("--input 7x7 --kernel 1x1x1", "kernel_size.*entries"),
            ("--input 7x7 --kernel 7 --padding 1:", "--padding '1:' is neither"),
            ("--input 7x7 --kernel 7 --padding SOME", "padding.*SOME"),
            ("--input 7x7 --kernel 7 --groups 0", "groups: must be"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        fails(f"explain {options}", message, status=2)

    def test_needs_both_sizes(self):
        assert "--kernel" in run("explain --input 7x7", 2).stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64"])
def test_random_inputs_are_of_their_dtype_and_seed(dtype):
    spec = parse_input(f"64,3:{dtype}")
    (x,), (y,), (z,) = (random_inputs([spec], seed) for seed in (0, 0, 1))
    assert x.shape == (64, 3)
    assert x.dtype == jnp.dtype(dtype)
    assert (x == y).all()
    assert (x != z).any()
    if jnp.issubdtype(x.dtype, jnp.integer):
        assert set(np.unique(x)) == {0, 1, 2, 3}


class TestProcess:
    """Real processes: the two ways to start it, status, what goes where."""

    def start(self, *command, **env):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
        return subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=120, check=False
        )

    def test_as_a_module(self):
        done = self.start(sys.executable, "-m", "fcconv_jax", "--help", TERM="dumb")
        assert done.returncode == 0
        assert done.stderr == ""
        assert "explain" in done.stdout
        assert "\x1b" not in done.stdout

    def test_help_does_not_wait_for_jax(self):
        code = """
            import runpy, sys
            sys.argv = ["fcconv", "--help"]
            try:
                runpy.run_module("fcconv_jax", run_name="__main__")
            except SystemExit as stop:
                assert not stop.code
            slow = {"jax", "flax", "numpy", "optax", "orbax"} & set(sys.modules)
            assert not slow, slow
        """
        done = self.start(sys.executable, "-c", textwrap.dedent(code))
        assert done.returncode == 0, done.stderr
        assert "explain" in done.stdout

    def test_entry_point(self):
        script = Path(sys.executable).with_name("fcconv")
        sizes = ("--input", "7x7", "--kernel", "7")
        done = self.start(script, "explain", *sizes, "--json")
        assert done.returncode == 0
        assert done.stderr == ""
        assert json.loads(done.stdout)["case"] == "full_window"

    def test_status_and_streams_of_a_failure(self):
        done = self.start(
            sys.executable, "-m", "fcconv_jax", "convert", "a", "b", "--rule", "c=1"
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"error: .*/a: no such file or directory\n", done.stderr)

    def test_an_error_of_the_model_is_one_line(self, folder):
        (folder / "broken.py").write_text("1 / 0\n")
        done = self.start(sys.executable, "-m", "fcconv_jax", "plan", "broken.py:Net")
        assert done.returncode == 1
        assert done.stderr.startswith("error: broken.py:1: 1 / 0: ZeroDivisionError")
        assert len(done.stderr.splitlines()) == 1
