"""Defects as people make them, in models of every kind: each is caught, and named."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import one_in
from flax import nnx

import fcconv_jax as fc

from .transformer import Settings, Transformer, tokens, variables

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}

# Settings of one block, and where the two models part.
BLOCK_DEFECTS = {
    "eps of the first norm": ({"eps1": 1e-5}, "norm1"),
    "eps of the second norm": ({"eps2": 1e-5}, "norm2"),
    "tanh for erf gelu": ({"tanh_gelu": True}, "Dropout_0"),
    "relu for gelu": ({"activation": "relu"}, "Dropout_0"),
    "silu for gelu": ({"activation": "silu"}, "Dropout_0"),
    "softmax scale off": ({"scale": 1.1}, "out"),
    "temperature": ({"temperature": 1.1}, "out"),
    "mask off by one": ({"mask_shift": 1}, "out"),
    "no mask": ({"mask_shift": 9}, "out"),
    "no residual around attention": ({"residual1": False}, "norm2"),
    "no residual around the MLP": ({"residual2": False}, "block_AT"),
    "bias dropped": ({"bias_times": 0.0}, "Dropout_0"),
    "bias doubled": ({"bias_times": 2.0}, "Dropout_0"),
    "norm behind the residual": ({"post_norm": True}, "norm1"),
    "dropout left on": ({"dropout": True}, "Dropout_0"),
    "two heads swapped": ({"swap_heads": True}, "out"),
    "key for query": ({"key_first": True}, "out"),
}


def compared(model, wrong, params=None, wrong_params=None, **options):
    params = variables(model) if params is None else params
    args = [params if wrong_params is None else wrong_params, tokens()]
    return fc.compare(model, wrong, [params, tokens()], args, progress=False, **options)


@pytest.mark.parametrize("name", one_in(8, BLOCK_DEFECTS))
@pytest.mark.parametrize("dtype", ["f32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_defect_of_one_block_is_caught_and_named(name, dtype):
    changed, where = BLOCK_DEFECTS[name]
    model = Transformer(dtype=DTYPES[dtype], at=1)
    wrong = dataclasses.replace(model, defect=Settings(**changed))
    rngs = {"rngs": {"dropout": jax.random.key(3)}}
    found = compared(model, wrong, f_kwargs=rngs)
    assert found.verdict == "different functions"
    last = where.replace("AT", "1")
    assert found.parts_at == repr(
        last if last.startswith("block") else f"block_1/{last}"
    )
    assert "expected" in found.failures[0]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"eps2": 1e-5}, {"scale": 1 + 1e-6}])
def test_in_the_last_of_twelve_blocks_too(changed):
    model = Transformer(blocks=12, at=11)
    wrong = dataclasses.replace(model, defect=Settings(**changed))
    assert compared(model, wrong).verdict == "different functions"


@pytest.mark.slow
def test_in_the_first_of_twelve_blocks_in_float16():
    model = Transformer(blocks=12, dtype=jnp.float16)
    wrong = dataclasses.replace(model, defect=Settings(eps1=2e-6))
    found = compared(model, wrong)
    assert found.verdict == "different functions"
    assert found.parts_at == "'block_0/norm1'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "where"),
    [({"final_eps": 1e-5}, "norm"), ({"position_shift": 1}, "places")],
)
def test_a_defect_outside_of_the_blocks(changed, where):
    model = Transformer()
    found = compared(model, dataclasses.replace(model, **changed))
    assert found.parts_at == repr(where)


@pytest.mark.slow
def test_a_layer_in_bfloat16_where_the_original_computes_in_float32():
    model = Transformer(blocks=4)
    wrong = dataclasses.replace(model, defect=Settings(up_dtype=jnp.bfloat16))
    found = compared(model, wrong)
    assert found.digits is not None
    assert found.digits > 12  # it is one function
    assert found.verdict == "lower precision"
    assert not found.passed
    assert "lower precision" in found.failures[0]


@pytest.mark.slow
def test_a_missing_gradient():
    model = Transformer()
    wrong = dataclasses.replace(model, defect=Settings(stop_gradient=True))
    params = variables(model)
    assert compared(model, wrong, gradients=False).passed  # of the outputs
    found = fc.compare(model, wrong, [params, tokens()], progress=False)
    assert found.verdict == "different functions"
    assert "block_0/up/kernel" in "\n".join(found.failures)


# What is one function, written in two ways: no false alarm.
SAME = {
    "variance in one pass or two": {"fast_variance": False},
    "what a mask adds where it hides": {"mask_value": -1e9},
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [
        ("f32", 2),
        pytest.param("bf16", 2, marks=pytest.mark.slow),
        pytest.param("f16", 2, marks=pytest.mark.slow),
        pytest.param("f32", 12, marks=pytest.mark.slow),
    ],
)
def test_another_way_to_write_it_passes(name, dtype, blocks):
    model = Transformer(blocks=blocks, dtype=DTYPES[dtype], at=1)
    same = dataclasses.replace(model, defect=Settings(**SAME[name]))
    found = compared(model, same)
    assert found.passed, str(found)


def _with(params, path, change):
    """The params with one leaf changed."""
    flat = nn.FrozenDict(params).unfreeze()
    *names, last = path.split("/")
    node = flat["params"]
    for name in names:
        node = node[name]
    node[last] = jnp.asarray(change(np.array(node[last])))
    return flat


def _ulp(w):
    w.reshape(-1)[5] = np.nextafter(w.reshape(-1)[5], np.inf, dtype=w.dtype)
    return w


def _swapped(w):
    w[[0, 1]] = w[[1, 0]]
    return w


PARAM_DEFECTS = {
    "one weight off by an ulp": ("block_1/up/kernel", _ulp),
    "one bias off by an ulp": ("block_0/down/bias", _ulp),
    "a scale off by an ulp": ("block_0/norm1/scale", _ulp),
    "two rows swapped": ("block_1/up/kernel", _swapped),
    "two heads' biases swapped": ("block_0/value/bias", _swapped),
    "a kernel cut to bfloat16": (
        "block_1/down/kernel",
        lambda w: w.astype(jnp.bfloat16).astype(w.dtype),
    ),
    "a bias of zero": ("block_1/up/bias", lambda b: 0 * b),
    "a kernel with one sign flipped": (
        "head/kernel",
        lambda w: np.where(np.arange(w.size).reshape(w.shape) == 3, -w, w),
    ),
}


@pytest.mark.parametrize("name", one_in(4, PARAM_DEFECTS))
def test_a_defect_of_the_params_is_caught_and_named(name):
    path, change = PARAM_DEFECTS[name]
    model = Transformer()
    params = variables(model)
    found = compared(model, model, params, _with(params, path, change))
    assert found.verdict == "different functions"
    assert found.parts_at == repr(path.rpartition("/")[0])


def test_one_layer_swapped_with_its_like():
    model = Transformer()
    params = variables(model)
    inner = dict(params["params"])
    inner["block_0"], inner["block_1"] = (
        {**inner[a], "up": inner[b]["up"]}
        for a, b in (("block_0", "block_1"), ("block_1", "block_0"))
    )
    found = compared(model, model, params, {"params": inner})
    assert found.parts_at == "'block_0/up'"


class ConvNet(nn.Module):
    """A small image model with everything that can be set wrongly in one."""

    strides: int = 2
    padding: str | tuple = "SAME"
    dilation: int = 1
    flip: bool = False
    eps: float = 1e-5
    running: bool = True
    momentum: float = 0.9
    pool: str = "avg"
    count_padding: bool = True
    order: tuple = (0, 1, 2, 3)
    groups: int = 2
    rate: float = 0.5
    train: bool = False
    roll: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            6, (3, 3), self.strides, self.padding, kernel_dilation=self.dilation
        )(x[:, ::-1] if self.flip else x)
        x = nn.BatchNorm(
            use_running_average=self.running, epsilon=self.eps, momentum=self.momentum
        )(x)
        x = nn.relu(x)
        pool = {"avg": nn.avg_pool, "max": nn.max_pool}[self.pool]
        options = (
            {"count_include_pad": self.count_padding} if pool is nn.avg_pool else {}
        )
        x = pool(x, (2, 2), (2, 2), "SAME", **options)
        x = nn.GroupNorm(self.groups)(x)
        x = jnp.roll(x, self.roll, -1)
        x = x.transpose(self.order).reshape(x.shape[0], -1)
        x = nn.Dropout(self.rate, deterministic=not self.train)(x)
        return nn.Dense(4)(x)


CONV_DEFECTS = {
    "padding on one side": {"padding": ((0, 2), (1, 1))},
    "padding of the other side": {"padding": ((2, 0), (1, 1))},
    "an image upside down": {"flip": True},
    "eps of batch norm": {"eps": 1.1e-5},
    "batch statistics for running ones": {"running": False},
    "max for avg pooling": {"pool": "max"},
    "padding left out of the count": {"count_padding": False},
    "CHW for HWC": {"order": (0, 3, 1, 2)},
    "WHC for HWC": {"order": (0, 2, 1, 3)},
    "groups of a group norm": {"groups": 3},
    "channels moved by one": {"roll": 1},
}


@pytest.mark.parametrize("name", one_in(4, CONV_DEFECTS))
def test_a_defect_of_an_image_model_is_caught(name):
    model, wrong = ConvNet(), ConvNet(**CONV_DEFECTS[name])
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 3))
    params = model.init(jax.random.key(0), x)
    params["batch_stats"] = jax.tree.map(lambda s: s + 0.3, params["batch_stats"])
    options = {"f_kwargs": {"mutable": ["batch_stats"]}, "progress": False}
    found = fc.compare(model, wrong, [params, x], **options)
    assert found.verdict == "different functions"
    assert found.parts_at is not None


TRAINING_DEFECTS = {
    "momentum of batch norm": {"momentum": 0.99},
    "rate of dropout off by 1e-6": {"rate": 0.5 + 1e-6},
    "dilation": {"dilation": 2},
}


@pytest.mark.parametrize("name", one_in(3, TRAINING_DEFECTS))
def test_a_defect_in_training_mode_is_caught(name):
    settings = {"running": False, "train": True}
    model = ConvNet(**settings)
    wrong = ConvNet(**settings, **TRAINING_DEFECTS[name])
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 3))
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    kwargs = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(3)}}
    same = fc.compare(model, model, [params, x], f_kwargs=kwargs, progress=False)
    assert same.verdict == "the same bits"
    found = fc.compare(model, wrong, [params, x], f_kwargs=kwargs, progress=False)
    assert found.verdict == "different functions"


def _step(tx, scale=1.0):
    """A training step as people write it."""

    def step(params, x, y):
        def loss(p):
            h = jnp.tanh(x @ p["w"] + p["b"])
            return scale * ((h @ p["v"] - y) ** 2).mean()

        gradients = jax.grad(loss)(params)
        updates, state = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    return step


def _decay(mask):
    return optax.adamw(1e-3, weight_decay=1e-2, mask=mask)


OPTIMIZER_DEFECTS = {
    "eps of adam": (optax.adam(1e-3), optax.adam(1e-3, eps=1e-7)),
    "b1 of adam": (optax.adam(1e-3), optax.adam(1e-3, b1=0.91)),
    "b2 of adam": (optax.adam(1e-3), optax.adam(1e-3, b2=0.99)),
    "learning rate off by 1e-6": (optax.adam(1e-3), optax.adam(1e-3 * (1 + 1e-6))),
    "weight decay on a bias": (
        _decay(lambda p: {"w": True, "v": True, "b": False}),
        _decay(None),
    ),
    "nesterov": (
        optax.sgd(1e-2, momentum=0.9),
        optax.sgd(1e-2, momentum=0.9, nesterov=True),
    ),
    "clipping": (
        optax.sgd(1e-2),
        optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1e-2)),
    ),
    "adam for lion": (optax.adam(1e-3), optax.lion(1e-3)),
}


def _training_data():
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 8), "b": (8,), "v": (8, 3)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return [params, *(rng.normal(size=s).astype(np.float32) for s in ((4, 5), (4, 3)))]


@pytest.mark.parametrize("name", one_in(4, OPTIMIZER_DEFECTS))
def test_a_defect_of_the_optimizer_is_caught(name):
    right, wrong = OPTIMIZER_DEFECTS[name]
    args = _training_data()
    found = fc.compare(_step(right), _step(wrong), args, progress=False)
    assert found.verdict == "different functions", str(found)
    again = fc.compare(_step(right), _step(right), args, progress=False)
    assert again.passed, str(again)


def _softmax(x, shift=True, axis=-1):
    e = jnp.exp(x - (x.max(axis, keepdims=True) if shift else 0.0))
    return e / e.sum(axis, keepdims=True)


FUNCTION_DEFECTS = {
    "softmax over the other axis": (_softmax, lambda x: _softmax(x, axis=0)),
    "sum for mean": (lambda x: x.mean(), lambda x: x.sum()),
    "an exclusive cumsum": (
        lambda x: jnp.cumsum(x, 0),
        lambda x: jnp.cumsum(x, 0) - x,
    ),
    "a scan from behind": (
        lambda x: jax.lax.scan(lambda c, r: (0.5 * c + r, c), x[0], x)[1],
        lambda x: jax.lax.scan(lambda c, r: (0.5 * c + r, c), x[0], x, reverse=True)[1],
    ),
    "an index off by one": (lambda x: x[:, 1:], lambda x: x[:, :-1]),
    "variance by n - 1": (lambda x: x.var(0), lambda x: x.var(0, ddof=1)),
    "an eps in a norm": (
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-7),
    ),
    "another branch": (
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.lax.cond(x.sum() < 0, jnp.sin, jnp.cos, x),
    ),
    "argmax for argmin": (lambda x: x.argmax(-1), lambda x: x.argmin(-1)),
    "one NaN": (lambda x: x, lambda x: x.at[0, 0].set(jnp.nan)),
    "one step less of a loop": (
        lambda x: jax.lax.fori_loop(0, 9, lambda i, y: jnp.sin(y), x),
        lambda x: jax.lax.fori_loop(0, 8, lambda i, y: jnp.sin(y), x),
    ),
}


@pytest.mark.parametrize("name", FUNCTION_DEFECTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_defect_of_a_function_is_caught(name, dtype):
    f, g = FUNCTION_DEFECTS[name]
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(DTYPES[dtype])
    found = fc.compare(f, g, [x], progress=False)
    assert found.verdict == "different functions", str(found)


SAME_FUNCTIONS = {
    "softmax without its shift": (_softmax, lambda x: _softmax(x, shift=False)),
    "a sum from behind": (lambda x: x.sum(0), lambda x: x[::-1].sum(0)),
    "a dot by parts": (
        lambda x: x @ x.T,
        lambda x: x[:, :3] @ x[:, :3].T + x[:, 3:] @ x[:, 3:].T,
    ),
    "sinh by exp": (lambda x: jnp.sinh(x), lambda x: (jnp.exp(x) - jnp.exp(-x)) / 2),
    "nothing but rounding": (lambda x: x - x, lambda x: x * 3 - x - x - x),
    "the same NaN": (lambda x: jnp.log(x), lambda x: jnp.log(x)),
}


@pytest.mark.parametrize("name", SAME_FUNCTIONS)
def test_one_function_written_in_two_ways_passes(name):
    f, g = SAME_FUNCTIONS[name]
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    found = fc.compare(f, g, [x], progress=False)
    assert found.passed, str(found)


class NnxNet(nnx.Module):
    def __init__(self, rngs, eps=1e-6, residual=True):
        self.norm = nnx.LayerNorm(6, epsilon=eps, rngs=rngs)
        self.up = nnx.Linear(6, 12, rngs=rngs)
        self.down = nnx.Linear(12, 6, rngs=rngs)
        self.residual = residual

    def __call__(self, x):
        y = self.down(nnx.gelu(self.up(self.norm(x))))
        return x + y if self.residual else y


class LinenNet(nn.Module):
    """NnxNet, ported."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12)(nn.LayerNorm(epsilon=self.eps)(x))
        return x + nn.Dense(6)(nn.gelu(y))


def _ported(model):
    leaf = {
        name: dict(nnx.to_pure_dict(nnx.state(getattr(model, name))))
        for name in ("norm", "up", "down")
    }
    names = {"norm": "LayerNorm_0", "up": "Dense_0", "down": "Dense_1"}
    return {"params": {names[name]: value for name, value in leaf.items()}}


X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)


@pytest.mark.parametrize("changed", [{"eps": 1e-5}, {"residual": False}])
def test_a_defect_of_an_nnx_model_is_caught(changed):
    model, wrong = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(0), **changed)
    found = fc.compare(model, wrong, [X], progress=False)
    assert found.verdict == "different functions"
    if "eps" in changed:
        assert found.parts_at == "'norm'"


def test_a_port_from_nnx_to_linen():
    model = NnxNet(nnx.Rngs(0))
    args = [_ported(model), X]
    right = fc.compare(model, LinenNet(), [X], args, progress=False)
    assert right.passed, str(right)
    wrong = fc.compare(model, LinenNet(eps=1e-5), [X], args, progress=False)
    assert wrong.verdict == "different functions"
    assert wrong.parts_at == "'norm' of the first ('LayerNorm_0' of the second)"


def test_assert_same_names_the_output_and_the_module():
    model, wrong = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(0), eps=1e-3)
    fc.assert_same(model, model, [X])
    with pytest.raises(
        AssertionError, match=r"(?s)'output': expected .*first differ at 'norm'"
    ):
        fc.assert_same(model, wrong, [X])
