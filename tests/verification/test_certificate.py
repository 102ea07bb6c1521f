import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fcconv_jax.verification import certificate, integer_draws
from fcconv_jax.verification.certificate import prepare_certificate
from fcconv_jax.versions import enable_x64


def _conv(x, k, b, *, strides=(1, 1), padding="VALID", groups=1):
    accumulate = jnp.int32 if x.dtype == jnp.int8 else None
    y = lax.conv_general_dilated(
        x,
        k,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=accumulate,
    )
    return y if b is None else y + b.astype(y.dtype)


def _dense(x, k, b):
    accumulate = jnp.int32 if x.dtype == jnp.int8 else None
    y = jnp.dot(x, k, preferred_element_type=accumulate)
    return y if b is None else y + b.astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    source: object
    target: object
    x: tuple
    kernel: tuple
    outputs: int
    map_kernel: object
    reduction: int
    index: object = None


def _blocks(x, p, q):
    n, h, w, c = x.shape
    x = x.reshape(n, h // p, p, w // q, q, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // p, w // q, p * q * c)


def _grouped_dense(x, k, b):
    groups = k.shape[0]
    x = x.reshape(*x.shape[:-1], groups, -1)
    accumulate = jnp.int32 if x.dtype == jnp.int8 else None
    y = jnp.einsum("...gi,gio->...go", x, k, preferred_element_type=accumulate)
    y = y.reshape(*y.shape[:-2], -1)
    return y if b is None else y + b.astype(y.dtype)


_PATCH_INDEX = (
    (np.arange(4)[:, None, None] % 2 * 3 + np.arange(6)[None, :, None] % 3) * 3
) + np.arange(3)

CASES = {
    "pointwise": Case(
        _dense, _conv, (2, 3, 4, 6), (6, 5), 5, lambda k: k.reshape(1, 1, 6, 5), 6
    ),
    "full_window": Case(
        lambda x, k, b: _dense(x.reshape(x.shape[0], -1), k, b),
        lambda x, k, b: _conv(x, k, b)[:, 0, 0],
        (2, 3, 4, 5),
        (60, 7),
        7,
        lambda k: k.reshape(3, 4, 5, 7),
        60,
    ),
    "patchify": Case(
        lambda x, k, b: _dense(_blocks(x, 2, 3), k, b),
        functools.partial(_conv, strides=(2, 3)),
        (2, 4, 6, 3),
        (18, 5),
        5,
        lambda k: k.reshape(2, 3, 3, 5),
        18,
        _PATCH_INDEX,
    ),
    "grouped": Case(
        _grouped_dense,
        functools.partial(_conv, groups=2),
        (2, 2, 3, 8),
        (2, 4, 3),
        6,
        lambda k: k.transpose(1, 0, 2).reshape(1, 1, 4, 6),
        4,
    ),
}


def _certify(case, dtype="float32", **changes):
    values = {
        "x": jax.ShapeDtypeStruct(case.x, dtype),
        "kernel": jax.ShapeDtypeStruct(case.kernel, dtype),
        "bias": jax.ShapeDtypeStruct((case.outputs,), dtype),
        "map_kernel": case.map_kernel,
        "reduction": case.reduction,
        "reduction_index": case.index,
    }
    values.update(changes)
    target = values.pop("target", case.target)
    return prepare_certificate(case.source, target, **values)()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_equal_forms_pass(name, dtype):
    found = _certify(CASES[name], dtype)
    assert found.passed, found
    assert found.miss_probability <= 1e-9
    assert found.dtype == dtype
    assert "bit-identical" in str(found)


def test_equal_forms_pass_in_float64():
    with enable_x64(True):
        found = _certify(CASES["full_window"], "float64")
    assert found.passed, found
    assert found.arithmetic.accumulate_roundoff <= 2.0**-53


def test_equal_forms_pass_without_bias():
    assert _certify(CASES["pointwise"], bias=None).passed


def test_small_layers_are_proved():
    assert _certify(CASES["full_window"]).proved
    assert _certify(CASES["full_window"], "bfloat16").proved


def _full_window(kernel):
    return {"map_kernel": kernel}


DEFECTS = {
    "flipped kernel": {
        "map_kernel": lambda k: k.reshape(3, 4, 5, 7)[::-1, ::-1],
    },
    "CHW read as HWC": {
        "map_kernel": lambda k: k.reshape(5, 3, 4, 7).transpose(1, 2, 0, 3),
    },
    "two rows swapped": {
        "map_kernel": lambda k: (
            k.at[jnp.array([17, 18])].set(k[jnp.array([18, 17])]).reshape(3, 4, 5, 7)
        ),
    },
    "bias off by one": {"map_bias": lambda b: b.at[3].add(1)},
    "bias rolled": {"map_bias": lambda b: jnp.roll(b, 1)},
    "bias dropped": {"map_bias": lambda b: b * 0},
    "SAME for VALID": {
        "target": lambda x, k, b: _conv(x, k, b, padding="SAME")[:, 0, 0]
    },
    "SAME for VALID, not cut": {
        "target": lambda x, k, b: _conv(x, k, b, padding="SAME")
    },
}


@pytest.mark.parametrize("placement", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name, dtype, placement, monkeypatch):
    if not placement:
        monkeypatch.setattr(integer_draws, "_PLACEMENT_CALLS", 0)
    found = _certify(CASES["full_window"], dtype, **DEFECTS[name])
    assert not found.passed
    assert not found.proved
    assert found.mismatch is not None
    assert "DIFFERENT" in str(found)


def test_one_wrong_entry_of_a_large_kernel_is_caught_in_bfloat16():
    case = Case(
        _dense, _conv, (1, 1, 1, 1000), (1000, 3), 3, lambda k: k[None, None], 1000
    )
    assert _certify(case, "bfloat16").passed
    found = _certify(
        case,
        "bfloat16",
        map_kernel=lambda k: k.at[777, 1].multiply(-1)[None, None],
    )
    assert not found.passed
    assert found.mismatch.index[-1] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduction", [4, 300, 5000])
def test_every_partial_sum_is_exact(dtype, reduction):
    # Read the draws off: what is summed must stay below the exact range, and over one
    # kernel draw every entry of x must have its turn.
    x = jax.ShapeDtypeStruct((1, reduction), dtype)
    kernel = jax.ShapeDtypeStruct((reduction, 2), dtype)
    bias = jax.ShapeDtypeStruct((2,), dtype)
    arithmetic = certificate._arithmetic([], x.dtype, x.dtype, None, None)
    limit = integer_draws.integer_limit(x.dtype)
    plan = integer_draws.plan_draws(arithmetic, (limit, limit), reduction, None)
    classes = integer_draws.number_classes(x, reduction, None, plan)
    rng = np.random.default_rng(0)
    draws = list(integer_draws.random_draws(rng, (x, kernel, bias), plan, classes))
    turns = len(draws) // plan.probes
    seen = np.zeros(reduction, bool)
    for xs, k, b in draws[: 3 * turns]:
        assert (abs(xs) @ abs(k) + abs(b)).max() <= arithmetic.exact_integers
        seen |= xs[0] != 0
    assert seen.mean() > 0.9
    assert (2 / plan.set_size) ** plan.probes <= 1e-9


def test_probe_counts_match_the_bound():
    found = _certify(CASES["full_window"], probes=2)
    assert found.probes == 2
    assert found.miss_probability == pytest.approx((2 / found.set_size) ** 2)
    assert found.set_size > 500
    assert math.isclose(_certify(CASES["pointwise"], probes=1, seed=3).probes, 1)


def test_impossible_dtypes_and_wrong_indices_are_refused():
    # 8 significand bits of bf16 passes leave room; one bit would not.
    with pytest.raises(ValueError, match="no exact probe exists"):
        integer_draws.plan_draws(certificate.Arithmetic(0.0, 0.5, 1.0), (8, 8), 4, None)
    case = dataclasses.replace(CASES["patchify"], index=np.zeros((3, 3), int))
    big = dataclasses.replace(
        case,
        x=(1, 4, 300, 1),
        kernel=(600, 5),
        source=lambda x, k, b: _dense(_blocks(x, 2, 300), k, b),
        target=functools.partial(_conv, strides=(2, 300)),
        map_kernel=lambda k: k.reshape(2, 300, 1, 5),
        reduction=600,
    )
    with pytest.raises(ValueError, match="Expected reduction_index of shape"):
        _certify(big, "bfloat16")


@pytest.mark.parametrize("lowered", ["bfloat16", "tf32"])
def test_a_precision_that_is_lowered_for_long_sums_only(lowered):
    """Entries of few bits, all that a long sum leaves, are exact in it too."""
    bits = {"bfloat16": 7, "tf32": 10}[lowered]

    def rounded(array):
        return jax.lax.reduce_precision(array, 8, bits)

    shapes = {
        "x": jax.ShapeDtypeStruct((2, 4000), "float32"),
        "kernel": jax.ShapeDtypeStruct((4000, 3), "float32"),
    }
    for side in (0, 1):

        def target(x, k, b, side=side):
            del b
            return (rounded(x) if side == 0 else x) @ (rounded(k) if side else k)

        found = prepare_certificate(
            lambda x, k, b: x @ k,
            target,
            map_kernel=lambda k: k,
            reduction=4000,
            **shapes,
        )()
        assert not found.passed
        assert found.mismatch.probe.startswith("12-bit")
