import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import pytest

import fcconv_jax as fc


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Step),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
        )
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.Dense(6, use_bias=False, name="head")(x)
        x, _ = scan(name="steps")(x, None)
        x = nn.DenseGeneral((2, 3), batch_dims=(0,), name="groups")(x)
        table = nn.Embed(3, 6, name="table")
        return table.attend(x.reshape(-1, 6) + table(jnp.array(1)))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(6)(x), None


X = jnp.zeros((2, 5, 4, 3))
PLAN = fc.make_plan(Net(), X)


def damaged(edit):
    content = json.loads(PLAN.to_json())
    edit(content)
    return json.dumps(content)


def test_a_plan_is_a_mapping():
    assert list(PLAN) == ["head", "steps/Dense_0", "groups"]
    assert len(PLAN) == 3
    assert "head" in PLAN
    assert "conv" not in PLAN
    assert PLAN["head"].window == (5, 4)
    assert PLAN["head"].bias is None
    assert PLAN["steps/Dense_0"].stack_axes == (1,)
    assert PLAN["groups"].case == "grouped"
    assert set(PLAN.skipped) == {"table/embedding"}
    with pytest.raises(TypeError):
        PLAN.skipped["head"] = "no"
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.to = "dense"  # pyright: ignore
    with pytest.raises(KeyError):
        PLAN["tail"]


def test_json_round_trip():
    text = PLAN.to_json()
    again = fc.Plan.from_json(text)
    assert again == PLAN
    assert hash(again) == hash(PLAN)
    assert again.to_json() == text
    assert fc.Plan.from_json(text.encode()) == PLAN
    content = json.loads(text)
    assert (content["format"], content["version"]) == ("fcconv_jax.plan", 3)
    assert content["layers"]["head"]["order"] == "CHW"


def test_inverse():
    back = PLAN.inverse()
    assert back.to == "dense"
    assert back != PLAN
    assert back.inverse() == PLAN
    assert PLAN.inverse() is back
    assert back["head"].kernel.source == PLAN["head"].kernel.target
    assert fc.Plan.from_json(back.to_json()) == back


def test_str_is_a_table():
    lines = str(PLAN).splitlines()
    assert lines[0] == "3 layers to conv"
    assert lines[1].split() == ["path", "layer", "case", "kernel", "order"]
    assert "(60|80, 6)".replace("60|", "") in lines[2]
    assert lines[2].startswith("head")
    assert lines[2].endswith("CHW")
    assert "stacked on 1" in lines[3]
    assert lines[5] == "1 skipped"
    assert lines[6].startswith("table/embedding")
    columns = {line.index("full_window") for line in lines if "full_window" in line}
    columns |= {line.index("pointwise") for line in lines if "pointwise" in line}
    assert len(columns) == 1
    assert str(fc.Plan("conv")) == "0 layers to conv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[]", "Expected a plan, with .* Pass the result of"),
        ("{}", "Expected a plan, with .* Pass the result of"),
        ('{"format": "other"}', "Expected a plan, with .* Pass the result of"),
        (damaged(lambda c: c.update(version=4)), "version 4.*Upgrade fcconv_jax"),
        (damaged(lambda c: c.update(version=2)), "version 2.*Make the plan again"),
        (damaged(lambda c: c.update(version="1")), "version"),
        (damaged(lambda c: c.update(version=True)), "version"),
        (damaged(lambda c: c.update(version=0)), "version"),
        (damaged(lambda c: c.pop("version")), "version"),
        (damaged(lambda c: c.pop("layers")), "damaged"),
        (damaged(lambda c: c.pop("skipped")), "damaged"),
        (damaged(lambda c: c.pop("to")), "damaged"),
        (damaged(lambda c: c.update(to="linear")), "damaged.*goes to 'linear'"),
        (damaged(lambda c: c.update(to="dense")), "plan to dense, with 'head' to conv"),
        (damaged(lambda c: c["layers"]["head"].update(to="mix")), "damaged.*to 'mix'"),
        (damaged(lambda c: c.update(layers=[1])), "damaged"),
        (damaged(lambda c: c.update(options={"name": {}})), "damaged"),
        (damaged(lambda c: c["layers"].update(head=3)), "damaged"),
        (damaged(lambda c: c["layers"]["head"].pop("window")), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(extra=1)), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(leaves={})), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(base="magic")), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(order="HHC")), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(order=5)), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(layout="spread")), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(groups=0)), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(groups="2")), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(window=[5, "4"])), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(window=[5, 4, 1])), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(strides=[1])), "damaged"),
        (damaged(lambda c: c["layers"]["head"].update(stack_axes=[1.5])), "damaged"),
        (
            damaged(lambda c: c["layers"]["head"]["leaves"]["kernel"].pop("perm")),
            "damaged",
        ),
        (
            damaged(
                lambda c: c["layers"]["head"]["leaves"]["kernel"].update(perm=[0, 0])
            ),
            "damaged",
        ),
        (
            damaged(
                lambda c: c["layers"]["head"]["leaves"]["kernel"].update(target=[7])
            ),
            "damaged",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text, message):
    with pytest.raises(fc.PlanError, match=message):
        fc.Plan.from_json(text)


def test_joining_plans():
    head = fc.Plan("conv", (("head", PLAN["head"]),), (("other", "why"),))
    rest = fc.Plan("conv", tuple((k, v) for k, v in PLAN.layers if k != "head"))
    both = head | rest
    assert list(both) == list(PLAN)
    assert both.skipped == {"other": "why"}
    moved = dataclasses.replace(PLAN["head"], input_shape=(9, 80))
    assert (head | fc.Plan("conv", (("head", moved),)))["head"] == PLAN["head"]
    other = dataclasses.replace(PLAN["head"], order="HWC")
    with pytest.raises(fc.PlanError, match="'head' is planned in two ways"):
        head | fc.Plan("conv", (("head", other),))
    with pytest.raises(fc.PlanError, match="planned in two ways"):
        PLAN | PLAN.inverse()
    with pytest.raises(TypeError):
        PLAN | {"head": 1}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("head=7x7", fc.Rule("head", (7, 7))),
        ("a=b/head=7:CW", fc.Rule("a=b/head", (7,), "CW")),
        ("*/fc=2x3x4:DHWC", fc.Rule("*/fc", (2, 3, 4), "DHWC")),
        ("decoder/*=skip", fc.Rule("decoder/*", skip=True)),
        ("head=auto", fc.Rule("head")),
        ("*<1000=skip", fc.Rule("*", skip=True, below=1000)),
        ("a<b<9=1x1", fc.Rule("a<b", (1, 1), below=9)),
        ("*=keep", fc.Rule("*", layout="keep")),
        (
            "fc=4x4:OHWI:CHW:flat",
            fc.Rule("fc", (4, 4), "CHW", "flat", kernel_layout="OHWI"),
        ),
    ],
)
def test_rules_from_text(text, rule):
    assert fc.Rule.parse(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "head",
        "=7x7",
        "head=",
        "head=7x",
        "head=x7",
        "head=a",
        "head=7:C:H",
        "a=1:2",
        "",
    ],
)
def test_texts_that_are_no_rules(text):
    with pytest.raises(fc.PlanError, match="Expected a rule PATTERN="):
        fc.Rule.parse(text)


def test_patterns_match_the_whole_path():
    assert fc.Rule("*/fc?").matches("a/b/fc1", 6)
    assert not fc.Rule("fc").matches("a/fc", 6)
    assert not fc.Rule("FC").matches("fc", 6)
    assert fc.Rule("layers_[01]").matches("layers_1", 6)
    assert fc.Rule("fc", below=7).matches("fc", 6)
    assert not fc.Rule("fc", below=6).matches("fc", 6)
