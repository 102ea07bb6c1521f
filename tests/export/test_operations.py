"""Each operation of JAX in each runtime: the same numbers, or a refusal by name."""

import dataclasses
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fcconv_jax as fc
from fcconv_jax.export import arguments
from fcconv_jax.export.export import export
from fcconv_jax.export.graph import Graph
from fcconv_jax.export.runtimes import runtime_of, runtimes
from fcconv_jax.messages.errors import ExportError

from .models import normal
from .test_files import RUNTIMES, SUFFIX, needs

X = normal(2, 3, 4, 5)


def _pool(x, window, strides):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")


def _crops(x, starts, sizes):
    """Crops behind the batch at places that the model knows, in their order."""
    numbers = lax.GatherDimensionNumbers((0, 2, 3, 4), (), (1, 2, 3))
    starts = jnp.asarray(starts, jnp.int32)
    return lax.gather(x, starts, numbers, (len(x), *sizes), mode="promise_in_bounds")


ONE_BY_ONE = {
    "abs": jnp.abs,
    "ceil": lambda x: jnp.ceil(3 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "cos": jnp.cos,
    "celu": lambda x: nn.celu(3 * x, 0.7),
    "elu": nn.elu,
    "elu, of another alpha": lambda x: nn.elu(3 * x, 0.7),
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": lambda x: jnp.floor(3 * x),
    "gelu": nn.gelu,
    "gelu, exact": lambda x: nn.gelu(x, approximate=False),
    "hard_swish": nn.hard_swish,
    "integer_pow": lambda x: x**3 + (2 + jnp.abs(x)) ** -2,
    "isfinite": lambda x: jnp.where(jnp.isfinite(x / (x * (x > 0))), x, 0.0),
    "leaky_relu": nn.leaky_relu,
    "log": lambda x: jnp.log(1.5 + jnp.abs(x)),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "mish": lambda x: jax.nn.mish(9 * x),
    "logical": lambda x: jnp.where((x > 0) & ~(x > 1) | (x == 0), x, -x),
    "neg": lambda x: -x,
    "pow": lambda x: jnp.power(0.1 + jnp.abs(x), 1.3),
    "relu": nn.relu,
    "relu6": lambda x: nn.relu6(4 * x),
    "round": lambda x: jnp.round(3 * x),
    "rsqrt": lambda x: lax.rsqrt(0.1 + x * x),
    "selu": lambda x: nn.selu(3 * x),
    "sigmoid": nn.sigmoid,
    "sign": jnp.sign,
    "silu": nn.silu,
    "sin": jnp.sin,
    "softplus": lambda x: nn.softplus(30 * x),
    "softsign": nn.soft_sign,
    "sqrt": lambda x: jnp.sqrt(jnp.abs(x)),
    "tanh": jnp.tanh,
    "where": lambda x: jnp.where(x > 0.3, x, 2.0),
}
SEVERAL = {
    "add": lambda x: x + x[:1, :, :1],
    "all": lambda x: jnp.where(
        (x > -1).all(-1, keepdims=True), x, (x > -2).all((0, 1))
    ),
    "any": lambda x: jnp.where((x > 1).any((1, 2), keepdims=True), x, (x > 2).any(0)),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(-1),
    "avg_pool": lambda x: nn.avg_pool(x, (2, 3), (1, 2)),
    "avg_pool, channels first": lambda x: (
        lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 3), (1, 1, 2, 1), "VALID") / 6
    ),
    "avg_pool, padded": lambda x: nn.avg_pool(x, (2, 3), (2, 2), padding="SAME"),
    "avg_pool, padding not counted": lambda x: nn.avg_pool(
        x, (2, 3), (2, 2), padding="SAME", count_include_pad=False
    ),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "cast": lambda x: (x > 0).astype(jnp.float32) + (3 * x).astype(jnp.int32),
    "concatenate": lambda x: jnp.concatenate([x, x[:, :2] * 2], axis=1),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "div": lambda x: x / (1 + x[:1] ** 2),
    "einsum": lambda x: jnp.einsum("nhwc,nhvc->nwhv", x, x),
    "flip": lambda x: x[:, ::-1, :, ::-1],
    "index": lambda x: x[:, -1] + x[:, 0],
    "log_softmax": nn.log_softmax,
    "matmul": lambda x: x @ x.swapaxes(2, 3),
    "matmul, first": lambda x: jnp.einsum("nhwc,nhwd->nhcd", x, x[..., :2]),
    "max": lambda x: x.max((0, 2)),
    "max_pool": lambda x: nn.max_pool(x, (2, 3), (1, 2)),
    "max_pool, padded": lambda x: nn.max_pool(x - 5, (3, 2), (2, 1), padding="SAME"),
    "max_pool, channels first": lambda x: _pool(x, (1, 1, 2, 3), (1, 1, 1, 2)),
    "max_pool, of one axis": lambda x: nn.max_pool(x[:, 0], (3,), (2,)),
    "max_pool, of three axes": lambda x: nn.max_pool(
        x[..., None] * jnp.arange(1.0, 3), (2, 2, 3), (1, 2, 1)
    ),
    "max_pool, vmapped": lambda x: jax.vmap(
        lambda one: _pool(one[None], (1, 2, 2, 1), (1, 1, 2, 1))
    )(x),
    "maximum": lambda x: jnp.maximum(x, x[:, :, :1]),
    "mean": lambda x: x.mean((1, 2)),
    "mean, kept": lambda x: x - x.mean(-1, keepdims=True),
    "min": lambda x: x.min(1),
    "min_pool": lambda x: nn.pool(x, jnp.inf, lax.min, (2, 3), (1, 2), "VALID"),
    "min_pool, padded": lambda x: nn.pool(
        x + 5, jnp.inf, lax.min, (3, 2), (2, 1), ((1, 1), (0, 1))
    ),
    "minimum": lambda x: jnp.minimum(x[:1], x),
    "negative pad": lambda x: lax.pad(
        x, 0.0, ((0, 0, 0), (-1, 2, 0), (1, -1, 0), (0, 0, 0))
    ),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=3),
    "prod": lambda x: x.prod(2),
    "repeat": lambda x: jnp.repeat(x, 2, axis=1),
    "reshape": lambda x: x.reshape(3, 40).T.reshape(8, 15),
    "rms_norm": lambda x: nn.RMSNorm().apply({"params": {"scale": NORM["scale"]}}, x),
    "roll": lambda x: jnp.roll(x, (1, 0), axis=(2, 1)),
    "slice": lambda x: x[:, 1:, ::2, 1:4:2],
    "softmax": nn.softmax,
    "softmax, first": lambda x: nn.softmax(x, axis=1),
    "split": lambda x: jnp.split(x, [2], axis=2)[1],
    "stack": lambda x: jnp.stack([x, 2 * x], axis=2),
    "std": lambda x: x.std(2),
    "sum": lambda x: x.sum((0, 3)),
    "take": lambda x: jnp.take(x, jnp.array([2, 0, 0]), axis=1),
    "tile": lambda x: jnp.tile(x, (1, 2, 1, 1)),
    "top_k": lambda x: lax.top_k(x, 2)[0] * (1 + lax.top_k(-x, 3)[1][..., 1:]),
    "transpose": lambda x: x.transpose(2, 0, 3, 1),
    "windows": lambda x: jax.vmap(
        lambda i: jax.vmap(lambda j: lax.dynamic_slice(x, (0, i, j, 1), (2, 2, 3, 2)))(
            jnp.arange(2)
        )
    )(jnp.array([2, 0, 1])),
    "windows, of a grid in a list": lambda x: _crops(
        x, [(i, j, 1) for i in (1, 0) for j in (0, 2, 1)], (2, 2, 2)
    ),
    "windows, of one place": lambda x: _crops(x, [(1, 2, 0)], (2, 1, 3)),
    "windows of one axis": lambda x: jax.vmap(
        lambda i: lax.dynamic_slice_in_dim(x, i, 2, 2), out_axes=3
    )(jnp.array([2, 0])),
}
# Refused by a runtime that lacks it.
LACKING = {"litert": {"erf": lax.erf, "rem": lambda x: lax.rem(x, 0.7 + 0 * x)}}


@pytest.fixture(params=RUNTIMES)
def to(request):
    needs(request.param)
    return request.param


@pytest.fixture
def run(to, tmp_path):
    def check(function, *inputs, params=None):
        path = tmp_path / f"m.{SUFFIX[to]}"
        params = {"scale": np.float32(1)} if params is None else params
        options = {"path": path, "progress": False}
        report = export(function, params, *inputs, **options)
        assert report.passed, report.failures
        return report

    return check


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_by_one(name, run):
    run(lambda params, x: params["scale"] * ONE_BY_ONE[name](x), X)


@pytest.mark.parametrize("name", SEVERAL)
def test_several(name, run):
    run(lambda params, x: SEVERAL[name](x), X)


def test_a_layer_normalisation_over_other_axes(run):
    def model(params, x):
        x = nn.relu(lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", **NHWC))
        x = (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2))[:, None, None])
        x = jnp.concatenate([x, 2 * x], axis=-1) * params["scale"]
        return nn.softmax(jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0))))[:, 1:]

    run(model, X, params={"k": normal(3, 3, 5, 4), "scale": normal(8)})


NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((0, 2), (1, 0))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_convolutions(padding, strides, run):
    def model(params, x):
        y = lax.conv_general_dilated(x, params["k"], strides, padding, **NHWC)
        return y + params["b"]

    report = run(model, X, params={"k": normal(3, 2, 5, 6), "b": normal(6, seed=3)})
    assert len(report.layers) == 1
    assert report.layers[0].bits


def test_channels_first(run):
    def model(params, x):
        return lax.conv_general_dilated(
            x, params["k"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    assert run(model, X, params={"k": normal(6, 3, 2, 2)}).layers[0].bits


def test_weights_on_the_left_and_stacked(run):
    def model(params, x):
        y = params["left"] @ x  # (7, 4) @ (..., 4, 5)
        return jnp.einsum("nhwc,hcd->nhwd", y, params["stack"])

    params = {"left": normal(7, 4), "stack": normal(3, 5, 2)}
    report = run(model, X, params=params)
    assert len(report.layers) == 2


def test_a_computed_kernel_is_listed(run):
    def model(params, x):
        w = params["w"]
        return x @ (w / jnp.linalg.norm(w, axis=0))

    report = run(model, X, params={"w": normal(5, 3)})
    assert [layer.bits for layer in report.layers] == [None]
    assert "computed from parameters, not their bits: params/w" in str(report)


# LiteRT and ONNX have them, see test_loops.py.
LOOPS = [
    (
        lambda params, x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x),
        "'while'.*number of steps is not known",
    ),
    (
        lambda params, x: lax.cond(x[0, 0, 0, 0] > 0, jnp.sin, jnp.cos, x),
        "'cond'.*Use jnp.where",
    ),
]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        *LOOPS,
        (lambda params, x: jnp.sort(x), "'sort'.*sort on the host"),
        (lambda params, x: jnp.fft.fft(x).real, "'fft'"),
        (lambda params, x: x.at[0].set(1.0), "'scatter'.*jnp.concatenate"),
        (lambda params, x: x.astype(jnp.bfloat16), "bfloat16"),
        (
            lambda params, x: lax.conv_general_dilated(
                *(x, jnp.ones((2, 2, 5, 3)), (2, 2), [(0, 0)] * 2),
                lhs_dilation=(3, 3),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
            "strides over spaced inputs",
        ),
        (lambda params, x: lax.conv(x, x, (1, 1), "VALID"), "kernel depends on"),
        (
            lambda params, x: lax.dynamic_slice_in_dim(x, x[0, 0, 0, 0].astype(int), 1),
            "slice whose start depends on its inputs",
        ),
        (
            lambda params, x: _crops(x, [(0, 0, 0), (0, 1, 0), (1, 0, 0)], (2, 2, 2)),
            "edge runtimes lack. Use jnp.take",
        ),
        (
            lambda params, x: _crops(x, [(0, 0, 0), (0, 9, 0)], (2, 2, 2)),
            "edge runtimes lack. Use jnp.take",
        ),
        (
            lambda params, x: jnp.ones(3),
            "outputs that depend on the inputs, got constants",
        ),
    ],
)
def test_refusals_name_what_and_the_way_out(function, what, to, tmp_path):
    if to in ("litert", "onnx") and (function, what) in LOOPS:
        return
    with pytest.raises(ExportError, match=what):
        export(
            *(function, {"w": X}, X),
            path=tmp_path / f"m.{SUFFIX[to]}",
            progress=False,
        )


def test_random_numbers_are_refused(to, tmp_path):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

    model = Noisy()
    params = model.init(jax.random.key(0), X, train=False)
    options = {"path": tmp_path / f"m.{SUFFIX[to]}", "progress": False}
    rngs = {"dropout": jax.random.key(1)}
    with pytest.raises(ExportError, match=r"random key.*train=False"):
        export(model, params, X, train=True, rngs=rngs, **options)
    assert export(model, params, X, train=False, **options).passed


@pytest.mark.parametrize("name", LACKING["litert"])
def test_what_litert_lacks(name, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="needs: pip install -e '.[litert]'")
    function = LACKING["litert"][name]
    with pytest.raises(ExportError, match=f"LiteRT doesn't support {name!r}"):
        export(
            *(lambda params, x: function(x), {"w": X}, X),
            path=tmp_path / "m.tflite",
            progress=False,
        )


FUSED = {
    "celu": nn.celu,
    "celu, of another alpha": lambda x: nn.celu(x, 0.7),
    "elu": nn.elu,
    "elu, of another alpha": lambda x: nn.elu(x, 0.7),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu, of tanh": nn.gelu,
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_swish": nn.hard_swish,
    "hard_swish, as torch has it": lambda x: x * nn.relu6(x + 3) * (1 / 6),
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.2),
    "log_softmax": nn.log_softmax,
    "mish": jax.nn.mish,
    "resize": lambda x: jax.image.resize(x, (2, 7, 8, 5), "bilinear"),
    "resize, down": lambda x: jax.image.resize(x, (2, 2, 3, 5), "linear", False),
    "resize, of one axis": lambda x: jax.image.resize(x, (2, 3, 6, 5), "nearest"),
    "resize, to the nearest": lambda x: jax.image.resize(x, (2, 6, 12, 5), "nearest"),
    "selu": nn.selu,
    "silu": nn.silu,
    "softplus": nn.softplus,
    "softsign": nn.soft_sign,
}


# What a runtime has no operation for.
_OTHERS = "celu, of another alpha", "elu, of another alpha"
LACKS = {
    "litert": {*_OTHERS, "mish", "selu", "silu", "softplus", "softsign"},
    "onnx": {"silu"},
    "openvino": {"celu, of another alpha", "silu"},
}


@pytest.mark.parametrize("name", FUSED)
def test_activations_are_one_operation(name, to, run):
    """Where the runtime has it: LiteRT lacks a hard sigmoid, and takes two more."""
    report = run(lambda params, x: FUSED[name](x) * params["scale"], 3 * X)
    # Those two are JAX's own program.
    if to not in ("iree", "stablehlo") and name not in LACKS.get(to, ()):
        ops = Counter(report.figures[0].ops)
        ops -= Counter(["Transpose", "Transpose"])  # around an image
        more = 0 if name.partition(",")[0] in runtimes()[to].fused else 2
        assert ops.total() <= 2 + more, ops


ONE = {
    "avg_pool, padded": lambda x: nn.avg_pool(x, (2, 3), (2, 2), padding="SAME"),
    "avg_pool, padding not counted": SEVERAL["avg_pool, padding not counted"],
    "depth_to_space": lambda x: (
        x[..., :4].reshape(2, 3, 4, 2, 2, 1).swapaxes(2, 3).reshape(2, 6, 8, 1)
    ),
    "layer_norm": lambda x: nn.LayerNorm().apply({"params": NORM}, x),
    "layer_norm, in two passes": lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1)
    ),
    "max_pool, behind a pad": lambda x: nn.max_pool(
        jnp.pad(x, ((0, 0), (1, 0), (2, 1), (0, 0)), constant_values=-jnp.inf),
        *((2, 3), (1, 2)),
    ),
    "l2_normalize": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "l2_normalize, bounded": lambda x: (
        x * lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))
    ),
    "resize, corners aligned": lambda x: _aligned(x, 5, 9),
    "rms_norm": SEVERAL["rms_norm"],
    "rms_norm, by division": lambda x: (
        x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * NORM["scale"]
    ),
    "space_to_depth": lambda x: (
        x[:, :2].reshape(2, 1, 2, 2, 2, 5).swapaxes(2, 3).reshape(2, 1, 2, 20)
    ),
}


def _aligned(x, *size):
    """A bilinear resize with aligned corners, as PyTorch's ``align_corners=True``."""
    scale = jnp.array([(n - 1) / (m - 1) for n, m in zip(size, x.shape[1:3])])
    shape = (x.shape[0], *size, x.shape[3])
    return jax.image.scale_and_translate(
        *(x, shape, (1, 2), scale, 0.5 - 0.5 * scale, "linear"), antialias=False
    )


NORM = {"scale": normal(5, seed=1), "bias": normal(5, seed=2)}
# How many more each takes where a runtime lacks a part of it.
MORE = {
    "litert": {"avg_pool, padded": 1, "max_pool, behind a pad": 1},
    "onnx": {"depth_to_space": 1, "space_to_depth": 1},
}


@pytest.mark.parametrize("name", ONE)
def test_layers_are_one_operation(name, to, run):
    """Between the transposes of an image, and a slice."""
    report = run(lambda params, x: ONE[name](x) * params["scale"], X)
    lacking = {"litert": ("layer", "rms_n"), "coreml": ("rms_n",)}
    several = to in ("iree", "stablehlo", "openvino")
    if not several and name[:5] not in lacking.get(to, ()):
        ops = Counter(report.figures[0].ops)
        ops -= Counter(["Transpose", "Transpose", "Slice", "STRIDED_SLICE"])
        assert ops.total() <= 2 + MORE.get(to, {}).get(name, 0), ops


@pytest.mark.parametrize("chosen", [True, False])
def test_one_hot(chosen, to, run):
    """Zeros for numbers outside; ONNX's own would count negative ones from the end."""

    def model(params, x):
        ids = x.argmax(-1) if chosen else (3 * x[..., 0]).astype(jnp.int32)
        return nn.one_hot(ids, 5) * params["scale"]

    ops = Counter(run(model, X).figures[0].ops)
    if to == "litert" or (to == "onnx" and chosen):
        assert ops["ONE_HOT"] + ops["OneHot"] == 1
        assert ops["EQUAL"] + ops["Equal"] == 0


WHOLE = {
    "celu": lambda x: nn.celu(3 * x, 0.7),
    "l2_normalize": ONE["l2_normalize"],
    "mish": lambda x: jax.nn.mish(3 * x),
    "one_hot": lambda x: nn.one_hot(x.argmax(-1), 5),
    "resize": ONE["resize, corners aligned"],
    "rms_norm": ONE["rms_norm"],
    "selu": lambda x: nn.selu(3 * x) + nn.elu(x, 0.7),
    "softplus": lambda x: nn.softplus(3 * x),
    "softsign": nn.soft_sign,
}


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_what_the_operations_compute(name, to, tmp_path, monkeypatch):
    """The file with one operation against the file without."""
    target = runtimes()[to]
    if name not in target.fused:
        pytest.skip(f"{to} does not have it")
    found = []
    for fused in (target.fused, target.fused - {name}):
        changed = dataclasses.replace(target, fused=fused)
        monkeypatch.setattr(arguments, "runtime_of", lambda *_, to=changed: to)
        path = tmp_path / f"{len(found)}.{SUFFIX[to]}"
        options = {"path": path, "progress": False}
        report = export(lambda p, x: WHOLE[name](x) * p, np.float32(1), X, **options)
        file = runtime_of(path).open(path)
        found.append((sum(report.figures[0].ops.values()), file.run([np.asarray(X)])))
    (fewer, (one,)), (more, (several,)) = found
    assert fewer < more or to == "openvino"  # whose reader takes some apart
    np.testing.assert_allclose(one, several, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Conv, nn.Dense])
def test_a_gate_adds_no_transpose(layer, run):
    """Squeeze-and-excite: images stay as they are in files of either layout."""

    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), name="before")(x)
            pointwise = layer is nn.Conv
            window = [(1, 1)] if pointwise else []
            y = nn.silu(
                layer(4, *window, name="less")(x.mean((1, 2), keepdims=pointwise))
            )
            y = nn.sigmoid(layer(6, *window, name="more")(y))
            y = y if pointwise else y[:, None, None]
            return nn.Conv(7, (3, 3), name="behind")(x * y).argmax(-1)

    report = run(Gated(), X, params=Gated().init(jax.random.key(0), X))
    assert report.figures[0].transposes <= 1  # of the input


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_between_images_adds_no_transpose(batch, bias, to, tmp_path):
    """ONNX multiplies the columns of an image: one is a Gemm, several a MatMul."""

    class Pointwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), name="before")(x))
            x = nn.relu(nn.Conv(7, (1, 1), use_bias=bias, name="point")(x))
            return nn.Conv(5, (3, 3), name="behind")(x).mean((1, 2))

    x = normal(batch, 4, 3, 2)
    params = Pointwise().init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape, seed=3), params)
    options = {"to": "dense", "progress": False}
    for any_batch in (False, True):
        path = tmp_path / f"{any_batch}.{SUFFIX[to]}"
        more = {**options, "any_batch": any_batch} if any_batch else options
        report = export(Pointwise(), params, x, path=path, **more)
        assert report.passed, report.failures
        assert {e.name: e.form for e in report.layers}["point"] == "dense"
        if to == "onnx":
            ops = report.figures[0].ops
            assert ops.get("Transpose", 0) <= 1  # of the input
            single = batch == 1 and not any_batch
            assert ops.get("Gemm", 0) == single
            assert ops.get("Add", 0) == (bias and not single)
            alone = fc.verify_file(path, params, x, model=Pointwise(), progress=False)
            assert alone.passed


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", ["dense", "conv"])
def test_attention_is_transposed_four_times(batch, form, to, tmp_path):
    """Queries, keys and values into heads, and back; ONNX adds biases in Gemm."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, x))
            y = nn.Dense(6)(nn.gelu(nn.Dense(9)(x)))
            return nn.LayerNorm()(x + y)

    x = normal(batch, 5, 6)
    params = Block().init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape, seed=3), params)
    path = tmp_path / f"m.{SUFFIX[to]}"
    report = export(Block(), params, x, path=path, to=form, progress=False)
    assert report.passed, report.failures
    assert fc.verify_file(path, params, x, model=Block(), progress=False).passed
    ops = report.figures[0].ops
    assert report.figures[0].transposes <= 4
    if to == "onnx" and form == "conv":
        import onnx

        windows = Counter(
            tuple(attribute.ints)
            for node in onnx.load(path).graph.node
            for attribute in node.attribute
            if attribute.name == "kernel_shape"
        )
        # On rows of tokens: heads and the first layer behind the norm.
        assert windows == {(1, 6): 4, (1, 1): 2}
    if (to, form) == ("onnx", "dense"):
        assert (ops["Gemm"], ops["MatMul"], ops["Add"]) == (6, 2, 2)
        # In front of all, four around the heads, and the last.
        assert ops["Reshape"] <= 6


def test_skips_are_turned_once(to, run):
    """Blocks as in DenseNet: each takes the input and all that came before it."""

    def model(params, x):
        for kernel in params:
            y = nn.relu(x * jnp.arange(1.0, x.shape[-1] + 1))
            y = lax.conv_general_dilated(y, kernel, (1, 1), "SAME", **NHWC)
            x = jnp.concatenate([x, jnp.tanh(y)], -1)
        return x.mean((1, 2))

    params = [normal(3, 3, 5 + 2 * i, 2, seed=i) for i in range(3)]
    report = run(model, X, params=params)
    # In front of the first convolution, and of the first skip.
    assert report.figures[0].transposes <= 2 * (to != "litert")


def test_two_operands_do_not_turn_each_other_for_ever(run, monkeypatch):
    """A sum of an image and of a layer's output, returned channel-first."""
    prune, passes = Graph.prune, []

    def counted(graph):
        passes.append(graph)
        assert len(passes) < 1000, "the passes never end"
        prune(graph)

    monkeypatch.setattr(Graph, "prune", counted)

    def model(params, x):
        y = lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", **NHWC)
        return jnp.tanh(x + y).transpose(0, 3, 1, 2) * 2 + 1

    report = run(model, X, params={"k": normal(3, 3, 5, 5)})
    assert report.figures[0].transposes <= 1


@pytest.mark.parametrize("order", [(0, 1, 3, 2, 4, 5), (0, 1, 4, 2, 5, 3)])
def test_pixel_shuffle(order, to, run):
    """Blocks that come first among the channels, and last, as in PyTorch."""

    def model(params, x):
        x = lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", **NHWC)
        first = order[2] == 3
        x = x.reshape(2, 3, 4, *((2, 2, 3) if first else (3, 2, 2)))
        x = x.transpose(order).reshape(2, 6, 8, 3)
        return lax.conv_general_dilated(x, params["l"], (1, 1), "SAME", **NHWC)

    params = {"k": normal(3, 3, 5, 12), "l": normal(1, 3, 3, 4)}
    ops = run(model, X, params=params).figures[0].ops
    if to == "onnx" or (to == "litert" and order[2] == 3):
        assert ops.get("DepthToSpace", 0) + ops.get("DEPTH_TO_SPACE", 0) == 1, ops


def test_reshapes_meet(run):
    """Gates of convolutions of one axis: one row of pixels from end to end."""

    class Gates(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                a, b = (nn.Conv(4, (2,))(x) for _ in range(2))
                x = nn.tanh(a) * nn.sigmoid(b)
            return x

    x = X[0]
    report = run(Gates(), x, params=Gates().init(jax.random.key(0), x))
    assert report.figures[0].reshapes <= 2


@pytest.mark.parametrize("form", ["dense", "conv"])
def test_signals_stay_channel_first(form, to, tmp_path):
    """A WaveNet: gates of causal convolutions, which share a pad, and residuals."""

    class WaveNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, skips = nn.Conv(4, (1,))(x), []
            for dilation in (1, 2, 4):
                options = {"kernel_dilation": (dilation,), "padding": "CAUSAL"}
                a, b = (nn.Conv(5, (2,), **options)(x) for _ in range(2))
                skips.append(nn.Conv(4, (1,))(nn.tanh(a) * nn.sigmoid(b)))
                x = x + skips[-1]
            return nn.Conv(3, (1,))(nn.relu(sum(skips)))

    for batch in (1, 2):
        x = normal(batch, 9, 2)
        params = WaveNet().init(jax.random.key(0), x)
        path = tmp_path / f"m{batch}.{SUFFIX[to]}"
        report = export(WaveNet(), params, x, path=path, to=form, progress=False)
        assert report.passed, report.failures
        assert fc.verify_file(path, params, progress=False).passed
        assert report.figures[0].transposes <= 4 or to == "openvino"
        assert not {"Pad"} & set(report.figures[0].ops)


def test_pads_belong_to_layers(run):
    """ZeroPadding2D and VALID, as Keras writes a stride of 2."""

    def model(params, x):
        x = jnp.pad(x, ((0, 0), (0, 1), (1, 1), (0, 0)))
        return lax.conv_general_dilated(x, params["k"], (2, 2), "VALID", **NHWC)

    report = run(model, X, params={"k": normal(3, 3, 5, 4)})
    assert not {"Pad", "PADV2"} & set(report.figures[0].ops)
    assert report.layers[0].bits


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_slope_that_is_a_parameter(shape, to, run):
    slope = 0.1 + jnp.abs(normal(*shape, seed=4))
    prelu = lambda p, x: jnp.where(x >= 0, x, p["slope"] * x)  # noqa: E731
    report = run(lambda p, x: 3 * prelu(p, x), X, params={"slope": slope})
    assert sum(report.figures[0].ops.values()) <= 2 or to in ("iree", "stablehlo")
    assert "other parameters: 1, the same bits" in str(report) or to == "iree"


def test_a_norm_that_no_layer_takes(to, run):
    """One operation in ONNX, where images are channel-first."""

    def model(params, x):
        x = lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", **NHWC)
        y = nn.relu((x - params["mean"]) * params["scale"] + params["shift"])
        return lax.conv_general_dilated(x + y, params["l"], (1, 1), "SAME", **NHWC)

    vectors = {n: normal(6, seed=i) for i, n in enumerate(["mean", "scale", "shift"])}
    kernels = {"k": normal(3, 2, 5, 6), "l": normal(2, 3, 6, 4)}
    report = run(model, X, params={**vectors, **kernels})
    assert report.figures[0].ops.get("BatchNormalization", 0) == (to == "onnx")


ALMOST = {
    "gelu, of another cubic": lambda x: (
        0.5 * x * (1 + jnp.tanh(0.79788456 * (x + 0.05 * x**3)))
    ),
    "log_softmax, of other values": lambda x: (
        x - x.max(-1, keepdims=True) - jnp.log(jnp.exp(x / 2).sum(-1, keepdims=True))
    ),
    "resize, antialiased": lambda x: jax.image.resize(x, (2, 2, 3, 5), "linear"),
    "resize, cubic": lambda x: jax.image.resize(x, (2, 6, 8, 5), "cubic"),
    "resize, of ties": lambda x: jax.image.resize(x, (2, 2, 6, 5), "nearest"),
    "celu, of two alphas": lambda x: (
        jnp.maximum(x, 0) + 0.7 * jnp.expm1(jnp.minimum(x, 0) / 0.8)
    ),
    "celu, of a negative alpha": lambda x: nn.celu(x, -0.7),
    "mish, of another value": lambda x: x * jnp.tanh(nn.softplus(x[..., ::-1])),
    "softplus, of base two": lambda x: jnp.logaddexp2(x, 0.0),
    "softplus, of one": lambda x: jnp.logaddexp(x, 1.0),
    "softsign, of two": lambda x: x / (jnp.abs(x) + 2),
    "softsign, without a sign": lambda x: jnp.abs(x) / (jnp.abs(x) + 1),
    "hard_swish, with another bound": lambda x: x * jnp.clip(x + 3, 0, 5) / 6,
    "hard_swish, with another shift": lambda x: x * nn.relu6(x + 2) / 6,
    "hard_swish, of another value": lambda x: x[..., ::-1] * nn.relu6(x + 3) / 6,
    "leaky_relu, from one": lambda x: jnp.where(x >= 1, x, 0.2 * x),
    "leaky_relu, of another value": lambda x: jnp.where(x >= 0, x, 0.2 * x[..., ::-1]),
    "leaky_relu, the other way": lambda x: jnp.where(x >= 0, 0.2 * x, x),
}


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_almost_an_activation(name, run):
    run(lambda params, x: params["scale"] * ALMOST[name](x), 3 * X)


def test_a_norm_of_an_image_s_pixels_is_one_operation(tmp_path):
    """The reshape of pixels to tokens does not hide it, as in a Mixer's stem."""
    pytest.importorskip("onnxruntime", reason="needs: pip install -e '.[onnx]'")

    def model(params, x):
        x = lax.conv_general_dilated(x, params["k"], (1, 1), "VALID", **NHWC)
        return nn.LayerNorm().apply({"params": NORM}, x.reshape(2, -1, 5))

    params = {"k": normal(2, 2, 5, 5)}
    report = export(model, params, X, path=tmp_path / "m.onnx", progress=False)
    assert report.passed, report.failures
    ops = report.figures[0].ops
    assert ops["LayerNormalization"] == 1
    assert "Sqrt" not in ops


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_mixed_without_a_transpose(batch, tmp_path):
    """As in a Mixer, whose layer over the tokens is a window as large as the image."""
    pytest.importorskip("onnxruntime", reason="needs: pip install -e '.[onnx]'")

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(5, (2, 2), (2, 2))(x)  # 3x2 patches
            x = nn.LayerNorm()(x.reshape(batch, -1, 5))
            y = nn.gelu(nn.Dense(7)(x.swapaxes(1, 2)))
            y = nn.LayerNorm()(nn.Dense(6)(y).swapaxes(1, 2) * x)
            return nn.Dense(4)(y)

    x = normal(batch, 6, 4, 3)
    params = Mixer().init(jax.random.key(0), x)
    report = export(Mixer(), params, x, path=tmp_path / "m.onnx", progress=False)
    assert report.passed, report.failures
    assert all(layer.bits and layer.exact for layer in report.layers)
    # From channel-first patches, and of the last layer's output.
    assert report.figures[0].transposes <= 2


def test_openvino_runs_an_rms_norm_as_one_operation(tmp_path):
    """Its files spell it out; its CPU plugin finds it again."""
    ov = pytest.importorskip("openvino", reason="needs: pip install -e '.[openvino]'")
    path = tmp_path / "m.xml"
    x = normal(2, 7, 64)

    def model(params, x):
        return nn.RMSNorm().apply({"params": params}, x * 2) + 1

    report = export(model, {"scale": normal(64)}, x, path=path, progress=False)
    assert report.passed, report.failures
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU")
    operations = compiled.get_runtime_model().get_ops()
    kinds = {str(op.get_rt_info()["layerType"].value) for op in operations}
    assert "RMS" in kinds, kinds
