"""What slide is called with and gives: models, gradients, strides, reports, tiles."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs, one_in
from flax import nnx
from jax.test_util import check_grads
from random_networks import crops_one_by_one
from trees import assert_trees_all_close, assert_trees_all_equal

import fcconv_jax as fc
from fcconv_jax.versions import enable_x64


class Net(nn.Module):
    """Two convolutions with pools, and a head behind a flatten."""

    padding: str = "SAME"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), padding=self.padding)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.Conv(6, (3, 3), padding=self.padding)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


class NnxNet(nnx.Module):
    """The like in NNX."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4 * 6 * 5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


_IMAGES = ("NHWC", "HWIO", "NHWC")
WINDOW, STRIDE = (12, 10), (2, 4)
IMAGES = jax.random.normal(jax.random.key(0), (2, 30, 31, 2))


def initialised(model):
    return model.init(jax.random.key(1), IMAGES[:, :12, :10])


def by_crops(function):
    return crops_one_by_one(function, IMAGES, WINDOW, STRIDE)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_linen(padding):
    model = Net(padding)
    variables = initialised(model)
    grid = fc.slide(model, WINDOW, STRIDE)
    report = grid.report(variables, IMAGES)
    # Crops as small as these are all border: with padding they share little.
    assert report.shares == (padding == "VALID")
    assert report.positions == (10, 6)
    got = grid(variables, IMAGES, train=False)
    want = by_crops(lambda x: model.apply(variables, x))
    assert got.shape == (2, 10, 6, 5)
    assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.parametrize("padding", one_in(2, ["SAME", "VALID"]))
def test_compare_calls_it_the_function_on_every_crop(padding):
    model = Net(padding)
    variables = initialised(model)

    def one_by_one(variables, images):
        return crops_one_by_one(
            lambda x: model.apply(variables, x), images, WINDOW, STRIDE, jnp.stack
        )

    grid = fc.slide(model, WINDOW, STRIDE)
    images = IMAGES[:, :16, :18]
    fc.assert_same(grid, one_by_one, (variables, images), progress=False)
    flipped = fc.slide(lambda v, x: model.apply(v, x[:, ::-1]), WINDOW, STRIDE)
    found = fc.compare(flipped, one_by_one, (variables, images), progress=False)
    assert not found.passed


def test_nnx_models_and_their_training():
    model = NnxNet(nnx.Rngs(0))
    grid = fc.slide(model, WINDOW, STRIDE)
    assert_trees_all_close(grid(IMAGES), by_crops(lambda x: model(x)), atol=1e-5)
    model.head.kernel[...] *= 2
    assert_trees_all_close(grid(IMAGES), by_crops(lambda x: model(x)), atol=1e-5)
    assert "crops of 12x10" in str(grid.report(IMAGES))


def test_converted_models():
    model = Net()
    variables = initialised(model)
    want = by_crops(lambda x: model.apply(variables, x))
    for to in ("conv", "dense"):
        plan = fc.make_plan(model, IMAGES[:, :12, :10], to=to)
        converted = fc.convert_model(model, plan)
        moved = fc.convert_params(variables, plan)
        got = fc.slide(converted, WINDOW, STRIDE)(moved, IMAGES)
        assert_trees_all_close(got, want, atol=1e-5)


def test_functions_with_any_arguments():
    def scores(scale, params, x, *, shift):
        return scale * (x.reshape(x.shape[0], -1) @ params) + shift

    params = jax.random.normal(jax.random.key(2), (240, 3))
    got = fc.slide(scores, WINDOW, STRIDE)(2.0, params, IMAGES, shift=1)
    want = by_crops(lambda x: scores(2.0, params, x, shift=1))
    assert_trees_all_close(got, want, atol=1e-4)
    alone = fc.slide(lambda x: x.mean((1, 2)), WINDOW, STRIDE)(IMAGES)
    assert_trees_all_close(alone, by_crops(lambda x: x.mean((1, 2))), atol=1e-6)


def test_channels_first_by_axes():
    def scores(params, x):
        y = jax.lax.conv_general_dilated(x, params, (1, 1), "SAME")
        return y.max((2, 3))

    params = jax.random.normal(jax.random.key(2), (4, 2, 3, 3))
    images = IMAGES.transpose(0, 3, 1, 2)
    got = fc.slide(scores, WINDOW, STRIDE, axes=(2, 3))(params, images)
    want = by_crops(lambda x: scores(params, x.transpose(0, 3, 1, 2)))
    assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_those_over_crops():
    model = Net()
    variables = initialised(model)
    grid = fc.slide(model, WINDOW, STRIDE)
    state = {"batch_stats": variables["batch_stats"]}
    starts = [(i, j) for i in range(0, 19, 2) for j in range(0, 22, 4)]
    weights = jax.random.normal(jax.random.key(3), (2, len(starts), 5))

    def on_grid(params):
        out = grid({"params": params, **state}, IMAGES)
        return (out.reshape(2, -1, 5) * weights).sum()

    def on_crops(params):
        crops = jnp.stack([IMAGES[:, i : i + 12, j : j + 10] for i, j in starts])
        out = jax.vmap(lambda x: model.apply({"params": params, **state}, x))(crops)
        return (jnp.swapaxes(jnp.asarray(out), 0, 1) * weights).sum()

    got = jax.grad(on_grid)(variables["params"])
    want = jax.jit(jax.grad(on_crops))(variables["params"])
    assert_trees_all_close(got, want, atol=2e-4, rtol=1e-4)


def test_the_derivative_rule_of_an_activation_is_kept():
    """jax.nn.relu has the derivative 0 at 0, the maximum that it runs 1/2."""

    def f(x):
        return nn.relu(x).sum((1, 2, 3))[:, None]

    images = jnp.zeros((1, 6, 6, 1))
    grid = fc.slide(f, (3, 3), 1)
    slopes = jax.grad(lambda x: grid(x).sum())(images)
    assert not slopes.any()


@pytest.mark.slow
def test_jit_vmap_and_shards():
    model = Net()
    variables = initialised(model)
    grid = fc.slide(model, WINDOW, STRIDE)
    want = grid(variables, IMAGES)
    assert_trees_all_close(jax.jit(grid)(variables, IMAGES), want, atol=1e-5)
    each = jax.vmap(lambda x: grid(variables, x[None])[0])(IMAGES)
    assert_trees_all_close(each, want, atol=1e-5)


def test_one_trace_a_shape():
    count = []

    def f(x):
        count.append(x.shape)
        return x[:, 1, 2]  # a program with pools is traced again, with options

    grid = fc.slide(f, WINDOW, STRIDE)
    for _ in range(3):
        grid(IMAGES)
        grid(IMAGES + 1)
    assert count == [(2, 12, 10, 2)]


def pooled(x):
    """A padded convolution 5x5 of one channel and a pool."""
    x = jax.lax.conv_general_dilated(
        x, jnp.ones((5, 5, 1, 1)), (1, 1), "SAME", dimension_numbers=_IMAGES
    )
    return nn.max_pool(x, (2, 2), (2, 2))


@pytest.mark.parametrize(("padding", "expected"), [("VALID", 4), ("SAME", 4)])
def test_the_networks_own_stride(padding, expected):
    model = Net(padding)
    x = jnp.ones((1, 24, 28, 2))
    variables = model.init(jax.random.key(0), x[:, :20, :20])
    grid = fc.slide(model, (20, 20))
    assert grid.report(variables, x).stride == (expected, expected)
    assert grid(variables, x).shape == (1, 2, 3, 5)
    # All entries of its last map see the crop's border, so crops share none of them.
    deep = fc.slide(lambda x: pooled(pooled(pooled(x))), (16, 16))
    assert deep.report(jnp.ones((1, 40, 40, 1))).stride == (8, 8)
    nothing = fc.slide(lambda x: x[:, :1, :1, 0] * x[:, -1:, -1:, 0], (9, 9))
    assert nothing(jnp.ones((1, 30, 30, 1))).shape[0] == 1


def test_what_is_not_shared_is_said():
    def f(params, x):
        x = jax.lax.conv_general_dilated(
            x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sort(x, 1).mean((1, 2))

    params = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    grid = fc.slide(f, WINDOW, STRIDE)
    text = str(grid.report(params, IMAGES))
    assert "sort, which has no rule for sharing" in text
    want = by_crops(lambda x: f(params, x))
    assert_trees_all_close(grid(params, IMAGES), want, atol=1e-5)


@pytest.mark.slow
def test_nothing_to_share_is_a_batch_of_crops():
    model = Net()
    images = jnp.ones((1, 24, 20, 2))
    variables = initialised(model)
    report = fc.slide(model, WINDOW, WINDOW).report(variables, images)
    assert not report.shares
    assert "a batch of crops" in str(report)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_pixel_stays_in_its_crops(value):
    model = Net()
    variables = initialised(model)
    images = IMAGES.at[:, 13, 17].set(value)
    got = np.isfinite(fc.slide(model, WINDOW, STRIDE)(variables, images)).all((0, 3))
    for i, row in enumerate(got):
        for j, finite in enumerate(row):
            inside = 2 * i <= 13 < 2 * i + 12 and 4 * j <= 17 < 4 * j + 10
            assert finite != inside


def test_what_lies_at_the_border_of_a_crop_only():
    """Zeros inside, ones around: padding that reads neighbours would show."""
    images = jnp.zeros((1, 21, 21, 1)).at[:, ::7].set(1).at[:, :, ::7].set(1)
    kernel = jnp.ones((5, 5, 1, 1))

    def f(x):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).sum(-1)

    got = fc.slide(f, (6, 6), 1)(images)
    want = crops_one_by_one(f, images, (6, 6), (1, 1))
    assert_trees_all_equal(np.asarray(got), want)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_without_images(shared):
    def crops(x):
        x = x if shared else x - x.mean((1, 2), keepdims=True)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return jnp.ones((len(x), 4)) + x.reshape(len(x), 12).sum(1, keepdims=True)

    grid = fc.slide(crops, (4, 4), 2)
    assert grid(jnp.ones((2, 9, 10, 3))).shape == (2, 3, 4, 4)
    assert grid(jnp.ones((0, 9, 10, 3))).shape == (0, 3, 4, 4)


def test_wrong_calls():
    model = Net()
    variables = initialised(model)
    with pytest.raises(ValueError, match=r"at least \(12, 10\).*got \(2, 8, 31, 2\)"):
        fc.slide(model, WINDOW)(variables, IMAGES[:, :8])
    with pytest.raises(ValueError, match="Expected images with the axes"):
        fc.slide(model, WINDOW)(variables)
    with pytest.raises(TypeError, match=r"Pass the variables first: grid\(variables"):
        fc.slide(model, WINDOW)(IMAGES)
    with pytest.raises(ValueError, match=r"pass images\[None\]"):
        fc.slide(model, WINDOW)(variables, IMAGES[0])
    with pytest.raises(ValueError, match=r"Pass window=\(8, 8\), or axes=1"):
        fc.slide(lambda x: x.mean(1), 8)(IMAGES)
    assert fc.slide(lambda x: x.mean(1), np.int64(8), 1, axes=1)(IMAGES).shape[1] == 23
    for wrong in ((0, 3), True, 2.0, (8, None), ()):
        with pytest.raises(ValueError, match="window: expected positive ints"):
            fc.slide(model, wrong)
    with pytest.raises(ValueError, match="stride: expected positive ints"):
        fc.slide(model, WINDOW, 0)
    with pytest.raises(ValueError, match="stride: expected one int or 2"):
        fc.slide(model, WINDOW, (1, 2, 3))
    with pytest.raises(ValueError, match="axes: expected 2 axes"):
        fc.slide(model, WINDOW, axes=(1,))
    with pytest.raises(ValueError, match="batch of 2 first"):
        fc.slide(lambda x: x.sum(), WINDOW)(IMAGES)
    with pytest.raises(TypeError, match="got the class Net"):
        fc.slide(Net, WINDOW)


@pytest.mark.slow
def test_padding_around_the_image_is_the_network_on_the_image():
    """The convention of fully convolutional networks, and that it is another one."""

    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            x = nn.Conv(5, (3, 3))(x)
            return nn.Conv(3, (6, 6), padding="VALID")(x)

    model, images = Conv(), jax.random.normal(jax.random.key(0), (2, 32, 36, 2))
    variables = model.init(jax.random.key(1), images[:, :12, :12])
    cheaper = fc.slide(model, (12, 12), 2, padding="image")
    got = cheaper(variables, images)
    whole = model.apply(variables, images)
    assert got.shape == (2, 11, 13, 1, 1, 3)
    assert_trees_all_close(got[:, :, :, 0, 0], whole, atol=1e-5)
    report = cheaper.report(variables, images)
    assert "other results than on single crops" in str(report)
    exact = fc.slide(model, (12, 12), 2)
    assert not fc.compare(exact, cheaper, (variables, images), progress=False).passed
    with pytest.raises(fc.PlanError, match="total stride"):
        fc.slide(model, (12, 12), 3, padding="image")(variables, images)
    with pytest.raises(ValueError, match="Expected padding='crops'"):
        cheaper.write(variables, images, out=np.zeros((2, 11, 13, 1, 1, 3)))
    with pytest.raises(ValueError, match="padding: expected 'crops' or 'image'"):
        fc.slide(model, (12, 12), padding="SAME")


def heads(order, left=False):
    """A convolution, a pool, and a head of float64 over a flatten in an order."""

    def net(weights, x):
        kernel, head = weights
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = nn.max_pool(jnp.tanh(y), (2, 2), (2, 2))
        y = jnp.transpose(y, order).reshape(y.shape[0], -1)
        return (head.T @ y.T).T if left else y @ head

    return net


@pytest.mark.parametrize(
    ("order", "stride", "left"),
    [
        ((0, 1, 2, 3), (1, 2), False),
        ((0, 3, 1, 2), (2, 2), True),
        ((0, 2, 3, 1), (3, 1), False),
    ],
)
def test_a_head_over_a_flatten_is_a_convolution(order, stride, left):
    window = (11, 8)  # 4 x 3 behind the pool
    with enable_x64(True):
        keys = jax.random.split(jax.random.key(2), 3)
        weights = (
            jax.random.normal(keys[0], (3, 3, 2, 5), float),
            jax.random.normal(keys[1], (4 * 3 * 5, 7), float),
        )
        x = jax.random.normal(keys[2], (2, 22, 18, 2), float)
        net = heads(order, left)
        grid = fc.slide(net, window, stride)
        want = crops_one_by_one(lambda x: net(weights, x), x, window, stride)
        np.testing.assert_allclose(grid(weights, x), want, rtol=0, atol=1e-13)
        program = str(jax.make_jaxpr(grid)(weights, x))
        assert "dot_general" not in program
        assert program.count("conv_general_dilated") == 2

        def loss(run):
            return lambda weights, x: (run(weights, x) ** 3).sum()

        rows = np.arange(0, 22 - window[0] + 1, stride[0])[:, None]
        columns = np.arange(0, 18 - window[1] + 1, stride[1])[:, None]
        rows, columns = rows + np.arange(window[0]), columns + np.arange(window[1])

        def apart(weights, x):
            crops = x[:, rows[:, None, :, None], columns[None, :, None, :]]
            return net(weights, crops.reshape(-1, *window, 2))

        got = jax.jit(jax.grad(loss(grid), (0, 1)))(weights, x)
        asked = jax.jit(jax.grad(loss(apart), (0, 1)))(weights, x)
        assert_trees_all_close(got, asked, rtol=1e-9, atol=1e-9)


def test_a_head_whose_crops_do_not_overlap_stays_a_product():
    net = heads((0, 1, 2, 3))
    weights = jnp.ones((3, 3, 2, 5)), jnp.ones((4 * 3 * 5, 7))
    program = str(jax.make_jaxpr(fc.slide(net, (11, 8), (11, 8)))(weights, IMAGES))
    assert program.count("conv_general_dilated") == 1
    assert "dot_general" in program


def test_a_head_has_forward_and_second_derivatives():
    net = heads((0, 1, 2, 3))
    keys = jax.random.split(jax.random.key(2), 2)
    weights = (
        jax.random.normal(keys[0], (3, 3, 2, 5)) / 4,
        jax.random.normal(keys[1], (4 * 3 * 5, 7)) / 8,
    )
    grid = fc.slide(net, (11, 8), (2, 2))
    x = IMAGES[:1, :15, :12]
    check_grads(grid, (weights, x), 2, atol=0.05, rtol=0.05)


def weighted(w, x):
    return nn.relu(x.reshape(len(x), -1) @ w)


def test_unscaled_integers_are_pointed_out():
    images = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 2)).astype(np.uint8)
    w = np.random.default_rng(1).normal(size=(32, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="are uint8 .* pass images / 255"):
        fc.slide(weighted, (4, 4), 1)(w, images)
    grid = fc.slide(lambda w, x: weighted(w, x / 255), (4, 4), 1)
    assert_trees_all_close(
        grid(w, images),
        fc.slide(weighted, (4, 4), 1)(w, images / np.float32(255)),
        atol=1e-5,
    )


def test_a_step_that_the_network_does_not_divide():
    model = Net("SAME")
    variables = initialised(model)
    with pytest.raises(fc.PlanError, match=r"total stride \(4, 4\), got \(2, 4\)"):
        fc.slide(model, (12, 12), (2, 4), padding="image")(
            model.init(jax.random.key(1), IMAGES[:, :12, :12]), IMAGES
        )
    around = fc.slide(model, (12, 10), padding="image")
    assert around.report(variables, IMAGES).stride == (4, 4)


def grid_of(kind):
    if kind == "linen":
        return fc.slide(Net(), WINDOW, STRIDE), (initialised(Net()), IMAGES)
    if kind == "function":
        return fc.slide(weighted, (4, 4), 2), (np.ones((32, 3), np.float32), IMAGES)
    return fc.slide(NnxNet(nnx.Rngs(0)), WINDOW, padding="image"), (IMAGES,)


def pickled(grid):
    return pickle.loads(pickle.dumps(grid))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        *((kind, copy.deepcopy) for kind in ("linen", "function", "nnx")),
        *((kind, pickled) for kind in ("linen", "function")),
        pytest.param("nnx", pickled, marks=needs("flax", "0.12.1")),
    ],
)
def test_copies(kind, used, copied):
    grid, args = grid_of(kind)
    if used:
        grid(*args)
    again = copied(grid)
    assert repr(again) == repr(grid)
    assert_trees_all_equal(again(*args), grid(*args))
