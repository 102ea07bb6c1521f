"""Reproduces the book's example and its two exercises, digit for digit.

Sebastian Raschka, *Machine Learning Q and AI* (2024), chapter 12: when is a fully
connected layer the same as a convolution? The weights are those of the book's
supplement (``torch.nn.Linear(4, 2)`` after ``torch.manual_seed(123)``). If PyTorch is
installed, the results are compared with its Linear and Conv2d.

    python examples/book.py
"""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp
import numpy as np
from jax import lax

import fcconv_jax as fc

X = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
# (in, out): Flax's Dense kernel is the transpose of PyTorch's weight.
KERNEL = np.array(
    [
        [-0.20388805866, 0.01656228304, -0.24832928181, 0.18855679035],
        [-0.42602753639, 0.36652195454, -0.36342012882, -0.39752095938],
    ],
    np.float32,
).T
BIAS = np.array([-0.31594353914, 0.22644674778], np.float32)
NHWC = ("NHWC", "HWIO", "NHWC")
# Two sums of 5 terms, in any order, differ by at most this in float32 (Higham 2002,
# ch. 3): twice the number of terms, times half an ulp of 1, times the sum of sizes.
BOUND = 2 * 5 * 2.0**-24 * (np.abs(X) @ np.abs(KERNEL) + np.abs(BIAS))


def conv(image: np.ndarray, kernel: np.ndarray, stride: int = 1, padding: int = 0):
    """Convolve an image ``(H, W, C)``; returns ``(H', W', O)``."""
    pads = [(padding, padding)] * 2
    y = lax.conv_general_dilated(
        jnp.asarray(image[None]),
        jnp.asarray(kernel),
        (stride, stride),
        pads,
        dimension_numbers=NHWC,
    )
    return np.asarray(y[0] + BIAS)


def equal(y: np.ndarray, dense: np.ndarray) -> bool:
    """Return whether two results are equal up to rounding."""
    return bool((np.abs(y.reshape(2) - dense) <= BOUND).all())


def show(title: str, y: np.ndarray) -> None:
    """Print a result, one line per channel and row."""
    print(f"{title}:", "x".join(map(str, y.shape[:-1])), "positions")
    for channel in range(y.shape[-1]):
        rows = [" ".join(f"{v:10.6f}" for v in row) for row in y[..., channel]]
        print("   channel", channel, ("\n" + " " * 13).join(rows))


def main() -> None:
    """Print every number; raise if two that must agree don't."""
    dense = np.asarray(jnp.dot(X, KERNEL) + BIAS)
    print("fully connected:", dense, "\n")

    window = fc.dense_kernel_to_conv(KERNEL, kernel_size=(2, 2))
    pointwise = fc.dense_kernel_to_conv(KERNEL, kernel_size=(1, 1))
    square, pixel = X.reshape(2, 2, 1), X.reshape(1, 1, 4)
    show("kernel as large as the 2x2 input", conv(square, window))
    show("1x1 kernel, 1x1 input of 4 channels", conv(pixel, pointwise))
    assert equal(conv(square, window), dense)
    assert equal(conv(pixel, pointwise), dense)

    print("\nExercise 12-1: what does a stride change?")
    print(fc.explain(fc.classify((2, 2), (2, 2), strides=2)), "\n")
    show("stride 2", conv(square, window, stride=2))
    assert (conv(square, window, stride=2) == conv(square, window)).all()

    print("\nExercise 12-2: what does padding change?")
    print(fc.explain(fc.classify((2, 2), (2, 2), padding=1)), "\n")
    padded = conv(square, window, padding=1)
    show("padding 1", padded)
    assert equal(padded[1, 1], dense)
    both = conv(square, window, stride=2, padding=1)
    show("padding 1 and stride 2", both)
    assert not any(equal(y, dense) for y in both.reshape(-1, 2))
    print("   the fully connected layer's value is lost: the stride skips the center")

    print("\nThese must not match:")
    wrong = fc.dense_kernel_to_conv(KERNEL, kernel_size=(2, 2), order="WHC")
    flipped = window[::-1, ::-1]
    for title, kernel in (("flattened by columns", wrong), ("flipped kernel", flipped)):
        y = conv(square, kernel)
        print(f"   {title}: {y.reshape(2)}")
        assert not equal(y, dense)

    if importlib.util.find_spec("torch") is None:
        print("\nPyTorch is not installed; skipped the comparison")
    else:
        compare_with_torch(dense)


def compare_with_torch(dense: np.ndarray) -> None:
    """Run PyTorch's Linear and Conv2d with the same weights."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        linear = torch.nn.Linear(4, 2)
        linear.weight.copy_(torch.from_numpy(KERNEL.T.copy()))
        linear.bias.copy_(torch.from_numpy(BIAS))
        conv2d = torch.nn.Conv2d(1, 2, kernel_size=2)
        conv2d.weight.copy_(linear.weight.reshape(2, 1, 2, 2))
        conv2d.bias = linear.bias
        results = {
            "Linear": linear(torch.from_numpy(X)).numpy(),
            "Conv2d": conv2d(torch.from_numpy(X.reshape(1, 1, 2, 2))).numpy(),
        }
    print()
    for name, y in results.items():
        print(f"PyTorch {name}: {y.reshape(2)}")
        assert equal(y, dense)


if __name__ == "__main__":
    main()
