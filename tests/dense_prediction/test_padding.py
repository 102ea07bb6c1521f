"""Padding around the image: a fully convolutional network, wherever crops end."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import fcconv_jax as fc

IMAGES = jax.random.normal(jax.random.key(0), (1, 48, 44, 3))


class Net(nn.Module):
    """A stem by a factor of two, and padded layers at one resolution."""

    stem: str

    @nn.compact
    def __call__(self, x):
        if self.stem == "reshape":  # space to depth
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(n, h // 2, w // 2, 4 * c)
        else:
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        y = nn.Conv(6, (3, 3), padding="VALID")(x)
        y = y + x[:, 1:-1, 1:-1]  # an axis of other places, and other sizes
        return nn.Conv(4, (3, 3))(nn.relu(y))


@pytest.mark.parametrize(
    ("stem", "stride"),
    [("reshape", None), ("reshape", 10), ("pool", 10), ("pool", 20)],
)
def test_crops_are_parts_of_the_network_on_the_image(stem, stride):
    """Where crops end before the image, and where they leave gaps, too."""
    model = Net(stem)
    variables = model.init(jax.random.key(1), IMAGES)
    whole = model.apply(variables, IMAGES)
    grid = fc.slide(model, (16, 12), stride, padding="image")
    got, step = grid(variables, IMAGES), (stride or 2) // 2
    rows, columns = got.shape[1:3]
    assert rows == (48 - 16) // (2 * step) + 1
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns - 1)):
        want = whole[:, i * step :][:, :6, j * step :][:, :, :4]
        np.testing.assert_allclose(got[:, i, j], want, atol=1e-5)


def test_a_stem_of_reshapes_has_a_stride():
    model = Net("reshape")
    variables = model.init(jax.random.key(1), IMAGES)
    assert fc.slide(model, (16, 12)).report(variables, IMAGES).stride == (2, 2)
    with pytest.raises(fc.PlanError, match=r"total stride \(2, 2\), got \(3, 2\)"):
        fc.slide(model, (16, 12), (3, 2), padding="image").report(variables, IMAGES)


@pytest.mark.parametrize("stem", ["strided slices", "repeat"])
def test_entries_that_were_moved_are_refused_with_the_way_out(stem):
    """A Focus stem, as in YOLOv5, and nearest upsampling."""

    def model(kernel, x):
        x = x.repeat(2, 1) if stem == "repeat" else x[:, ::2] + x[:, 1::2]
        window = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **window)

    kernel = jax.random.normal(jax.random.key(2), (3, 3, 3, 2))
    grid = fc.slide(model, (16, 12), 4, padding="image")
    with pytest.raises(fc.PlanError, match="Pass padding='crops'"):
        grid.report(kernel, IMAGES)
    assert fc.slide(model, (16, 12), 4).report(kernel, IMAGES).positions == (9, 9)
