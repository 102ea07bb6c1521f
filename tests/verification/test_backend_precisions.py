"""The precisions that backends use on their own, emulated: measured, and exact."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs, one_in
from jax import lax

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.verification import arithmetic
from fcconv_jax.verification.arithmetic import measure_precision
from fcconv_jax.verification.certificate import prepare_certificate
from fcconv_jax.verification.layer_certificates import certify_layer

_dot, _conv = lax.dot_general, lax.conv_general_dilated


def _parts(x, exponent, mantissa, count):
    parts = []
    for _ in range(count):
        parts.append(lax.reduce_precision(x, exponent, mantissa))
        x = x - parts[-1]
    return parts


# Exponent and mantissa bits of the parts that an operand is split into, their number,
# and what the matmuls that are kept lose of an operand.
MODES = {
    "f32": (8, 23, 1, (0.0, 0.0)),
    "tf32": (8, 10, 1, (2.0**-11, 2.0**-11)),
    "bf16": (8, 7, 1, (2.0**-8, 2.0**-8)),
    "bf16 x3": (8, 7, 2, (2.0**-18, 2.0**-15)),
    "bf16 x6": (8, 7, 3, (0.0, 2.0**-21)),
    "f16": (5, 10, 1, (2.0**-11, 2.0**-11)),
    "f8 e4m3": (4, 3, 1, (2.0**-4, 2.0**-4)),
    "f8 e5m2": (5, 2, 1, (2.0**-3, 2.0**-3)),
}


def _emulated(contract, mode):
    exponent, mantissa, count, _ = MODES[mode]

    def run(a, b, *args, **kwargs):
        if a.dtype != jnp.float32:
            return contract(a, b, *args, **kwargs)
        left = _parts(a, exponent, mantissa, count)
        right = _parts(b, exponent, mantissa, count)
        kept = [(i, j) for i in range(count) for j in range(count) if i + j < count]
        # The small ones first, as a backend adds them.
        return sum(
            contract(left[i], right[j], *args, **kwargs)
            for i, j in sorted(kept, key=sum, reverse=True)
        )

    return run


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Every dot and convolution of this package, as a backend in that mode does it."""
    arithmetic._measure.cache_clear()
    monkeypatch.setattr(lax, "dot_general", _emulated(_dot, request.param))
    monkeypatch.setattr(lax, "conv_general_dilated", _emulated(_conv, request.param))
    yield request.param
    arithmetic._measure.cache_clear()


@pytest.fixture(scope="module")
def plan():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(5, (3, 3), name="conv")(x))
            return nn.Dense(6, name="fc")(x.reshape(x.shape[0], -1))

    return fc.make_plan(Net(), jax.ShapeDtypeStruct((1, 3, 2, 2), "float32"))


def _swapped(layer):
    kernel = Rearrangement((30, 6), (2, 15, 6), (1, 0, 2), (3, 2, 5, 6))
    return dataclasses.replace(layer, leaves=(("kernel", kernel), *layer.leaves[1:]))


def test_the_precision_in_force_is_read(mode):
    low, high = MODES[mode][-1]
    for form in ("dot", "conv"):
        found = measure_precision("float32", form=form)
        assert low <= found.input_roundoff <= high, form
        # The narrowest range has no probe beyond 2**-12 of the largest.
        limit = 2.0**-12 if mode == "f8 e4m3" else 2.0**-24
        assert 2.0**-24 <= found.accumulate_roundoff <= limit


def test_probes_are_exact_and_defects_are_caught(mode, plan):
    def exact(x, k, b):
        return (jnp.dot(x.astype(int), k.astype(int)) + b.astype(int)).astype(x.dtype)

    shapes = {
        "x": jax.ShapeDtypeStruct((4, 30), "float32"),
        "kernel": jax.ShapeDtypeStruct((30, 6), "float32"),
        "bias": jax.ShapeDtypeStruct((6,), "float32"),
    }
    contract = (((1,), (0,)), ((), ()))
    # Against integers: nothing at all is rounded.
    found = prepare_certificate(
        lambda x, k, b: lax.dot_general(x, k, contract) + b,
        exact,
        **shapes,
        map_kernel=lambda k: k,
        reduction=30,
    )()
    assert found.passed, str(found)
    layer = plan["fc"]
    found = certify_layer(layer, plan.to)
    assert found.passed, str(found)
    assert found.miss_probability <= 1e-9
    assert not certify_layer(_swapped(layer), plan.to).passed


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        ("float8_e4m3fn", "float32"),
        ("float8_e4m3fn", None),
        ("float8_e5m2", "bfloat16"),
        ("float8_e4m3fnuz", "float32"),
        ("float8_e5m2fnuz", None),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("int8", "int32"),
        ("int8", None),
        pytest.param("int4", None, marks=needs("jax", "0.8.0")),
    ],
)
@pytest.mark.parametrize("to", one_in(2, ["conv", "dense"]))
def test_quantised_layers_certify(plan, dtype, out, to):
    layer = plan["fc"] if to == "conv" else plan.inverse()["fc"]
    if to == "dense":
        layer = dataclasses.replace(layer, input_shape=(1, 3, 2, 5))
    found = certify_layer(layer, to, dtype, preferred_element_type=out)
    assert found.passed, str(found)
    assert found.miss_probability <= 1e-9
    if to == "conv":
        wrong = _swapped(layer)
        assert not certify_layer(wrong, to, dtype, preferred_element_type=out).passed


def test_a_narrow_matmul_in_a_wide_layer_is_read():
    # float32 in, float32 out, but the matmul itself is of float8: only 16 fits.
    contract = (((1,), (0,)), ((), ()))

    def quantised(x, k, b):
        x, k = x.astype("float8_e4m3fn"), k.astype("float8_e4m3fn")
        return lax.dot_general(x, k, contract, preferred_element_type="float32") + b

    found = prepare_certificate(
        quantised,
        lambda x, k, b: jnp.dot(x, k, precision="highest") + b,
        x=jax.ShapeDtypeStruct((2, 30), "float32"),
        kernel=jax.ShapeDtypeStruct((30, 6), "float32"),
        bias=jax.ShapeDtypeStruct((6,), "float32"),
        map_kernel=lambda k: k,
        reduction=30,
    )()
    assert found.passed, str(found)
    assert found.set_size <= 33


@pytest.mark.parametrize(
    ("dtype", "out"), [("int8", "int32"), ("float8_e4m3fn", "float32")]
)
def test_quantised_functions_convert_and_keep_their_types(dtype, out):
    def f(p, x):
        contract = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], contract, preferred_element_type=out)

    rng = np.random.default_rng(0)
    p = {"w": rng.integers(-4, 5, (6, 3)).astype(jnp.dtype(dtype))}
    x = rng.integers(-4, 5, (2, 6)).astype(jnp.dtype(dtype))
    plan = fc.make_plan(f, p, x)
    y = fc.convert_model(f, plan)(fc.convert_params(p, plan), x)
    assert y.dtype == jnp.dtype(out)
    want = np.asarray(x).astype(int) @ np.asarray(p["w"]).astype(int)
    np.testing.assert_array_equal(np.asarray(y).astype(int), want)


def test_an_algorithm_that_a_convolution_cannot_take_is_named():
    def f(p, x):
        algorithm = lax.DotAlgorithmPreset.BF16_BF16_F32
        return lax.dot_general(x, p, (((1,), (0,)), ((), ())), precision=algorithm)

    plan = fc.make_plan(f, jnp.ones((6, 3)), jnp.ones((2, 6)))
    assert not plan
    (reason,) = plan.skipped.values()
    assert "BF16_BF16_F32" in reason
