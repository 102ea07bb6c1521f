import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fcconv_jax as fc
from fcconv_jax.geometry.kernels import Rearrangement


def net(body):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, *inputs):
            return body(*inputs)

    return Net()


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def flat(x):
    return x.reshape(x.shape[0], -1)


def head(x):
    return nn.Dense(4, name="head")(x)


def layer(body, *shape):
    return fc.make_plan(net(body), zeros(*shape))["head"]


FLATTENS = {
    "HWC": (lambda x: head(flat(x)), (2, 5, 4, 3), (5, 4), "HWC"),
    "batch of one": (lambda x: head(flat(x)), (1, 5, 4, 3), (5, 4), "HWC"),
    "one channel": (lambda x: head(flat(x)), (2, 5, 4, 1), (5, 4), "HWC"),
    "one channel, one image": (lambda x: head(flat(x)), (1, 5, 4, 1), (5, 4), "HWC"),
    "height one": (lambda x: head(flat(x)), (2, 1, 4, 3), (1, 4), "HWC"),
    "CHW": (lambda x: head(flat(x.transpose(0, 3, 1, 2))), (2, 5, 4, 3), (5, 4), "CHW"),
    "WHC": (lambda x: head(flat(x.transpose(0, 2, 1, 3))), (2, 5, 4, 3), (5, 4), "WHC"),
    "1-D": (lambda x: head(flat(x)), (2, 5, 3), (5,), "WC"),
    "3-D": (lambda x: head(flat(x)), (2, 5, 4, 3, 2), (5, 4, 3), "DHWC"),
    "3-D CDHW": (
        lambda x: head(flat(x.transpose(0, 4, 1, 2, 3))),
        (2, 5, 4, 3, 2),
        (5, 4, 3),
        "CDHW",
    ),
    "two steps": (
        lambda x: head(flat(nn.relu(x.reshape(2, 20, 3)))),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "ravel": (lambda x: head(x.ravel()), (5, 4, 3), (5, 4), "HWC"),
    "ravel a row": (lambda x: head(x.ravel()), (5, 3), (5,), "WC"),
    "relu jit remat": (
        lambda x: head(jax.checkpoint(jax.jit(lambda x: flat(nn.relu(x))))(x)),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "custom_jvp": (lambda x: head(nn.silu(nn.relu6(flat(x)))), (2, 5, 3), (5,), "WC"),
    "casts": (
        lambda x: head(flat(x).astype(jnp.bfloat16).astype(jnp.float32)),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "dropout": (
        lambda x: head(nn.Dropout(0.5, deterministic=False)(flat(x))),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "norm after": (
        lambda x: head(nn.BatchNorm(use_running_average=False)(flat(x))),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "norm after, one image": (
        lambda x: head(nn.LayerNorm()(flat(x))),
        (1, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "residual": (
        lambda x: head(flat(x + nn.Conv(3, (3, 3))(x)) * 2),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "max_pool": (
        lambda x: head(flat(nn.max_pool(x, (2, 2), (2, 2)))),
        (2, 6, 4, 3),
        (3, 2),
        "HWC",
    ),
    "avg_pool of CHW": (
        lambda x: head(flat(nn.avg_pool(x, (2, 2), (2, 2)).transpose(0, 3, 1, 2))),
        (2, 6, 4, 3),
        (3, 2),
        "CHW",
    ),
    "transpose, pool, transpose": (
        lambda x: head(
            flat(nn.max_pool(x.transpose(0, 2, 1, 3), (2, 1), (2, 1)).swapaxes(1, 2))
        ),
        (2, 5, 4, 3),
        (5, 2),
        "HWC",
    ),
    "patches": (
        lambda x: head(
            x.reshape(2, 3, 2, 4, 3, 5).swapaxes(2, 3).reshape(2, 12, 2 * 3 * 5)
        ),
        (2, 6, 12, 5),
        (2, 3),
        "HWC",
    ),
    "tokens mixed": (
        lambda x: head(x.reshape(2, 20, 3).swapaxes(1, 2)),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "inside vmap": (
        lambda x: head(jax.vmap(jnp.ravel)(x)),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "cond": (
        lambda x: head(
            jax.lax.cond(x.sum() > 0, lambda x: flat(x), lambda x: -flat(x), x)
        ),
        (2, 5, 4, 3),
        (5, 4),
        "HWC",
    ),
    "rows resized, one image": (
        lambda x: head(flat(jax.image.resize(x, (1, 7, 4, 3), "linear"))),
        (1, 5, 4, 3),
        (7, 4),
        "HWC",
    ),
    "columns resized": (
        lambda x: head(flat(jax.image.resize(x, (2, 5, 8, 3), "linear"))),
        (2, 5, 4, 3),
        (5, 8),  # twice as many: quarters, which are exact
        "HWC",
    ),
    "rows and columns resized": (
        lambda x: head(flat(jax.image.resize(x, (1, 7, 6, 3), "linear"))),
        (1, 5, 4, 3),
        (7, 6),
        "HWC",
    ),
    "pointwise after pooling": (
        lambda x: head(x.mean((1, 2))),
        (2, 5, 4, 3),
        (1, 1),
        "HWC",
    ),
    "pointwise behind a full window": (
        lambda x: head(nn.relu(nn.Dense(5)(nn.relu(nn.Dense(6)(flat(x)))))),
        (2, 5, 4, 3),
        (1, 1),
        "HWC",
    ),
    "pointwise on tokens": (lambda x: head(x), (2, 5, 3), (1,), "WC"),
    "pointwise on a map": (lambda x: head(x), (2, 5, 4, 3), (1, 1), "HWC"),
    "concatenated": (
        lambda x: head(jnp.concatenate([flat(x), flat(x)], -1)),
        (2, 5, 4, 3),
        (1, 1),
        "HWC",
    ),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_flatten_is_read_off_the_trace(name):
    body, shape, window, order = FLATTENS[name]
    found = layer(body, *shape)
    assert (found.window, found.order) == (window, order)


@pytest.mark.parametrize(
    "name", ["CHW", "3-D CDHW", "patches", "tokens mixed", "columns resized"]
)
def test_found_flatten_gives_the_same_numbers(check, name):
    body, shape, window, _ = FLATTENS[name]
    case = check(net(body), zeros(*shape))
    kernel = case.moved["params"]["head"]["kernel"]
    assert kernel.shape[: len(window)] == window


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_permuted_flatten_is_read_back(data):
    rank = data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=rank + 1, max_size=rank + 1))
    perm = data.draw(st.permutations(range(1, rank + 2)))
    cut = data.draw(st.integers(1, rank + 1))
    batch = data.draw(st.integers(1, 3))

    def body(x):
        x = x.transpose(0, *perm)
        x = x.reshape(*x.shape[:cut], -1)  # part of the flatten, then the rest
        return head(nn.relu(x.reshape(batch, -1)))

    found = layer(body, batch, *sizes)
    letters = "DHW"[3 - rank :] + "C"
    assert found.window == tuple(sizes[:-1])
    assert found.order == "".join(letters[p - 1] for p in perm)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(1, 4)), st.integers(1, 2), st.booleans())
def test_rearranged_kernel_acts_on_the_map_itself(perm, batch, ones):
    """The conv kernel, applied to the NHWC map, is the Dense behind the transpose."""
    shape = (batch, 3, 1 if ones else 2, 4)
    plan = layer(lambda x: head(x.transpose(0, *perm).reshape(batch, -1)), *shape)
    rng = np.random.default_rng(0)
    x, w = rng.integers(-4, 4, shape), rng.integers(-4, 4, (shape[1] * shape[2] * 4, 5))
    plan = Rearrangement(
        w.shape,
        (*plan.kernel.split[:-1], 5),
        plan.kernel.perm,
        (*plan.kernel.target[:-1], 5),
    )
    want = x.transpose(0, *perm).reshape(batch, -1) @ w
    np.testing.assert_array_equal(np.einsum("nhwc,hwco->no", x, plan(w)), want)


def test_one_jitted_helper_behind_two_flattens():
    """A helper that is traced once has two callers: neither's answer may leak."""
    activate = jax.jit(lambda x: jnp.maximum(x, 0) * 2)

    def body(x):
        a = nn.Dense(4, name="a")(activate(flat(x)))
        b = nn.Dense(4, name="b")(activate(flat(x.transpose(0, 3, 1, 2))))
        c = nn.Dense(4, name="c")(activate(flat(x.transpose(0, 2, 1, 3))))
        return a, b, c

    plan = fc.make_plan(net(body), zeros(2, 5, 4, 3))
    assert [plan[k].order for k in "abc"] == ["HWC", "CHW", "WHC"]


@pytest.mark.parametrize("in_axis", [0, 1, 2, 3])
def test_flatten_below_vmap(in_axis):
    shape = [2, 5, 4, 3]
    shape.insert(in_axis, 7)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return head(flat(nn.relu(x)))

    mapped = nn.vmap(
        Inner,
        in_axes=in_axis,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    plan = fc.make_plan(mapped(), zeros(*shape))
    assert (plan["head"].window, plan["head"].order) == ((5, 4), "HWC")
    assert plan["head"].stack_axes == (0,)


def test_vmapped_layer_behind_a_flatten_of_two_of_three_axes():
    """The mapped axis lies between the batch and the features."""
    mapped = nn.vmap(
        nn.Dense, in_axes=1, variable_axes={"params": 1}, split_rngs={"params": True}
    )

    def body(x):
        return mapped(4, name="head")(x.transpose(0, 3, 1, 2).reshape(2, 3, -1))

    assert layer(body, 2, 5, 4, 3).window == (5, 4)


def test_attention_heads_are_no_window():
    def merged(x):
        q, k, v = (nn.Dense(12)(x).reshape(2, 5, 3, 4) for _ in range(3))
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return head(nn.relu(y.reshape(2, 5, 12)))

    assert layer(merged, 2, 5, 12).window == (1,)

    def fused(x):
        q, k, v = (nn.Dense(12)(x).reshape(2, 5, 3, 4) for _ in range(3))
        return head(jax.nn.dot_product_attention(q, k, v).reshape(2, 5, 12))

    assert layer(fused, 2, 5, 12).window == (1,)


def test_flatten_behind_a_residual_trunk_of_any_depth_is_found_quickly():
    def body(x):
        for _ in range(700):
            x = x + jnp.tanh(x) * 0.5
        return head(flat(x))

    model, x = net(body), zeros(2, 5, 4, 3)
    start = time.perf_counter()
    assert fc.make_plan(model, x)["head"].window == (5, 4)
    assert time.perf_counter() - start < 20


def test_two_flattens_that_disagree_need_a_rule():
    def body(x):
        return head(flat(x) + flat(x.transpose(0, 3, 1, 2)))

    model, x = net(body), zeros(2, 5, 4, 3)
    plan = fc.make_plan(model, x)
    assert not plan
    assert "several ways" in plan.skipped["head"]
    assert "'head=5x4'" in plan.skipped["head"]
    assert fc.make_plan(model, x, rules=["head=5x4:CHW"])["head"].order == "CHW"
    assert fc.make_plan(model, x, rules=["head=5x4"])["head"].order == "HWC"
