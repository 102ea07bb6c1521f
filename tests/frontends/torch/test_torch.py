import jax
import numpy as np
import pytest
from frontends.library_checks import check_held, check_model, check_slide

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


def test_tied_weights(net):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)
            self.head = torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    ids = np.array([[1, 2, 3]], np.int32)
    model = Tied().eval()
    report = fc.verify(model, None, jax.numpy.asarray(ids), progress=False)
    assert report.passed
    assert report.planned == 1
