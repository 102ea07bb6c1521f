import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.verification import arithmetic
from fcconv_jax.verification.arithmetic import (
    Arithmetic,
    measure_precision,
    unit_roundoff,
)
from fcconv_jax.versions import enable_x64

_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="figures of the CPU")


@_cpu
@pytest.mark.parametrize("form", ["dot", "conv"])
@pytest.mark.parametrize(
    ("dtype", "accumulate", "output"),
    [("float32", -24, -24), ("bfloat16", -24, -8), ("float16", -24, -11)],
)
def test_contractions_on_cpu(dtype, accumulate, output, form):
    assert measure_precision(dtype, form=form) == Arithmetic(
        0.0, 2.0**accumulate, 2.0**output
    )


@_cpu
def test_float64_on_cpu():
    with enable_x64(True):
        for form in ("dot", "conv"):
            found = measure_precision("float64", form=form)
            assert found == Arithmetic(0.0, 2.0**-53, 2.0**-53)


def _measured(contraction, dtype):
    def run(rows, columns):
        rows, columns = (jnp.asarray(x, dtype) for x in (rows, columns))
        return np.asarray(contraction(rows, columns)).astype(np.float64)

    return arithmetic._input_roundoff(run, dtype), arithmetic._accumulate_roundoff(
        run, dtype
    )


def _dot(rows, columns):
    return jnp.dot(rows, columns, precision="highest")


def test_bfloat16_passes_are_read_off():
    # What a TPU does to float32 operands by default.
    def tpu(rows, columns):
        bf16 = jnp.bfloat16
        return jnp.dot(
            rows.astype(bf16), columns.astype(bf16), preferred_element_type="float32"
        )

    assert _measured(tpu, "float32") == (2.0**-8, 2.0**-24)


def test_three_bfloat16_passes_are_read_off():
    # precision='high' on TPU: the matmul of the low parts is dropped.
    def tpu(rows, columns):
        parts = []
        for x in (rows, columns):
            high = x.astype(jnp.bfloat16).astype("float32")
            low = (x - high).astype(jnp.bfloat16).astype("float32")
            parts.append((high, low))
        (a, da), (b, db) = parts
        return _dot(a, b) + (_dot(a, db) + _dot(da, b))

    inputs, _ = _measured(tpu, "float32")
    assert 2.0**-18 <= inputs <= 2.0**-16


@pytest.mark.parametrize(("cut", "expected"), [(False, 2.0**-11), (True, 2.0**-10)])
def test_tf32_is_read_off(cut, expected):
    # CUDA: 10 mantissa bits of the operands are kept, rounded or cut.
    def tf32(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        bits = (bits if cut else bits + 0x1000) & jnp.uint32(0xFFFFE000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    inputs, accumulate = _measured(lambda a, b: _dot(tf32(a), tf32(b)), "float32")
    assert (inputs, accumulate) == (expected, 2.0**-24)


def test_a_narrow_accumulator_is_read_off():
    def narrow(rows, columns):
        def add(total, pair):
            row, column = pair
            matmul = jnp.outer(row, column)
            return (total + matmul).astype(jnp.float16), None

        zero = jnp.zeros((rows.shape[0], columns.shape[1]), jnp.float16)
        return jax.lax.scan(add, zero, (rows.T, columns))[0]

    run = jax.jit(narrow)
    assert _measured(run, jnp.dtype("float16")) == (0.0, 2.0**-11)


def test_cut_sums_are_told_from_rounded_ones():
    def cut(rows, columns):
        # Additions in float64, cut to float32 after each.
        def add(total, pair):
            row, column = pair
            wide = total.astype("float64") + jnp.outer(row, column)
            near = wide.astype("float32")
            over = jnp.abs(near.astype("float64")) > jnp.abs(wide)
            return jnp.where(
                over, jnp.nextafter(near, jnp.zeros_like(near)), near
            ), None

        with enable_x64(True):
            zero = jnp.zeros((rows.shape[0], columns.shape[1]), "float32")
            return jax.lax.scan(add, zero, (rows.T, columns))[0]

    _, accumulate = _measured(cut, "float32")
    assert accumulate == 2.0**-23


def test_measuring_inside_a_trace():
    arithmetic._measure.cache_clear()
    found = []

    @jax.jit
    def f(x):
        found.append(measure_precision(x.dtype))
        return x

    f(jnp.float32(1))
    assert found[0].output_roundoff == 2.0**-24


def test_unit_roundoff_and_limits():
    assert unit_roundoff("bfloat16") == 2.0**-8
    assert unit_roundoff("complex64") == 2.0**-24
    assert unit_roundoff(bool) == 0
    worse = functools.reduce(
        Arithmetic.worse, [Arithmetic(0.0, 1.0, 2.0), Arithmetic(0.5, 0.5, 3.0)]
    )
    assert worse == Arithmetic(0.5, 1.0, 3.0)
    assert Arithmetic(2.0**-8, 2.0**-24, 2.0**-11).exact_integers == 2048
    assert Arithmetic(2.0**-8, 2.0**-24, 2.0**-11).exact_inputs == 256
    with pytest.raises(ValueError, match="expected form"):
        measure_precision("float32", form="fft")  # pyright: ignore
