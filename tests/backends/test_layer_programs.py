"""Both forms of each layer, compiled: which programs, what they cost, in words."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.backends import layer_programs
from fcconv_jax.backends.compilation import compile_for
from fcconv_jax.backends.layer_programs import (
    compile_layers,
    layer_forms,
)
from fcconv_jax.messages.errors import BackendError
from fcconv_jax.messages.extras import install_command


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), (2, 2), padding="VALID", name="patches")(x)
        y = nn.DenseGeneral((2, 4), name="heads")(x)
        y = nn.DenseGeneral(6, axis=(-2, -1), name="out")(y)
        for name in ("one", "two"):
            y = nn.Dense(6, name=name)(y)
        return nn.Dense(3, name="head")(y.reshape(y.shape[0], -1))


X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def _integers(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, s.shape).astype(s.dtype) for s in shapes]


@pytest.mark.parametrize("to", ["conv", "dense"])
@pytest.mark.parametrize("backend", [None, "cpu", "cuda", "tpu:v5e"])
def test_the_programs_are_the_layers_forms(to, backend):
    plan = fc.make_plan(Net(), X, to=to, backend=backend)
    assert set(plan) == (
        {"patches"} if to == "dense" else {"heads", "out", "one", "two", "head"}
    )
    for layer in plan.values():
        forms = layer_forms(layer, jnp.float32)
        source = forms["conv" if to == "dense" else "dense"]
        target = forms[to]
        x, kernel, bias = _integers(source.args, 0)
        moved = [layer.kernel(kernel), layer.bias(bias)]
        assert [a.shape for a in target.args[1:]] == [a.shape for a in moved]
        want = source.function(x, kernel, bias)
        got = target.function(x, *moved)
        assert want.shape == got.shape
        assert (want == got).all()
        # The layer's own input: features in one axis, nothing lost.
        assert x.size == np.prod(layer.input_shape)


def test_layers_in_the_trace_of_a_function():
    def f(params, x):
        return jnp.einsum("oi,ibt->bto", params["w"], x)

    params = {"w": jax.ShapeDtypeStruct((5, 4), jnp.float32)}
    plan = fc.make_plan(f, params, jax.ShapeDtypeStruct((4, 2, 3), jnp.float32))
    forms = layer_forms(plan["w"], jnp.float32)
    for form, operation in (("dense", "dots"), ("conv", "convolutions")):
        compiled = compile_for(forms[form].function, forms[form].args, "rocm")
        assert getattr(compiled.stablehlo, operation) == 1
    x, kernel, bias = forms["dense"].args
    assert (x.size, kernel.size, bias) == (24, 20, None)


def test_on_a_present_device(monkeypatch):
    compiled = []

    def compile_present(program, resolution):
        compiled.append(program)
        return real(program, resolution)

    real = layer_programs.compile_present
    monkeypatch.setattr(layer_programs, "compile_present", compile_present)
    plan = fc.make_plan(Net(), X, backend="cpu")
    found = compile_layers(plan, "cpu", only=["one", "two", "head"])
    assert list(found) == ["one", "two", "head"]
    assert len(compiled) == 4  # layers that are alike share their programs
    for layer in found.values():
        assert layer.quantity == "milliseconds"
        assert set(layer.milliseconds) == {"dense", "conv"}
        assert layer.cost("dense") == layer.milliseconds["dense"] > 0
        assert layer.steps["conv"]
    assert "in one, two" in found.answer
    assert found.answer.startswith("On cpu (cpu), measured: conv costs less in ")


def test_dtypes_come_from_the_params_or_are_said():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, param_dtype=jnp.bfloat16, name="a")(x)
            return nn.Dense(3, name="b")(x)

    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    plan = fc.make_plan(Two(), x)
    params = jax.eval_shape(Two().init, jax.random.key(0), x)
    found = compile_layers(plan, "cpu", params=params)
    assert [str(layer.dtype) for layer in found.values()] == ["bfloat16", "float32"]
    (alone,) = compile_layers(plan, "cpu", only=["b"], dtype=jnp.bfloat16).values()
    assert str(jnp.dtype(alone.dtype)) == "bfloat16"


def test_what_cannot_be_compiled_here_says_what_to_install(monkeypatch):
    plan = fc.make_plan(nn.Dense(3), jax.ShapeDtypeStruct((2, 4), jnp.float32))
    with pytest.raises(BackendError, match=r"rocm: .*cannot be compiled"):
        compile_layers(plan, "rocm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=re.escape(install_command("tpu-aot"))):
        compile_layers(plan, "tpu:v4")


def _program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}"


CYCLES = 'backend_config={"estimated_cycles":"%d"}'
X_LINE = "%x = f32[512,512]{1,0} parameter(0)"
DOT = "%d = f32[512,512]{1,0} dot(%x, %x), " + CYCLES % 100
COPY = "%c = f32[512,512]{0,1} copy(%d), " + CYCLES % 300
CONV = "%d = f32[512,512]{1,0} convolution(%x, %x), " + CYCLES % 200
RESHAPE = "%r = f32[512,512]{1,0} reshape(%d)"


@pytest.fixture
def pair():
    """Two programs of one layer, by their text."""
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    plan = fc.make_plan(nn.Dense(3), x)
    (compiled,) = compile_layers(plan, "cpu").values()

    def make(dense, conv, cycles=(None, None), scratch=(0, 0)):
        forms = {
            form: dataclasses.replace(
                compiled.dense,
                text=_program(X_LINE, *lines),
                cycles=number,
                temp_bytes=temp,
            )
            for form, lines, number, temp in zip(
                ("dense", "conv"), (dense, conv), cycles, scratch
            )
        }
        return dataclasses.replace(compiled, milliseconds={}, **forms)

    return make


def test_a_layout_copy_is_named(pair):
    found = pair([DOT, COPY], [CONV], cycles=(400, 200))
    assert (found.quantity, found.ratio, found.cheaper) == ("cycles", 0.5, "conv")
    assert found.why == (
        "dense is 1 dot, conv is 1 convolution; the dense form adds 1 layout copy of "
        "1 MiB, 300 cycles"
    )


def test_what_the_cycles_leave_out_is_named(pair):
    found = pair([CONV], [CONV, RESHAPE], cycles=(200, 200))
    assert found.cheaper is None
    assert found.why == (
        "both are 1 convolution; no layout copy in either; the conv form's reshape of "
        "2 MiB is not in its cycles"
    )


def test_without_cycles_the_memory_traffic_counts(pair):
    found = pair([DOT, COPY], [CONV], cycles=(400, None), scratch=(0, 2**26))
    assert found.quantity == "bytes"
    assert found.cost("dense") == 5 * 2**20
    assert found.ratio == pytest.approx(3 / 5)
    assert found.why.endswith("scratch memory 0 B against 64 MiB")


def test_the_answer_counts_and_groups(pair):
    better = pair([DOT, COPY], [CONV], cycles=(400, 200))
    layers = [
        dataclasses.replace(better, path=name, conv=conv)
        for name, conv in (
            ("a", better.conv),
            ("b", dataclasses.replace(better.conv, cycles=100)),
            ("c", dataclasses.replace(better.conv, cycles=400)),
        )
    ]
    lines = layer_programs.CompiledLayers(
        better.dense.backend, tuple(layers)
    ).answer.splitlines()
    assert lines[0].endswith(
        "by the cycles that XLA estimates: conv costs less in 2 of 3 layers, dense in "
        "0, they are the same in 1."
    )
    assert lines[1].startswith("- conv wins (0.25 to 0.50x) in a, b: dense is 1 dot")
    assert lines[2].startswith("- no difference (1.00x) in c: ")
