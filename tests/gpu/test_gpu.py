"""What is executed on an NVIDIA GPU, where one is present; else skipped."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import pytest

import fcconv_jax as fc
from fcconv_jax.verification.arithmetic import measure_precision
from fcconv_jax.verification.layer_certificates import certify_layer

BACKEND = "cuda"
pytestmark = pytest.mark.usefixtures("device")
ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    """A small transformer block."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(128, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(32, name="down")(y)


class Windows(nn.Module):
    """A layer on a feature map, and a full window."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="pointwise")(x))
        return nn.Dense(8, name="head")(x.reshape(x.shape[0], -1))


def _digits():
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples/digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Digits()


MODELS = {
    "digits": (_digits, (4, 8, 8, 1)),
    "transformer": (Block, (2, 16, 32)),
    "windows": (Windows, (2, 7, 7, 32)),
}


def _case(name):
    make, shape = MODELS[name]
    model, x = make(), jax.random.normal(jax.random.key(1), shape)
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@pytest.mark.parametrize("backend", [None, BACKEND])
@pytest.mark.parametrize("name", MODELS)
def test_models_verify_and_are_timed(verify_there, name, backend):
    model, params, x = _case(name)
    verify_there(model, params, x, backend)


def test_its_own_layouts_are_planned():
    model, _, x = _case("windows")
    plan = fc.make_plan(model, x, backend=BACKEND)
    assert {layer.kernel_layout for layer in plan.values()} == {"OHWI"}
    assert plan["head"].layout == "flat"


# Name, dtype, type of the sums, precision of float32 matmuls.
MODES = {
    "f32, as JAX does it": ("float32", None, None),
    "f32": ("float32", None, "highest"),
    "tf32": ("float32", None, "tensorfloat32"),
    "bf16": ("bfloat16", None, None),
    "f16": ("float16", None, None),
    "f8 e4m3": ("float8_e4m3fn", "float32", None),
    "f8 e5m2": ("float8_e5m2", "float32", None),
    "int8": ("int8", "int32", None),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["pointwise", "head"])
def test_layers_certify_at_the_precision_in_force(device, mode, name):
    dtype, out, precision = MODES[mode]
    capability = float(getattr(device, "compute_capability", "inf"))
    if mode.startswith("f8") and capability < 8.9:
        pytest.skip(f"{device.device_kind} has no float8 units")
    model, _, x = _case("windows")
    plan = fc.make_plan(model, x)
    with jax.default_matmul_precision(precision):
        found = certify_layer(plan[name], plan.to, dtype, preferred_element_type=out)
    assert found.passed, str(found)
    assert found.miss_probability <= 1e-9


@pytest.mark.parametrize("form", ["dot", "conv"])
def test_the_precision_in_force_is_read(form):
    with jax.default_matmul_precision("highest"):
        assert measure_precision("float32", form=form).input_roundoff == 0
    with jax.default_matmul_precision("tensorfloat32"):
        # TF32 keeps 10 bits of a mantissa; a device without it keeps all.
        assert measure_precision("float32", form=form).input_roundoff in (0, 2.0**-11)
