"""``fcconv convert`` and ``restore``."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import fcconv_jax as fc
from fcconv_jax.checkpoints import read_checkpoint

from .commands import fails, run, save, train_state


def test_train_state_there_and_back(params):
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


def test_steps_of_a_run(params):
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


def test_one_of_two_models(params):
    save("ckpt", {"gen": {"params": params}, "disc": {"params": params}})
    plan = fc.plan_from_params(params, ["fc1=4x4:HWC", "fc2=1x1"])
    Path("plan.json").write_text(plan.to_json())
    out = run("convert ckpt both --plan plan.json").stdout
    assert "4 of 12 leaves converted" in out
    run("restore both again")
    assert Path("again").read_bytes() == Path("ckpt").read_bytes()
    run("convert ckpt conv --plan plan.json --prefix gen/params")
    tree = read_checkpoint("conv").tree
    assert tree["gen"]["params"]["fc1"]["kernel"].shape == (4, 4, 3, 5)
    assert tree["disc"]["params"]["fc1"]["kernel"].shape == (48, 5)
    run("restore conv back --prefix gen/params --no-check")
    assert Path("back").read_bytes() == Path("ckpt").read_bytes()


def test_what_would_be_done(params):
    save("ckpt", params)
    line = "convert ckpt conv --model model.py:Net --input 1,8,8,1"
    out = run(f"{line} --dry-run").stdout
    assert "2 of 6 leaves would be converted" in out
    assert re.search(r"nothing was written; \d+ bytes are needed, \d+ are free", out)
    assert not Path("conv").exists()
    run(line)
    fails(f"{line} --dry-run", "conv: exists already")
    fails(f"{line} --overwrite --step 3", "of steps for step='3', got a single file")


def test_a_plan_from_a_file(params):
    save("ckpt", params)
    run("plan model.py:Net --input 1,8,8,1 --out plan.json")
    run("convert ckpt conv.msgpack --plan plan.json")
    conv = read_checkpoint("conv.msgpack")
    assert conv.plan == fc.Plan.from_json(Path("plan.json").read_bytes())


def test_without_code(params):
    save("ckpt", params)
    run("convert ckpt conv --rule fc1=4x4:HWC --rule fc2=1x1")
    run("convert ckpt same --model model.py:Net --input 1,8,8,1")
    a, b = read_checkpoint("conv").tree, read_checkpoint("same").tree
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("separator", [".", "/"])
def test_safetensors_without_code(params, separator):
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


def test_to_dense_without_code():
    kernel = np.arange(48.0).reshape(2, 2, 3, 4)
    save("ckpt", {"a": {"kernel": kernel, "bias": np.ones(4)}})
    run("convert ckpt dense --to dense --rule a=2x2")
    dense = read_checkpoint("dense").tree["a"]["kernel"]
    np.testing.assert_array_equal(dense, kernel.reshape(12, 4))


def test_ambiguous_is_refused_by_name(params):
    save("ckpt", params)
    fails(
        "convert ckpt conv --rule '*=1x1'",
        r"'conv/kernel' of shape \(3, 3, 1, 3\), which may.*'conv=skip'",
    )
    assert not Path("conv").exists()
    run("convert ckpt conv --rule conv=skip --rule '*=1x1'")


def test_format_and_overwrite(params):
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


def test_what_cannot_be_converted(params, folder):
    save("ckpt", params)
    run("convert ckpt conv --rule fc2=1")
    fails("convert conv again --rule fc2=1", "got one converted to conv")
    fails("restore ckpt back", "expected one stored plan, got none")
    fails("convert nowhere conv2 --rule fc2=1", "nowhere: no such file")
    fails("convert ckpt conv2 --rule fc3=1", r"'fc3' matches no.*'fc2'")
    fails("convert ckpt conv2 --rule fc1=7x7", "'fc1/kernel'.*expected a multiple")
    fails("convert ckpt conv2 --rule '*=skip'", "a layer that converts.*fc1: excluded")
    plain = "--model model.py:Plain --input 2"
    fails(f"convert ckpt conv2 {plain}", "converts to conv, got none: the model has no")
    other = "--model model.py:Tokens --input 2,3:int32"
    fails(f"convert ckpt conv2 {other}", "no leaf '.*head/kernel'")
    (folder / "plan.json").write_text("{}")
    fails("convert ckpt conv2 --plan plan.json", "plan.json: Expected a plan,")
    Path("ckpt").write_bytes(Path("ckpt").read_bytes()[:50])
    fails("convert ckpt conv2 --rule fc2=1", "ckpt.*")
    assert not list(Path().glob("conv2*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "one source of the plan. Pass --plan FILE, --model"),
        ("--plan p --model model.py:Net", "one source of the plan"),
        ("--plan p --rule a=1", "Expected --plan alone"),
        ("--plan p --to dense", "Expected --plan alone"),
        ("--rule a=1 --input 1,2", "Expected --model"),
        ("--plan p", "p: can't be read .No such file"),
    ],
)
def test_wrong_usage(options, message):
    fails(f"convert ckpt conv {options}", message, status=2)


def test_back_after_training_on(params):
    """Steps that training saved after the conversion do not hold the plan."""
    Path("run").mkdir()
    save("run/checkpoint_1", params)
    run("plan model.py:Net --input 1,8,8,1 --out plan.json")
    run("convert run run_conv --plan plan.json")
    tree = read_checkpoint("run_conv").tree
    save("run_conv/checkpoint_2", tree)
    out = run("restore run_conv back").stdout
    assert "by the plan that is stored in step checkpoint_1" in out
    assert read_checkpoint("back").tree["fc1"]["kernel"].shape == (48, 5)
    run("restore run_conv/checkpoint_2 back2 --plan plan.json")
    assert Path("back2").read_bytes() == Path("run/checkpoint_1").read_bytes()
    fails("restore run_conv/checkpoint_2 back3", "stored plan, got none.*--plan")
    line = "convert run_conv back4 --plan plan.json"
    fails(line, "in this form already.*fcconv restore --plan")
    fails(f"{line} --to dense", "already contains.*fcconv restore --plan", status=2)


def test_a_state_dict_of_pytorch():
    rng = np.random.default_rng(0)
    state = {
        "patch_embed.proj.weight": rng.normal(size=(6, 3, 4, 2)),
        "patch_embed.proj.bias": rng.normal(size=6),
        "norm.weight": np.ones(6),
        "head.weight": rng.normal(size=(5, 6)),
    }
    safetensors.numpy.save_file(state, "model.safetensors")
    by_hand = "convert model.safetensors new.safetensors --rule patch_embed.proj=dense"
    assert "1 of 4 leaves converted" in run(by_hand).stdout
    new = safetensors.numpy.load_file("new.safetensors")
    weight = state["patch_embed.proj.weight"]
    np.testing.assert_array_equal(new["patch_embed.proj.weight"], weight.reshape(6, 24))
    run("restore new.safetensors back.safetensors")
    again = Path("back.safetensors").read_bytes()
    assert again == Path("model.safetensors").read_bytes()
    run("convert model.safetensors both.safetensors --rule *proj=dense --rule head=1x1")
    both = safetensors.numpy.load_file("both.safetensors")
    assert both["head.weight"].shape == (5, 6, 1, 1)
