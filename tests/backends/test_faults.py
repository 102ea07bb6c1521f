"""The table of XLA's known faults agrees with the version that is installed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import fcconv_jax as fc
from fcconv_jax.backends.faults import CROP, FAULTS, PACKED, POOL, STALE, cpu_notes
from fcconv_jax.backends.options import correct_options
from fcconv_jax.versions import check_bits

ROOT = Path(__file__).parents[2]
HERE = jaxlib.version.__version__
cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's CPU backend")


def test_each_fault_names_a_test():
    for fault in FAULTS:
        path, _, name = fault.test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text()
        assert fault.fixed is None or fault.first < fault.fixed


def test_versions():
    assert POOL.is_in("0.10.2")
    assert not POOL.is_in("0.9.2")
    assert not POOL.is_in("0.12.0.1")
    assert PACKED.is_in("0.7.2")
    assert not PACKED.is_in("0.8.0")


def pool(y, b):
    window = (1, 2, 2, 1)
    return lax.reduce_window(
        (y[0] + b)[None], -jnp.inf, lax.max, window, window, "VALID"
    )


def common(y, b):
    """A convolution with a bias, a relu, a residual and a max pool."""
    z = nn.relu(lax.conv(y, jnp.ones((4, 4, 1, 1)), (1, 1), "SAME") + b)
    return nn.max_pool(z + y, (2, 2))


def shifted(x, k):
    return jax.jit(lax.conv_general_dilated, static_argnums=(2, 3))(
        *(x, k, (1, 1), ((0, 0), (-1, 1)))
    )


IMAGE = jax.ShapeDtypeStruct((1, 4, 6, 5), jnp.float32)
PROGRAMS = {
    "0.10.2 pool": (pool, IMAGE, jnp.ones(5)),
    "0.10.2 common": (common, IMAGE, jnp.ones((4, 1, 1))),
    "0.9.2 pool": (pool, IMAGE, jnp.ones(5)),
    "0.11.0 shifted": (shifted, IMAGE, jnp.ones((2, 4, 1, 2))),
    "0.12.0 shifted": (shifted, IMAGE, jnp.ones((2, 4, 1, 2))),
    "0.7.2 packed": (jnp.transpose, jax.ShapeDtypeStruct((2, 3), "int4")),
    "0.7.2 matmul": (jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4))),
    "0.8.3 matmul": (jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 4))),
}
SHOWN = {
    "0.10.2 pool": POOL,
    "0.11.0 shifted": CROP,
    "0.7.2 packed": PACKED,
    "0.7.2 matmul": STALE,
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_notes_are_of_programs_that_may_show_a_fault(case):
    function, *args = PROGRAMS[case]
    program = jax.make_jaxpr(function)(*args)
    notes = cpu_notes([program], case.split()[0])
    wanted = [SHOWN[case].what] if case in SHOWN else []
    assert [note.partition("wrongly: ")[2].partition(" (")[0] for note in notes] == (
        wanted
    )


@cpu
def test_a_pool_behind_an_addition():
    y = np.random.default_rng(0).standard_normal((1, 236, 236, 8), np.float32)
    b = np.arange(8, dtype=np.float32)
    want = pool(jnp.asarray(y), b)
    wrong = not np.array_equal(jax.jit(pool)(y, b), want)
    assert wrong == POOL.is_in(HERE), "update POOL's versions in backends/faults.py"
    grid = fc.slide(lambda b, x: jax.vmap(lambda x: pool(x[None], b)[0])(x), (236, 236))
    np.testing.assert_array_equal(grid(b, y)[:, 0, 0], want)


@cpu
def test_slide_guards_pools_that_come_with_a_later_shape():
    def crops(b, x):
        pooled = jax.vmap(lambda x: pool(x[None], b)[0])
        return pooled(x) if x.shape[-1] == 8 else x.sum((1, 2))

    rng = np.random.default_rng(0)
    b, y = np.arange(8, dtype=np.float32), rng.standard_normal((1, 236, 236, 8), "f")
    grid = fc.slide(crops, (236, 236))
    ones = np.ones((1, 236, 236, 1), np.float32)
    assert grid(b, ones).item() == 236**2  # compiled without the options for pools
    np.testing.assert_array_equal(grid(b, y)[:, 0, 0], pool(jnp.asarray(y), b))


@cpu
def test_a_convolution_with_negative_padding():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, 5, 7, 4)).astype(np.float32)
    kernel = rng.integers(-3, 4, (1, 2, 4, 1)).astype(np.float32)
    names = ("NHWC", "HWIO", "NHWC")
    shifted = ((0, 0), (-1, 1))
    got = lax.conv_general_dilated(x, kernel, (1, 1), shifted, dimension_numbers=names)
    moved = np.pad(x[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    want = lax.conv_general_dilated(
        moved, kernel, (1, 1), "VALID", dimension_numbers=names
    )
    wrong = not np.array_equal(got, want)
    assert wrong == CROP.is_in(HERE), "update CROP's versions in backends/faults.py"


@cpu
def test_a_matmul_with_another_kernel():
    def read_patches(x, k):
        patches = x.reshape(4, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(4, 8, 8, 192) @ k

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((4, 64, 64, 3), (192, 128))]
    compiled = {
        name: jax.jit(read_patches).lower(*shapes).compile(compiler_options=options)
        for name, options in (
            ("as it is", {"xla_cpu_use_xnnpack": True} if STALE.is_in(HERE) else None),
            ("corrected", correct_options("cpu") or None),
        )
    }
    wrong = dict.fromkeys(compiled, 0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        x, k = (rng.integers(-9, 9, s.shape).astype(np.float32) for s in shapes)
        for name, run in compiled.items():
            y = np.asarray(run(jax.device_put(x), jax.device_put(k)))
            wrong[name] += not np.array_equal(y, read_patches(x, k))
    assert wrong["corrected"] == 0
    if not STALE.is_in(HERE):  # elsewhere it depends on addresses
        assert wrong["as it is"] == 0, "update STALE's versions in backends/faults.py"


def test_packed_integers():
    dtype = jnp.dtype("int2")
    if PACKED.is_in(HERE):
        with pytest.raises(ValueError, match="upgrade to jaxlib"):
            check_bits(dtype)
        check_bits(jnp.dtype("int8"))
        return
    check_bits(dtype)
    array = np.random.default_rng(0).integers(0, 2, (33, 1000)).astype(dtype)
    np.testing.assert_array_equal(jax.jit(jnp.transpose)(array), array.T)


@cpu
def test_verify_names_those_of_the_program():
    def call(params, x):
        return shifted(x @ params["kernel"], jnp.ones((3, 6, 1, 2))).mean()

    params = {"kernel": jnp.ones((5, 6))}
    x = jnp.ones((2, 6, 4, 5))
    report = fc.verify(call, params, x, gradients=False, progress=False)
    noted = any(CROP.what in note for note in report.notes)
    assert noted == CROP.is_in(HERE)
    assert not any(POOL.what in note for note in report.notes)
