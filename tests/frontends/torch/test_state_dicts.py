"""State dicts of PyTorch, converted for a module whose layer was swapped by hand."""

import copy

import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

torch = pytest.importorskip("torch", reason=install_command("torch"))
save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

CONVS = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
WINDOWS = {1: (3,), 2: (4, 2), 3: (2, 3, 4)}


class Patches(torch.nn.Module):
    """A patch embedding; ``swap`` writes its convolution as a Linear."""

    def __init__(self, rank, bias=True, groups=1, dtype=torch.float64):
        super().__init__()
        window = WINDOWS[rank]
        made = CONVS[rank](4, 6, window, window, groups=groups, bias=bias)
        self.patch_embed = torch.nn.ModuleDict({"proj": made.to(dtype)})
        self.norm = torch.nn.BatchNorm1d(6).to(dtype)
        self.window, self.groups = window, groups

    def swap(self, order="CHW"):
        swapped = copy.deepcopy(self)
        features = 4 * int(np.prod(self.window))
        old = self.patch_embed["proj"]
        new = torch.nn.Linear(features, 6, old.bias is not None).to(old.weight.dtype)
        with torch.no_grad():
            new.weight.zero_()
        swapped.patch_embed["proj"] = new
        swapped.order = order
        return swapped

    def forward(self, x):
        proj = self.patch_embed["proj"]
        if not isinstance(proj, torch.nn.Linear):
            return proj(x).flatten(2).transpose(1, 2)
        rank = len(self.window)
        counts = [n // k for n, k in zip(x.shape[2:], self.window)]
        split = [n for pair in zip(counts, self.window) for n in pair]
        x = x.reshape(len(x), 4, *split)
        places = [2 + 2 * i for i in range(rank)]
        inside = [3 + 2 * i for i in range(rank)]
        features = [1, *inside] if self.order == "CHW" else [*inside, 1]
        rows = x.permute(0, *places, *features)
        return proj(rows.reshape(len(x), int(np.prod(counts)), -1))


def image(rank, dtype=torch.float64):
    sizes = [2 * k for k in WINDOWS[rank]]
    return torch.randn(2, 4, *sizes, generator=torch.manual_seed(1)).to(dtype)


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("order", ["CHW", "HWC"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_patch_embedding_loads_as_a_linear(rank, order, tmp_path):
    model = Patches(rank)
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    letters = "DHW"[3 - rank :]
    named = {"CHW": "", "HWC": f":{letters}C"}[order]
    plan = fc.plan_from_params(state, [f"patch_embed.proj=dense{named}"])
    assert list(plan) == ["patch_embed.proj.weight"]
    report = fc.convert_checkpoint(
        tmp_path / "model.safetensors",
        tmp_path / "new.safetensors",
        plan,
        progress=False,
    )
    assert [name for name, *_ in report.converted] == ["patch_embed.proj.weight"]
    new = load_file(tmp_path / "new.safetensors")
    equal(new, fc.convert_params(state, plan))
    swapped = model.swap(order)
    swapped.load_state_dict(new, strict=True)
    torch.testing.assert_close(swapped(image(rank)), model(image(rank)))
    fc.restore_checkpoint(
        tmp_path / "new.safetensors", tmp_path / "back.safetensors", progress=False
    )
    again = (tmp_path / "back.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()
    # And from the Linear to the convolution, with nothing but a rule.
    size = "x".join(map(str, WINDOWS[rank]))
    there = fc.plan_from_params(new, [f"patch_embed.proj={size}{named}"])
    equal(fc.convert_params(new, there), state)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
def test_every_dtype_keeps_its_bits(dtype):
    bits = torch.randint(0, 256, (6, 4, 3, 2 * dtype.itemsize), dtype=torch.uint8)
    state = {"proj.weight": bits.view(dtype), "proj.bias": torch.zeros(6)}
    plan = fc.plan_from_params(state, ["proj=dense:HWC"])
    moved = fc.convert_params(state, plan)["proj.weight"]
    assert (moved.shape, moved.dtype) == ((6, 24), dtype)
    want = state["proj.weight"].view(
        torch.uint8 if dtype.itemsize == 1 else torch.int16
    )
    got = moved.view(want.dtype).reshape(6, 3, 2, 4).permute(0, 3, 1, 2)
    assert torch.equal(got, want)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_behind_a_flatten_becomes_a_convolution(bias):
    head = torch.nn.Linear(4 * 3 * 5, 7, bias)
    x = torch.randn(2, 4, 3, 5)
    plan = fc.plan_from_params(head.state_dict(), [fc.Rule("", (3, 5))])
    conv = torch.nn.Conv2d(4, 7, (3, 5), bias=bias)
    conv.load_state_dict(fc.convert_params(head.state_dict(), plan), strict=True)
    torch.testing.assert_close(conv(x).flatten(1), head(x.flatten(1)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_pointwise_both_ways(rank):
    conv, x = CONVS[rank](4, 6, 1), torch.randn(2, 4, *[3] * rank)
    linear = torch.nn.Linear(4, 6)
    plan = fc.plan_from_params(conv.state_dict(), ["*=dense"])
    linear.load_state_dict(fc.convert_params(conv.state_dict(), plan), strict=True)
    torch.testing.assert_close(linear(x.movedim(1, -1)).movedim(-1, 1), conv(x))
    ones = "x".join("1" * rank)
    back = fc.plan_from_params(linear.state_dict(), [f"*={ones}"])
    equal(fc.convert_params(linear.state_dict(), back), conv.state_dict())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_grouped_convolutions_become_linears_side_by_side(rank):
    model, x = Patches(rank, groups=2), image(rank)
    state = model.state_dict()
    plan = fc.plan_from_params(state, ["patch_embed.proj=dense:groups2"])
    moved = fc.convert_params(state, plan)
    weight = moved["patch_embed.proj.weight"]
    taps = int(np.prod(WINDOWS[rank]))
    assert weight.shape == (2, 3, 2 * taps)
    assert moved["patch_embed.proj.bias"] is state["patch_embed.proj.bias"]
    first = x[(..., *(slice(0, k) for k in WINDOWS[rank]))]
    rows = first.reshape(2, 2, 2 * taps)
    y = torch.einsum("...gi,goi->...go", rows, weight).flatten(-2)
    y = y + moved["patch_embed.proj.bias"]
    torch.testing.assert_close(y, model(x)[:, 0])
    equal(fc.restore_params(moved, plan), state)
    size = "x".join(map(str, WINDOWS[rank]))
    there = fc.plan_from_params(moved, [f"patch_embed.proj={size}:groups2"])
    equal(fc.convert_params(moved, there), state)


REFUSED = {
    "depthwise": ({"a.weight": (6, 1, 3, 3)}, ["a=dense"], "depthwise.*dense:groups6"),
    "groups": ({"a.weight": (6, 2, 3, 3)}, ["a=dense:groups4"], "divide the 6 output"),
    "transposed": (
        {"a.weight": (6, 4, 3, 3), "a.bias": (4,)},
        ["a=dense"],
        r"'a\.bias' has shape \(4,\).*transposed",
    ),
    "embedding": ({"a.weight": (50, 8)}, ["*=1x1"], "may be an Embedding's.*in full"),
    "linear": ({"a.weight": (50, 8)}, ["a=dense"], "expected a window"),
    "window": ({"a.weight": (50, 8)}, ["a=3x3"], "multiple of the 9 taps"),
    "another window": (
        {"a.weight": (5, 2, 3, 3)},
        ["a=dense:2x2"],
        "got 2x2 in the rule",
    ),
    "a conv already": ({"a.weight": (5, 2, 3, 3)}, ["a=3x3"], "conv form already"),
    "experts": ({"a.weight": (4, 6, 8)}, ["a=1"], "Expected a kernel of two axes"),
    "grouped experts": (
        {"a.weight": (4, 6, 8)},
        ["a=1:groups3"],
        r"as \(3, out/3, in\)",
    ),
    "lora": (
        {"a.weight": (6, 4), "a.lora_A.weight": (2, 4)},
        ["a=1"],
        r"a kernel and a bias in layer .*lora_A\.weight",
    ),
    "no such layer": ({"a.weight": (6, 4)}, ["b=1"], "matches no linear layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_name_and_a_shape_leave_open_is_refused(case):
    shapes, rules, message = REFUSED[case]
    with pytest.raises(fc.PlanError, match=message):
        fc.plan_from_params(shapes, rules)


def test_one_channel_is_no_depthwise_convolution_if_the_rule_says_so():
    conv = torch.nn.Conv2d(1, 6, 3, 3)
    plan = fc.plan_from_params(conv.state_dict(), ["*=dense:groups1"])
    linear = torch.nn.Linear(9, 6)
    linear.load_state_dict(fc.convert_params(conv.state_dict(), plan), strict=True)
    x = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(linear(x.flatten(1)), conv(x).flatten(1))


def test_rules_that_a_trace_contradicts_are_refused():
    def call(params, x):
        return x @ params["fc.weight"].T

    params = {"fc.weight": np.ones((3, 4), np.float32)}
    x = np.ones((2, 4), np.float32)
    assert list(fc.make_plan(call, params, x, rules=["fc=conv"])) == ["fc.weight"]
    with pytest.raises(fc.PlanError, match=r"Pass to='dense'"):
        fc.make_plan(call, params, x, rules=["fc=dense"])
    with pytest.raises(fc.PlanError, match="without groups"):
        fc.make_plan(call, params, x, rules=["fc=groups2"])
