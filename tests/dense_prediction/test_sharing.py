"""How deep crops share, to the bit, and when a batch of crops is chosen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import crops_one_by_one

import fcconv_jax as fc
from fcconv_jax.dense_prediction import costs


class Vgg(nn.Module):
    """Four stages of two padded convolutions and a pool: a total stride of 16."""

    widths: tuple[int, ...] = (16, 32, 64, 64)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            for _ in range(2):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def abstract(model, size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    crop = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), crop), x


@pytest.mark.parametrize(("step", "shares"), [(8, True), (24, True), (64, False)])
def test_a_step_shares_the_maps_whose_strides_divide_it(step, shares):
    report = fc.slide(Vgg(), (64, 64), step).report(*abstract(Vgg(), 256))
    assert report.shares == shares
    assert (report.gain >= costs.WORTH_WHOLE) == shares
    assert "estimated speedup" in str(report)
    assert report.copied > 0


def test_the_report_splits_what_borders_cost():
    grid = fc.slide(Vgg(), (64, 64), 16)
    report = grid.report(*abstract(Vgg(), 128))
    around = fc.slide(Vgg(), (64, 64), 16, padding="image")
    assert report.image_flops == around.report(*abstract(Vgg(), 128)).flops
    assert f"{report.flops / report.image_flops:.1f}x the FLOPs of padding" in str(
        report
    )
    odd = fc.slide(Vgg(), (64, 64), 24).report(*abstract(Vgg(), 136))
    assert odd.image_flops is None


def test_the_report_names_the_operation_at_which_crops_part():
    def squeezed(kernels, x):
        for kernel in kernels:
            x = nn.relu(
                jax.lax.conv_general_dilated(
                    *(x, kernel, (1, 1), "VALID"),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            )
            x = x * x.mean((1, 2), keepdims=True)
        return x.sum((1, 2))

    def placed(kernels, x):
        return jnp.tanh(x @ kernels[0] + jnp.arange(8)[:, None]).mean((1, 2))

    images = jnp.ones((1, 40, 40, 3))
    kernels = [jnp.ones((3, 3, 3, 3))] * 2
    report = fc.slide(squeezed, (24, 24), 1).report(kernels, images)
    assert report.left == (("mul: an operand that each crop has of its own", 1),)
    report = fc.slide(placed, (8, 8), 2).report([jnp.ones((3, 4))], images)
    (why, _), *_ = report.left
    assert why == "add: an operand that depends on the position within the crop"
    plain = fc.slide(lambda x: x.mean((1, 2)), (8, 8), 2).report(images)
    assert not plain.left
    assert "no FLOPs in matmuls or convolutions" in str(plain)


class Swin(nn.Module):
    """Attention within windows of 3x4 patches of 2x2 pixels, shifted or not."""

    shift: tuple[int, int] = (0, 0)
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), padding="VALID")(x)
        n, rows, columns, width = x.shape
        down, across = rows // 3, columns // 4
        back = tuple(-each for each in self.shift)

        def windows(x):
            x = jnp.roll(x, back, (1, 2)).reshape(x.shape[0], down, 3, across, 4, -1)
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 12, x.shape[-1])

        joined = nn.Dense(3 * width)(windows(nn.LayerNorm()(x)))
        joined = joined.reshape(-1, 12, 3, self.heads, width // self.heads)
        q, k, v = joined.transpose(2, 0, 3, 1, 4)
        place = self.param("place", nn.initializers.normal(), (self.heads, 12, 12))
        scores = q @ k.swapaxes(-1, -2) + place
        rolled = np.arange(rows)[:, None] >= rows - self.shift[0]
        ids = 2 * rolled + (np.arange(columns) >= columns - self.shift[1])
        ids = windows(np.roll(ids, self.shift, (0, 1))[None, ..., None])
        apart = jnp.where(ids != ids.swapaxes(1, 2), -100.0, 0.0)[None, :, None]
        scores = scores.reshape(n, -1, *scores.shape[1:]) + apart
        y = nn.softmax(scores).reshape(-1, self.heads, 12, 12) @ v
        y = nn.Dense(width)(y.swapaxes(1, 2).reshape(-1, 12, width))
        y = y.reshape(n, down, across, 3, 4, width).transpose(0, 1, 3, 2, 4, 5)
        x = x + jnp.roll(y.reshape(x.shape), self.shift, (1, 2))
        return nn.Dense(3)(nn.LayerNorm()(x).mean((1, 2)))


@pytest.mark.parametrize(
    ("shift", "stride", "batch"),
    [
        ((0, 0), (6, 8), 1),
        ((1, 2), (6, 8), 2),
        ((1, 2), (6, 4), 1),
        ((0, 0), (5, 8), 2),
    ],
)
def test_attention_within_windows_is_that_of_each_crop(
    shift, stride, batch, monkeypatch
):
    monkeypatch.setattr(costs, "WORTH_WHOLE", 0.0)  # shares in any case
    model = Swin(shift)
    images = jax.random.normal(jax.random.key(0), (batch, 48, 56, 3))
    variables = model.init(jax.random.key(1), images[:, :24, :32])
    grid = fc.slide(model, (24, 32), stride)
    report = grid.report(variables, images)
    product = "dot_general: a product of two values that are computed from the image"
    assert (product in dict(report.left)) == (stride[0] == 5)
    want = crops_one_by_one(
        lambda x: model.apply(variables, x), images, (24, 32), stride
    )
    np.testing.assert_allclose(grid(variables, images), want, atol=2e-5)


def test_crops_a_window_apart_share_its_attention():
    images = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    crop = jax.ShapeDtypeStruct((1, 48, 64, 3), jnp.float32)
    variables = jax.eval_shape(Swin().init, jax.random.key(0), crop)
    reports = [
        fc.slide(Swin(), (48, 64), step).report(variables, images)
        for step in ((6, 8), (5, 7))
    ]
    assert fc.slide(Swin(), (48, 64)).report(variables, images).stride == (6, 8)
    aligned, other = (report.ratio for report in reports)
    assert reports[0].shares
    assert aligned > 10 > 3 > other


def test_attention_beside_the_axis_that_slides():
    """Crops end before the signal does: some operands keep its end, others don't."""

    def net(w, x):  # (N, samples, leads, features): attention over the leads
        q, k, v = jnp.tanh(x @ w + 1), x @ w.T, x @ (w + w.T)
        y = nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        return nn.avg_pool(y, (3, 1), (1, 1)).max((1, 2))

    x, w = jax.random.normal(jax.random.key(0), (2, 21, 6, 4)), jnp.eye(4)[::-1]
    got = fc.slide(net, 8, 3, axes=1)(w, x)
    want = [net(w, x[:, start : start + 8]) for start in range(0, 14, 3)]
    np.testing.assert_allclose(got, np.stack(want, 1), atol=1e-5)


def pairs(x):
    return x[:, :, None] - x[:, None, ::-1]


@pytest.mark.parametrize(
    "function",
    [
        pairs,
        lambda x: jnp.abs(pairs(x)).max((1, 2)),
        lambda x: pairs(x).mean(2),
        lambda x: nn.softmax(-(pairs(x) ** 2).sum(-1)) @ x,
        lambda x: jnp.diagonal(pairs(x), axis1=1, axis2=2),
    ],
)
def test_pairs_of_pixels_along_one_axis(function, monkeypatch):
    """Two axes of such arrays move with one of the image."""
    monkeypatch.setattr(costs, "WORTH_WHOLE", 0.0)  # shares in any case
    x = jax.random.normal(jax.random.key(0), (2, 23, 3))
    got = fc.slide(function, 8, 3)(x)
    want = [function(x[:, start : start + 8]) for start in range(0, 16, 3)]
    np.testing.assert_allclose(got, np.stack(want, 1), atol=1e-5)


def test_arrays_without_entries():
    def net(kernel, x):
        y = nn.relu(x[:, :0]).sum((1, 2))
        outs = [
            jax.lax.conv_general_dilated(
                *(each, kernel, (1, 1), "VALID"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for each in (x[:, :2], x[:, :, :0], x)
        ]
        return [out.sum((1, 2)) + y for out in outs]

    images = jax.random.normal(jax.random.key(0), (2, 13, 11, 2))
    kernel = jnp.ones((3, 1, 2, 2))
    got = fc.slide(net, (6, 5), 2)(kernel, images)
    want = net(kernel, images[:, 4:10, 2:7])
    for one, other in zip(got, want):
        np.testing.assert_allclose(one[:, 2, 1], other, atol=1e-5)


def integers(rng, *shape):
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)


@pytest.mark.parametrize("way", ["estimated", "in blocks", "a batch of crops"])
@pytest.mark.parametrize("stride", [(4, 8), (6, 2)])
def test_integers_are_those_of_each_crop_to_the_bit(way, stride, monkeypatch):
    if way == "in blocks":
        monkeypatch.setattr(costs, "PASS", 0.0)
        monkeypatch.setattr(costs, "MOVE", 1e9)
        monkeypatch.setattr(costs, "WORTH_WHOLE", 0.0)
    if way == "a batch of crops":
        monkeypatch.setattr(costs, "WORTH_WHOLE", np.inf)
    rng = np.random.default_rng(0)
    kernels = [integers(rng, 3, 3, a, b) for a, b in ((2, 4), (4, 3), (3, 5))]
    head = integers(rng, 5 * 5 * 4, 3)

    def net(params, x):
        kernels, head = params
        for i, kernel in enumerate(kernels):
            y = jax.lax.conv_general_dilated(
                *(x, kernel, (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(y) + y if i else y
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return x.reshape(x.shape[0], -1) @ head

    images = integers(rng, 2, 36, 40, 2)
    params = kernels, head
    got = fc.slide(net, (20, 16), stride)(params, images)
    want = crops_one_by_one(lambda x: net(params, x), images, (20, 16), stride)
    np.testing.assert_array_equal(got, want)
