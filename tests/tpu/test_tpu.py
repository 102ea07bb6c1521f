"""What is executed on a TPU, where one is present; else skipped."""

import flax.linen as nn
import jax
import pytest

import fcconv_jax as fc
from fcconv_jax.verification.layer_certificates import certify_layer

BACKEND = "tpu"
pytestmark = pytest.mark.usefixtures("device")


class Net(nn.Module):
    """Attention over a feature map, a layer on it, and a full window."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(x)
        x = nn.relu(nn.Dense(16, name="pointwise")(x))
        return nn.Dense(8, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def case(device):
    model, x = Net(), jax.random.normal(jax.random.key(1), (2, 7, 7, 32))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


@pytest.mark.parametrize("backend", [None, BACKEND])
def test_a_model_verifies_and_is_timed(verify_there, case, backend):
    model, params, x = case
    verify_there(model, params, x, backend)


@pytest.mark.parametrize("precision", ["bfloat16", "high", "highest"])
@pytest.mark.parametrize("name", ["pointwise", "head"])
def test_layers_certify_in_every_number_of_passes(case, name, precision):
    model, _, x = case
    plan = fc.make_plan(model, x)
    with jax.default_matmul_precision(precision):
        found = certify_layer(plan[name], plan.to)
    assert found.passed, str(found)


@pytest.mark.parametrize(
    ("dtype", "out"), [("bfloat16", None), ("bfloat16", "float32"), ("int8", "int32")]
)
@pytest.mark.parametrize("name", ["pointwise", "head"])
def test_layers_certify_in_narrow_types(case, name, dtype, out):
    model, _, x = case
    plan = fc.make_plan(model, x)
    found = certify_layer(plan[name], plan.to, dtype, preferred_element_type=out)
    assert found.passed, str(found)
