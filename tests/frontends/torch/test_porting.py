"""Ports from PyTorch to Flax with the usual mistakes, found by ``fc.compare``."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

torch = pytest.importorskip("torch", reason=install_command("torch"))
pytest.importorskip("torchax", reason=install_command("torch"))

WIDTH, HEADS = 12, 2
DEEP = WIDTH // HEADS


def angles(count, base):
    rates = base ** (-np.arange(DEEP // 2) / (DEEP // 2))
    return np.outer(np.arange(count), rates).astype(np.float32)


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (
            torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.register_buffer("angles", torch.from_numpy(angles(6, 100.0)))

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x):
        split = [
            layer(x).unflatten(-1, (HEADS, DEEP)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        q, k = map(self.rotate, split[:2])
        weights = (q @ k.mT / math.sqrt(DEEP)).softmax(-1)
        return self.out((weights @ split[2]).transpose(1, 2).flatten(2))


class TorchViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, WIDTH, 4, 4)
        self.norm1 = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = TorchAttention()
        self.norm2 = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        x = x + torch.relu(self.mlp(self.norm2(x)))
        return self.head(x.mean(1))


class Attention(nn.Module):
    base: float = 100.0

    def rotate(self, x):
        a, b = jnp.split(x, 2, -1)
        table = angles(6, self.base)
        cos, sin = jnp.cos(table), jnp.sin(table)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    @nn.compact
    def __call__(self, x):
        q, k, v = (
            nn.Dense(WIDTH, name=name)(x)
            .reshape(*x.shape[:2], HEADS, DEEP)
            .transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        scores = self.rotate(q) @ self.rotate(k).transpose(0, 1, 3, 2)
        y = nn.softmax(scores / math.sqrt(DEEP)) @ v
        y = y.transpose(0, 2, 1, 3).reshape(x.shape)
        return nn.Dense(WIDTH, name="proj")(y)


class ViT(nn.Module):
    eps: float = 1e-6
    base: float = 100.0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), padding="VALID", name="embed")(x)
        x = x.reshape(len(x), -1, WIDTH)
        y = nn.LayerNorm(epsilon=1e-6, name="before")(x)
        x = x + Attention(self.base, name="attend")(y)
        y = nn.LayerNorm(epsilon=self.eps, name="between")(x)
        x = x + nn.relu(nn.Dense(WIDTH, name="dense")(y))
        return nn.Dense(5, name="logits")(x.mean(1))


NAMES = {
    "patches": "embed",
    "norm1": "before",
    "attention.q": "attend/query",
    "attention.k": "attend/key",
    "attention.v": "attend/value",
    "attention.out": "attend/proj",
    "norm2": "between",
    "mlp": "dense",
    "head": "logits",
}


def ported(model, names=NAMES):
    params = {}
    for name, path in names.items():
        layer = model.get_submodule(name)
        weight = layer.weight.detach().numpy()
        if weight.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        *levels, last = path.split("/")
        node = params
        for level in levels:
            node = node.setdefault(level, {})
        kernel = {"scale": weight} if weight.ndim == 1 else {"kernel": weight.T}
        if weight.ndim == 4:
            kernel = {"kernel": weight}
        node[last] = {**kernel, "bias": layer.bias.detach().numpy()}
    return params


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return TorchViT().eval()


X = torch.randn(2, 3, 8, 12, generator=torch.manual_seed(1))
NHWC = X.permute(0, 2, 3, 1).numpy()


def compare(model, port, params, x=X, nhwc=NHWC):
    args = [{"params": params}, nhwc]
    return fc.compare(model, port, [x], args, gradients=False, progress=False)


def test_a_right_port(vit):
    found = compare(vit, ViT(), ported(vit))
    assert found.passed, found
    assert found.digits is not None
    assert found.digits > 12


def test_a_wrong_eps(vit):
    found = compare(vit, ViT(eps=1e-2), ported(vit))
    assert found.verdict == "different functions"
    assert found.parts_at == (
        "'norm2' of the first ('between' of the second), behind 'attention'"
    )


def test_a_wrong_rotary_embedding(vit):
    found = compare(vit, ViT(base=10.0), ported(vit))
    assert found.parts_at.startswith(
        "'attention.out' of the first ('attend/proj' of the second), behind"
    )


def test_a_transposed_kernel(vit):
    params = ported(vit)
    params["attend"]["value"]["kernel"] = params["attend"]["value"]["kernel"].T
    found = compare(vit, ViT(), params)
    assert found.parts_at.startswith(
        "'attention.v' of the first ('attend/value' of the second)"
    )
    assert "the kernel of 'attend/value' is that of 'attention.v" in found.parts_at
    assert "transposed" in str(found)


class TorchCNN(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4 * 6 * 10, 5)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


class CNN(nn.Module):
    chw: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="conv")(x))
        x = x.transpose(0, 3, 1, 2) if self.chw else x
        return nn.Dense(5, name="head")(x.reshape(len(x), -1))


def test_a_head_behind_another_flatten():
    torch.manual_seed(0)
    model = TorchCNN().eval()
    params = ported(model, {"conv": "conv", "head": "head"})
    assert compare(model, CNN(chw=True), params).passed
    found = compare(model, CNN(), params)
    assert found.parts_at.startswith("'head'")
    assert "the rows are ordered CHW there, HWC here" in found.parts_at
    # The fix that the report gives.
    mine, theirs = fc.make_plan(model, X), fc.make_plan(CNN(), NHWC)
    moved = fc.convert_params(model.state_dict(), mine)["head.weight"]
    params["head"]["kernel"] = np.asarray(moved.permute(2, 3, 1, 0))
    params = fc.restore_params(params, theirs, strict=False)
    assert compare(model, CNN(), params).passed


class TorchTowers(torch.nn.Module):
    """Activations are modules, two layers are one, and a second tower is read last."""

    def __init__(self):
        super().__init__()
        self.both = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
        self.norm = torch.nn.BatchNorm1d(WIDTH, eps=1e-3)
        self.tower = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        gate, y = self.both(x).chunk(2, -1)
        return self.norm(torch.tanh(gate) * self.mlp(y)) + self.tower(x)


class Towers(nn.Module):
    approximate: bool = False
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        gate, y = (nn.Dense(WIDTH, name=name)(x) for name in ("gate", "value"))
        y = nn.Dense(WIDTH, name="mlp")(nn.gelu(y, approximate=self.approximate))
        y = nn.tanh(gate) * y
        norm = nn.BatchNorm(use_running_average=True, epsilon=self.eps, name="batch")
        return norm(y) + nn.Dense(WIDTH, name="tower")(x)


@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        ("tanh", "'mlp.0' of the first ('mlp' of the second), behind 'both'"),
        ("eps", "'norm' of the first ('batch' of the second), behind 'mlp'"),
        ("kernel", "'mlp.1' of the first ('mlp' of the second), behind 'mlp.0'"),
        ("halves", "'mlp.0' of the first ('mlp' of the second), behind 'both'"),
    ],
)
def test_modules_that_only_one_library_has(mistake, where):
    torch.manual_seed(0)
    model = TorchTowers().eval()
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    weight, bias = (state[f"both.{name}"] for name in ("weight", "bias"))
    halves = [
        {"kernel": weight[part].T, "bias": bias[part]}
        for part in (slice(WIDTH), slice(WIDTH, None))
    ]
    params = dict(zip(("gate", "value"), halves[:: -1 if mistake == "halves" else 1]))
    for name, path in (("mlp.1", "mlp"), ("tower", "tower")):
        params[path] = {"kernel": state[f"{name}.weight"].T}
        params[path]["bias"] = state[f"{name}.bias"]
    if mistake == "kernel":
        params["mlp"]["kernel"] = params["mlp"]["kernel"] * 1.001
    params["batch"] = {"scale": state["norm.weight"], "bias": state["norm.bias"]}
    stats = {"mean": state["norm.running_mean"], "var": state["norm.running_var"]}
    port = Towers(mistake == "tanh", 1e-5 if mistake == "eps" else 1e-3)
    x = torch.randn(4, WIDTH)
    variables = {"params": params, "batch_stats": {"batch": stats}}
    found = fc.compare(
        *(model, port, [x], [variables, x.numpy()]), gradients=False, progress=False
    )
    assert found.parts_at == where
