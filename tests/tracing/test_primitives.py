"""Each primitive of the table, shown to everything that reads a trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import fcconv_jax as fc
from fcconv_jax.export.lowering.trace import lower
from fcconv_jax.messages.errors import ExportError
from fcconv_jax.tracing.jaxprs import opened, subjaxprs
from fcconv_jax.tracing.primitives import ENTRYWISE, FAMILIES, LEFT_OUT, ROUNDING, SAME
from fcconv_jax.verification.obstacles import obstacles
from fcconv_jax.verification.reading import Reading


def auto_mesh():
    return Mesh(np.array(jax.devices()[:1]), ("a",), axis_types=(AxisType.Auto,))


def unary(name):
    return lambda x: getattr(lax, name)(x)


def binary(name):
    return lambda x: getattr(lax, name)(x, x * 0.5 + 0.1)


def integers(name, operands=2):
    def call(x):
        n = (x * 9).astype(jnp.int32)
        return getattr(lax, name)(*[n, n % 4][:operands])

    return call


def custom_jvp(x):
    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvp(lambda xs, ts: (square(*xs), 2 * xs[0] * ts[0]))
    return square(x)


def custom_vjp(x):
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))
    return square(x)


def pool(combine, start):
    def call(x):
        window = (1, 2, 2, 1)
        return lax.reduce_window(x, start, combine, window, (1, 1, 1, 1), "VALID")

    return call


def average(x, y):
    return (x + y) / 2


# Functions of floats in (0, 1): of any shape where they work entry by entry, else of
# images (N, H, W, 4).
EXAMPLES = {
    "copy": jnp.copy,
    "device_put": lambda x: jax.device_put(x, jax.devices()[0]),
    "name": lambda x: checkpoint_name(x, "x"),
    "optimization_barrier": lambda x: lax.optimization_barrier((x * 2, x))[1],
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, NamedSharding(auto_mesh(), PartitionSpec())
    ),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
    **{
        name: unary(name)
        for name in """
        abs acos asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma
        erf erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg
        rsqrt sign sin sinh sqrt square tan tanh
        """.split()
    },
    **{
        name: binary(name)
        for name in """
        add atan2 div eq ge gt igamma igammac le lt max min mul ne nextafter pow rem sub
        """.split()
    },
    **{
        name: integers(operation)
        for name, operation in {
            "xor": "bitwise_xor",
            "shift_left": "shift_left",
            "shift_right_arithmetic": "shift_right_arithmetic",
            "shift_right_logical": "shift_right_logical",
        }.items()
    },
    "add_any": jax.grad(lambda x: (jnp.sin(x) + jnp.cos(x)).sum()),
    "and": lambda x: (x > 0.3) & (x < 0.7),
    "or": lambda x: (x < 0.3) | (x > 0.7),
    "round": jnp.round,
    "zeta": lambda x: lax.zeta(x + 2, x),
    "acosh": lambda x: lax.acosh(x + 1),
    "clamp": lambda x: lax.clamp(0.2, x, 0.8),
    "clz": integers("clz", 1),
    "complex": lambda x: lax.abs(lax.complex(x, x)),
    "conj": lambda x: lax.abs(lax.conj(lax.complex(x, x))),
    "imag": lambda x: lax.imag(lax.complex(x, x)),
    "real": lambda x: lax.real(lax.complex(x, x)),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "not": lambda x: lax.bitwise_not(x > 0.5),
    "polygamma": lambda x: lax.polygamma(jnp.ones_like(x), x + 1),
    "population_count": integers("population_count", 1),
    "igamma_grad_a": lambda x: jax.grad(lambda a: lax.igamma(a, x).sum())(x),
    "regularized_incomplete_beta": lambda x: lax.betainc(x, x * 2, x),
    "select_n": lambda x: lax.select(x > 0.5, x, -x),
    "broadcast_in_dim": lambda x: x[..., None] * jnp.ones((2,)),
    "reshape": lambda x: x.reshape(*x.shape[:3], 2, 2),
    "rev": lambda x: lax.rev(x, (3,)),
    "slice": lambda x: x[..., 1:3],
    "split": lambda x: lax.split(x, (1, 3), 3)[1],
    "squeeze": lambda x: lax.squeeze(x[..., :1], (3,)),
    "transpose": lambda x: x.reshape(*x.shape[:3], 2, 2).transpose(0, 1, 2, 4, 3),
    "tile": lambda x: jnp.tile(x, (1, 1, 1, 2)),
    "concatenate": lambda x: jnp.concatenate([x, x * 2], -1),
    "pad": lambda x: lax.pad(x, 1.0, ((0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 2, 0))),
    "reduce_window": pool(average, 0.0),
    "reduce_window_max": pool(lax.max, -jnp.inf),
    "reduce_window_min": pool(lax.min, jnp.inf),
    "reduce_window_sum": pool(lax.add, 0.0),
    **{
        name: lambda x, name=name: getattr(lax, name)(x, 3)
        for name in ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
    },
    "argmax": lambda x: lax.argmax(x, 3, jnp.int32),
    "argmin": lambda x: lax.argmin(x, 3, jnp.int32),
    "reduce_and": lambda x: (x > 0.3).all(-1),
    "reduce_or": lambda x: (x > 0.7).any(-1),
    "reduce_xor": lambda x: lax.reduce_xor((x * 9).astype(jnp.int32), (3,)),
    "reduce_max": lambda x: x.max(-1),
    "reduce_min": lambda x: x.min(-1),
    "reduce_prod": lambda x: x.prod(-1),
    "reduce_sum": lambda x: x.sum(-1),
    "conv_general_dilated": lambda x: lax.conv_general_dilated(
        x,
        jnp.ones((2, 2, 4, 3)),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "dot_general": lambda x: x @ jnp.arange(12.0).reshape(4, 3),
    "jit": jax.jit(lambda x: x * 2 + 1),
    "remat2": jax.checkpoint(lambda x: jnp.sin(x) * 2),
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "cond": lambda x: lax.cond(jnp.ones(()).sum() > 0, jnp.sin, jnp.cos, x),
    "scan": lambda x: lax.scan(lambda c, s: (c * s, None), x, jnp.arange(1.0, 4))[0],
    "while": lambda x: lax.fori_loop(0, jnp.ones((), int) + 2, lambda i, c: c * 2, x),
}

# No public function of JAX 0.10 makes these outside of shard_map or an Explicit mesh.
ELSEWHERE = frozenset(
    """
    call checkpoint checkpoint_name closed_call copy_p core_call core_closed_call
    custom_vjp_call_jaxpr eq_to expand_dims layout_constraint le_to lt_to mesh_cast
    mulhi one_minus_square pjit pvary remat reshard stack stop_gradient unstack
    """.split()
)
IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (2, 9, 8, 4)).astype(np.float32)
# Earlier versions of JAX tile by a broadcast and a reshape.
NEW = {"tile": needs("jax", "0.9.0")}
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEW.get(name, ())) for name in sorted(EXAMPLES)]
)


def names(jaxpr):
    for eqn in opened(jaxpr)[0].eqns:
        yield eqn.primitive.name
        for _, body in subjaxprs(eqn):
            yield from names(body)


def left_out(reader, name):
    return name in LEFT_OUT[reader]


def test_the_table_and_the_examples_are_the_same_set():
    table = [name for family in FAMILIES.values() for name in family]
    assert len(table) == len(set(table)), "a primitive is in two families"
    assert set(table) == set(EXAMPLES) | ELSEWHERE
    assert not set(EXAMPLES) & ELSEWHERE
    for reader, names_ in LEFT_OUT.items():
        assert set(names_) <= set(table), reader


@EVERY
def test_the_example_has_the_primitive(name):
    assert name in names(jax.make_jaxpr(EXAMPLES[name])(IMAGES))


@EVERY
def test_entry_by_entry_is_what_the_table_says(name):
    """One entry changed changes that entry alone, for entrywise primitives only."""
    first = np.asarray(EXAMPLES[name](IMAGES))
    changed = IMAGES.copy()
    changed[1, 2, 3, 1] = 0.987
    second = np.asarray(EXAMPLES[name](changed))
    if name in ENTRYWISE:
        assert first.shape == IMAGES.shape
        different = np.argwhere(first != second).tolist()
        assert different in ([], [[1, 2, 3, 1]])
    if name in SAME:
        np.testing.assert_array_equal(second, changed)


def features(name):
    def call(w, crops):
        y = EXAMPLES[name](jax.nn.sigmoid(crops @ w)).astype(jnp.float32)
        return y.reshape(*y.shape[:3], -1).mean((1, 2))

    return call


@EVERY
def test_slide(name):
    grid = fc.slide(features(name), window=(6, 6), stride=1)
    left = grid.report(jnp.eye(4), IMAGES).left
    assert bool(left) == left_out("slide", name), left


def test_slide_computes_what_each_crop_gives():
    def every(w, crops):
        return {name: features(name)(w, crops) for name in EXAMPLES}

    w = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    grid = fc.slide(every, window=(6, 6), stride=1)(w, IMAGES)
    crop = jax.jit(every)(w, IMAGES[:, 2:8, 1:7])
    for name, whole in grid.items():
        np.testing.assert_allclose(
            whole[:, 2, 1], crop[name], rtol=1e-3, atol=1e-4, err_msg=name
        )


@EVERY
def test_flattens_are_found(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = EXAMPLES[name](x).astype(jnp.float32)
            return nn.Dense(3, name="head")(y.reshape(y.shape[0], -1))

    class After(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = EXAMPLES[name](x.reshape(x.shape[0], -1))
            return nn.Dense(3, name="head")(y.astype(jnp.float32))

    y = jax.eval_shape(EXAMPLES[name], IMAGES)
    if len(y.shape) == 4:
        assert fc.make_plan(Net(), IMAGES)["head"].window == y.shape[1:3]
    if name in ENTRYWISE or name in FAMILIES["calls"] | FAMILIES["control"]:
        found = fc.make_plan(After(), IMAGES)["head"].window == (9, 8)
        assert found != left_out("flatten", name)


@EVERY
def test_weights_are_followed(name):
    def scaled(w, x):
        return x @ (w * EXAMPLES[name](jnp.full((), 0.3)).astype(jnp.float32))

    def itself(w, x):
        return x @ EXAMPLES[name](w).astype(jnp.float32)

    w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    if name in ENTRYWISE:
        assert len(fc.make_plan(scaled, w, x, to="conv")) == 1
    if name in SAME | ROUNDING:
        assert len(fc.make_plan(itself, w, x, to="conv")) == 1


@EVERY
def test_export(name):
    jaxpr = jax.make_jaxpr(features(name))(jnp.eye(4), IMAGES)
    if left_out("export", name):
        with pytest.raises(ExportError):
            lower(jaxpr, [("w", np.eye(4, dtype=np.float32))], ["x"], ["y"])
    else:
        lower(jaxpr, [("w", np.eye(4, dtype=np.float32))], ["x"], ["y"])


def test_float64_reading():
    shown = [name for name in EXAMPLES if not left_out("reading", name)]

    def every(x):
        return [EXAMPLES[name](x) for name in shown]

    jaxpr = jax.make_jaxpr(every)(IMAGES)
    assert not obstacles(jaxpr)
    found, _ = Reading(jaxpr)([IMAGES])
    for name, one, other in zip(shown, found, every(IMAGES)):
        assert np.dtype(one.dtype) in (np.float64, np.int32, np.bool_), name
        np.testing.assert_allclose(
            one, np.asarray(other, one.dtype), rtol=1e-2, atol=1e-4, err_msg=name
        )


@EVERY
def test_what_the_reading_leaves_out(name):
    if left_out("reading", name):
        assert obstacles(jax.make_jaxpr(EXAMPLES[name])(IMAGES))
