"""Each layer as a program of its own, compiled without the device; skips likewise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc
from fcconv_jax.backends.layer_programs import compile_layers
from fcconv_jax.backends.name import Backend
from fcconv_jax.backends.resolution import missing_extra
from fcconv_jax.messages.errors import BackendError


class Net(nn.Module):
    """A map, two layers that are alike, and a full window."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(512, name="map")(x)
        for name in ("one", "two"):
            x = nn.Dense(512, name=name)(x)
        return nn.Dense(128, name="head")(x.reshape(x.shape[0], -1))


X = jax.ShapeDtypeStruct((8, 14, 14, 256), jnp.float32)


def compiled(backend, **options):
    if missing := missing_extra(Backend.parse(backend).platform):
        pytest.skip(missing)
    plan = fc.make_plan(Net(), X, backend=backend)
    return compile_layers(plan, backend, **options)


@pytest.fixture(scope="module")
def tpu():
    said = []
    found = compiled("tpu:v5e", progress=lambda *step: said.append(step))
    return found, said


@pytest.fixture(scope="module")
def gpu():
    return compiled("cuda:h100", only=["map", "head"])


def test_a_tpu_is_compared_by_cycles(tpu):
    found, said = tpu
    assert list(found) == ["map", "one", "two", "head"]
    assert str(found.backend) == "tpu:v5e"
    assert said
    for layer in found.values():
        assert layer.quantity == "cycles"
        assert layer.milliseconds == {}
        assert layer.dense.device == layer.conv.device == "TPU v5 lite"
        for form in ("dense", "conv"):
            cycles = [step.cycles for step in layer.steps[form] if step.cycles]
            assert sum(cycles) == layer.cost(form) > 0
            products = [step.product for step in layer.steps[form] if step.product]
            assert products == ["convolution"]
    # Layers that are alike are compiled once.
    assert found["one"].conv is found["two"].conv
    assert found["one"].conv is not found["map"].conv


def test_a_tpu_copies_the_map_in_the_dense_form_alone(tpu):
    found, _ = tpu
    layer = found["map"]
    assert layer.cheaper == "conv"
    assert [step for step in layer.steps["dense"] if step.relayout]
    assert not [step for step in layer.steps["conv"] if step.relayout]
    assert "the dense form adds 1 layout copy" in layer.why
    first, *lines = found.answer.splitlines()
    assert first.startswith("On tpu:v5e (TPU v5 lite), by the cycles that XLA")
    (line,) = (line for line in lines if "map" in line)
    assert line.startswith("- conv wins (")
    assert "one, two" in line


def test_the_same_layers_in_another_dtype(tpu):
    found, _ = tpu
    half = compiled("tpu:v5e", only=["one"], dtype=jnp.bfloat16)["one"]
    assert str(jnp.dtype(half.dtype)) == "bfloat16"
    assert half.dense.bytes_accessed < found["one"].dense.bytes_accessed
    assert "bf16[" in half.dense.text


def test_a_gpu_is_compared_by_traffic(gpu):
    assert list(gpu) == ["map", "head"]
    for layer in gpu.values():
        assert layer.quantity == "bytes"
        assert layer.dense.cycles is layer.dense.flops is None
        calls = layer.conv.hlo.custom_calls
        assert any(name.startswith("__cudnn$conv") for name in calls)
    assert "this tells traffic, not time" in gpu.answer


def test_a_gpu_copies_hwio_weights_at_each_call(gpu):
    plan = fc.make_plan(Net(), X, backend="cuda:h100", rules=["*=HWIO"])
    stored = compile_layers(plan, "cuda:h100", only=["head"])["head"]
    assert stored.conv.hlo.copies > gpu["head"].conv.hlo.copies
    assert stored.cost("conv") > gpu["head"].cost("conv")
    assert stored.cost("dense") == gpu["head"].cost("dense")


def test_a_compiler_that_takes_too_long_is_ended():
    with pytest.raises(BackendError, match=r"^tpu:v4: .* give a longer timeout"):
        compiled("tpu:v4", only=["one"], timeout=0.1)
