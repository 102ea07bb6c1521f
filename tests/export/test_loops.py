"""Loops and branches: one operator of the runtime each, their layers proved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc

from .models import _made, normal
from .test_files import SUFFIX, needs

LOOPS = {"litert": "WHILE", "onnx": "Scan", "openvino": "TensorIterator"}


@pytest.fixture(params=["litert", "onnx", "openvino"])
def to(request):
    needs(request.param)
    return request.param


def export(model, params, *inputs, runtime, folder, **options):
    path = folder / f"net.{SUFFIX[runtime]}"
    options = {"path": path, "progress": False, **options}
    return fc.export(model, params, *inputs, **options)


class Recurrent(nn.Module):
    cell: nn.RNNCellBase
    back: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell, reverse=self.back, keep_order=True)(x)
        return nn.Dense(3)(x[:, -1]), x


@pytest.mark.parametrize(
    ("model", "form"),
    [
        (Recurrent(nn.LSTMCell(5)), "conv"),
        (Recurrent(nn.GRUCell(6), back=True), "dense"),
    ],
    ids=["lstm", "gru, from the back"],
)
def test_recurrent_classifiers(model, form, to, tmp_path):
    model, params, inputs = _made(model, normal(2, 7, 4))
    report = export(model, params, *inputs, runtime=to, folder=tmp_path, to=form)
    assert report.passed, report.failures
    assert report.figures[0].ops[LOOPS[to]] == 1
    assert len(report.proof.layers) > 6
    assert fc.verify_file(report.path, params, progress=False).passed
    params["params"]["Dense_0"]["bias"] += 1
    assert not fc.verify_file(report.path, params, progress=False).passed


def counted(params, x):
    """A loop over nothing, whose body changes what it does by the step."""

    def step(i, x):
        return jnp.tanh(x @ params["w"]) + i.astype(jnp.float32)

    return jax.lax.fori_loop(0, 5, step, x)


def until(params, x, most):
    """A loop whose steps an input decides, and a value that no step changes."""

    def step(state):
        n, x, same = state
        return n + 1, jnp.tanh(x @ params["w"]) + same, same

    n, x, _ = jax.lax.while_loop(lambda s: s[0] < most, step, (0, x, x[:, :1]))
    return x, n


def branched(params, x, which):
    """One of three branches, one of which returns what it is given."""
    return jax.lax.switch(
        which,
        [
            lambda x: jnp.tanh(x @ params["w"]),
            lambda x: x,
            lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x + 1, lambda: 0 * x + 5),
        ],
        x,
    )


W = {"w": normal(4, 4)}


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (counted, [normal(2, 4)]),
        (until, [normal(2, 4), jnp.int32(3)]),
        (until, [normal(2, 4), jnp.int32(-1)]),
        *((branched, [normal(2, 4), jnp.int32(i)]) for i in (-1, 1, 9)),
        (branched, [-abs(normal(2, 4)), jnp.int32(2)]),
    ],
)
def test_functions(function, inputs, to, tmp_path):
    if to == "openvino" and function is not counted:
        with pytest.raises(fc.ExportError, match=r"the model has '(while|cond)'"):
            export(function, W, *inputs, runtime=to, folder=tmp_path)
        return
    report = export(function, W, *inputs, runtime=to, folder=tmp_path)
    assert report.passed, report.failures
    assert len(report.proof.layers) == (5 if to == "openvino" else 1)
    assert all((x.bits, x.exact) == (True, True) for x in report.proof.layers)


def test_a_loop_over_layers_is_written_out(to, tmp_path):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(4)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            apart = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(Layer, length=3, **apart)()(x, None)[0]

    model, params, inputs = _made(Stack(), normal(2, 4))
    report = export(model, params, *inputs, runtime=to, folder=tmp_path)
    assert report.passed, report.failures
    assert len(report.proof.layers) == 3
    assert "a loop of 3 steps is unrolled: each step has its own weights" in str(report)


@pytest.mark.parametrize("cell", [nn.LSTMCell(5), nn.GRUCell(6)], ids=["lstm", "gru"])
def test_recurrent_classifiers_of_any_batch(cell, to, tmp_path):
    model, params, inputs = _made(Recurrent(cell), normal(2, 7, 4))
    options = {"runtime": to, "folder": tmp_path, "any_batch": True}
    report = export(model, params, *inputs, **options)
    assert report.passed, report.failures
    assert "for any batch size; run with (1, 3, 5)" in str(report)
    # LiteRT fixes the shape of what a scan stacks.
    assert (LOOPS[to] in report.figures[0].ops) == (to != "litert")


@pytest.mark.parametrize("to", ["litert", "onnx"])
def test_a_while_loop_of_any_batch(to, tmp_path):
    needs(to)

    def norm_until(params, x):
        """Powers of a matrix, until all examples are small."""

        def step(state):
            n, x = state
            return n + 1, jnp.tanh(x @ params["w"])

        def more(state):
            return (jnp.abs(state[1]).max() > 0.05) & (state[0] < 20)

        n, x = jax.lax.while_loop(more, step, (0, x))
        return x, x.sum(-1) + n

    options = {"runtime": to, "folder": tmp_path, "any_batch": True}
    report = export(norm_until, {"w": 0.3 * W["w"]}, normal(2, 4), **options)
    assert report.passed, report.failures
