import dataclasses
from typing import Any

import numpy as np
import pytest
from frontends.library_checks import check_held, check_model, check_slide
from hypothesis import given, settings
from hypothesis import strategies as st

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

torch = pytest.importorskip("torch", reason=install_command("torch"))
pytest.importorskip("torchax", reason=install_command("torch"))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3 * 4 * 6, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net().eval()
    made.norm.running_var.fill_(3.0)
    return made


X = torch.randn(2, 2, 6, 8)


def test_a_module(net):
    want = net(X).detach().numpy()
    for x in (X, X.numpy()):
        plan = check_model(net, x, "head.weight", "CHW")
        check_held(net, x, plan, want)
    check_slide(net, X.numpy(), (2, 3), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_dict_comes_back_to_the_bit(net, dtype):
    plan = fc.make_plan(net, X)
    state = {name: x.clone() for name, x in net.to(dtype).state_dict().items()}
    moved = fc.convert_params(state, plan)
    assert moved["head.weight"].shape == (5, 3, 4, 6)  # as nn.Conv2d loads it
    assert moved["head.weight"].dtype == dtype
    back = fc.restore_params(moved, plan)
    fresh = Net().to(dtype)
    fresh.load_state_dict(back, strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_params_are_the_whole_state_dict(net):
    state = {name: 2 * value for name, value in net.state_dict().items()}
    assert fc.verify(net, state, X, progress=False).passed
    del state["norm.running_var"]
    with pytest.raises(TypeError, match=r"'norm\.running_var'"):
        fc.verify(net, state, X, progress=False)


def test_training_mode_is_refused(net):
    net.norm.train()
    with pytest.raises(TypeError, match=r"at 'norm'.*Call model\.eval\(\)"):
        fc.make_plan(net, X)


class Tied(torch.nn.Module):
    def __init__(self, clone=False):
        super().__init__()
        self.table = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        weight = self.table.weight
        self.head.weight = torch.nn.Parameter(weight.clone()) if clone else weight

    def forward(self, ids):
        return self.head(self.table(ids))


def test_weights_tied_to_a_table_stay_until_they_are_untied():
    ids = torch.tensor([[1, 2, 3]])
    plan = fc.make_plan(Tied().eval(), ids)
    assert not plan
    assert "tied to 'table.weight'" in plan.skipped["head.weight"]
    report = fc.verify(Tied(clone=True).eval(), ids, progress=False)
    assert report.passed
    assert report.planned == 1


def test_weights_that_two_layers_share_convert_alike():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Shared().eval()
    plan = fc.make_plan(model, torch.randn(2, 4))
    assert list(plan) == ["first.weight", "second.weight"]
    moved = fc.convert_params(model.state_dict(), plan)
    assert torch.equal(moved["first.weight"], moved["second.weight"])
    Shared().load_state_dict(fc.restore_params(moved, plan), strict=True)


def test_to_dense_in_the_order_of_unfold():
    conv = torch.nn.Conv2d(3, 8, (2, 4), (2, 4)).eval()
    x = torch.randn(2, 3, 6, 8)
    plan = fc.make_plan(conv, x, to="dense")
    assert (plan["weight"].case, plan["weight"].order) == ("patchify", "CHW")
    linear = torch.nn.Linear(24, 8)
    linear.load_state_dict(fc.convert_params(conv.state_dict(), plan), strict=True)
    rows = torch.nn.functional.unfold(x, (2, 4), stride=(2, 4)).transpose(1, 2)
    torch.testing.assert_close(linear(rows), conv(x).flatten(2).transpose(1, 2))
    hwc = fc.make_plan(conv, x, to="dense", rules=["*=dense:HWC"])
    assert fc.verify(conv, x, plan=hwc, progress=False).passed


def test_grouped_convolutions_go_to_dense():
    conv = torch.nn.Conv2d(4, 6, 2, 2, groups=2).eval()
    x = torch.randn(2, 4, 6, 8)
    plan = fc.make_plan(conv, x, to="dense")
    assert plan["weight"].kernel.target == (2, 3, 8)
    assert plan["weight"].leaves == (
        fc.plan_from_params(conv.state_dict(), ["*=dense:groups2"])["weight"].leaves
    )
    assert fc.verify(conv, x, plan=plan, progress=False).passed


def test_the_input_may_stand_where_params_would(net, tmp_path):
    assert fc.verify(net, X, progress=False).passed
    pytest.importorskip("flatbuffers", reason=install_command("stablehlo"))
    file = fc.export(net, X, path=tmp_path / "net.stablehlo", progress=False)
    assert file.passed


def test_a_module_in_the_place_of_its_params(net):
    with pytest.raises(fc.PlanError, match=r"Pass its state_dict\(\)"):
        fc.convert_params(net, fc.make_plan(net, X))


def test_outputs_by_name():
    class Named(Net):
        def forward(self, x):
            return {"y": (super().forward(x), None), "none": None}

    model = Named().eval()
    y = fc.convert_model(model, fc.make_plan(model, X))(X)
    assert list(y) == ["y"]
    np.testing.assert_allclose(y["y"][0], model(X)["y"][0].detach(), atol=1e-5)


@dataclasses.dataclass
class Scores:
    logits: Any
    hidden: Any = None


def test_outputs_in_dataclasses_and_of_several_results():
    class Ranked(Net):
        def forward(self, x):
            y = super().forward(x)
            return Scores(y), y.topk(2)

    model = Ranked().eval()
    named, (values, places) = fc.convert_model(model, fc.make_plan(model, X))(X)
    want, top = model(X)
    np.testing.assert_allclose(named["logits"], want.logits.detach(), atol=1e-5)
    np.testing.assert_allclose(values, top.values.detach(), atol=1e-5)
    np.testing.assert_array_equal(places, top.indices)


PARAMETRIZED = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "weight_norm of old": torch.nn.utils.weight_norm,
    "spectral_norm of old": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's, of the old ones
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_weights_stay(how):
    model = Net()
    model.conv = PARAMETRIZED[how](model.conv)
    model.eval()
    plan = fc.make_plan(model, X)
    assert list(plan) == ["head.weight"]
    np.testing.assert_allclose(
        fc.convert_model(model, plan)(X), model(X).detach(), rtol=1e-4, atol=1e-4
    )
    state = model.state_dict()
    model.load_state_dict(fc.restore_params(fc.convert_params(state, plan), plan))


def test_attributes_that_are_tensors():
    class Scaled(Net):
        def __init__(self, held):
            super().__init__()
            self.scale = torch.tensor(2.0) if held else [torch.full((5,), 2.0)]

        def forward(self, x):
            scale = self.scale if torch.is_tensor(self.scale) else self.scale[0]
            return super().forward(x) * scale

    model = Scaled(True).eval()
    y = fc.convert_model(model, fc.make_plan(model, X))(X)
    np.testing.assert_allclose(y, model(X).detach(), atol=1e-5)
    with pytest.raises(fc.PlanError, match=r"in Scaled at .*Call register_buffer"):
        fc.make_plan(Scaled(False).eval(), X)


def test_values_that_decide_are_named():
    class Deciding(Net):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    message = r"Deciding, which reads one at .*y\.sum.*Use torch\.where"
    with pytest.raises(fc.PlanError, match=message):
        fc.make_plan(Deciding().eval(), X)


def test_a_wrapped_module_is_refused(net):
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(TypeError, match=r"OptimizedModule\. Pass model\._orig_mod"):
        fc.make_plan(compiled, X)
    assert fc.make_plan(compiled._orig_mod, X)


LAYERS = {
    1: torch.nn.ConvTranspose1d,
    2: torch.nn.ConvTranspose2d,
    3: torch.nn.ConvTranspose3d,
}


@st.composite
def transposed_layers(draw):
    """A transposed convolution, and an input that it has an output for."""
    rank = draw(st.integers(1, 3))

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    window, strides, dilation = sizes(1, 4), sizes(1, 4), sizes(1, 2)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    reach = [d * (k - 1) for d, k in zip(dilation, window)]
    padding = tuple(draw(st.integers(0, r // 2)) for r in reach)
    most = [max(s, d) - 1 for s, d in zip(strides, dilation)]
    more = tuple(draw(st.integers(0, m)) for m in most)
    channels, features = (groups * draw(st.integers(1, 3)) for _ in range(2))
    layer = LAYERS[rank](
        *(channels, features, window, strides, padding, more, groups),
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    batch = () if draw(st.integers(0, 3)) == 0 else (2,)
    return layer.eval(), torch.randn(*batch, channels, *sizes(2, 4))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(transposed_layers())
def test_transposed_convolutions(drawn):
    layer, x = drawn
    want = layer(x).detach().numpy()
    rules = ["*=phases"] if fc.make_plan(layer, x, to="dense").skipped else []
    try:
        plan = fc.make_plan(layer, x, to="dense", rules=rules)
    except fc.PlanError:
        plan = fc.make_plan(layer, x, to="dense")
    converted = fc.convert_model(layer, plan)
    np.testing.assert_allclose(converted(x), want, rtol=1e-4, atol=1e-5)
    state = layer.state_dict()
    back = fc.restore_params(fc.convert_params(state, plan), plan)
    for name, value in state.items():
        assert torch.equal(back[name], value), name


def test_operations_that_torchax_lacks_are_named():
    class Airy(Net):
        def forward(self, x):
            return torch.special.airy_ai(super().forward(x))

    with pytest.raises(fc.PlanError, match=r"special_airy_ai in Airy.*torch\.export"):
        fc.make_plan(Airy().eval(), X)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
def test_an_exported_module(net):
    exported = torch.export.export(net, (X,)).run_decompositions().module()
    plan = fc.make_plan(exported, X)
    assert list(plan) == ["head.weight"]
    np.testing.assert_allclose(
        fc.convert_model(exported, plan)(X), net(X).detach(), atol=1e-5
    )


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(True))
        self.second = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Softplus())

    def forward(self, x):
        y = self.second(self.first(x))
        return {"y": y, "at": y.argmax(1)}


class Crops(torch.nn.Module):
    """``Deep`` on signals of one channel, without the places of its maxima."""

    def __init__(self, deep):
        super().__init__()
        self.first, self.second = deep.first, deep.second

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


LINE = np.random.default_rng(0).normal(size=(3, 1, 12)).astype(np.float32)


def wrong_softplus(env):
    def softplus(x, beta=1, threshold=20):
        del beta, threshold
        return x * 1.5

    env.override_op_definition(torch.ops.aten.softplus, softplus)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("verify", torch.bfloat16),
        ("compare", torch.float32),
        ("export", torch.float64),
        ("slide", torch.float32),
        ("write", torch.float32),
    ],
)
def test_a_fault_of_torchax_is_named(how, dtype, monkeypatch, tmp_path):
    torch.manual_seed(0)
    net, x = Deep().eval().to(dtype), torch.randn(3, 5, dtype=dtype)

    def run():
        if how in ("slide", "write"):
            grid = fc.slide(Crops(net).eval(), window=5, stride=2)
            if how == "slide":
                return grid(LINE)
            return grid.write(LINE, out=np.empty((3, 4, 4), np.float32), progress=False)
        if how == "export":
            return fc.export(net, x, path=tmp_path / "a.stablehlo", progress=False)
        if how == "compare":
            return fc.compare(net, net, [x], progress=False)
        return fc.verify(net, x, progress=False)

    assert getattr(run(), "passed", True)
    from fcconv_jax.frontends import torch as frontend  # needs PyTorch

    made = frontend._environment.__wrapped__()
    wrong_softplus(made)
    monkeypatch.setattr(frontend, "_environment", lambda: made)
    with pytest.raises(
        fc.PlanError, match=r"torchax.*'second\.1' \(Softplus\).*export"
    ):
        run()
