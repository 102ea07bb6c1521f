"""Both forms, compiled for devices that are not there; skips without the extra."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc
from fcconv_jax.backends.name import Backend
from fcconv_jax.backends.resolution import missing_extra

TPUS = ["tpu:v4", "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:7x"]
GPUS = ["cuda:a100", "cuda:h100"]


class Head(nn.Module):
    """A full window, then a product of the last axis."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(128, name="fc2")(x)


@pytest.fixture(scope="module")
def verified():
    """Verifies the head on all backends that can be compiled for here, at once."""
    known = [b for b in TPUS + GPUS if not missing_extra(Backend.parse(b).platform)]
    if not known:
        return {}
    model, x = Head(), jax.ShapeDtypeStruct((8, 4, 4, 32), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    report = fc.verify(model, params, x, plan=fc.make_plan(model, x), backends=known)
    return {found.backend: found for found in report.backends}


def _found(verified, backend):
    missing = missing_extra(Backend.parse(backend).platform)
    if missing:
        pytest.skip(missing)
    found = verified[backend]
    assert found.failures == ()
    assert found.how in ("compiled", "executed")
    return found


@pytest.mark.parametrize("backend", TPUS)
def test_tpus_turn_either_form_into_convolutions(verified, backend):
    found = _found(verified, backend)
    for program in (found.original, found.converted):
        assert (program.hlo.dots, program.hlo.convolutions) == (0, 2)
        assert program.cycles > 0
    # The products dominate, and there are as many of them in either form.
    assert found.original.flops >= 2 * 8 * 64 * (512 + 128)
    assert found.figures["flops"]["ratio"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("backend", GPUS)
def test_gpus_turn_convolutions_into_library_calls(verified, backend):
    found = _found(verified, backend)
    assert found.original.stablehlo.dots == 2
    assert found.converted.stablehlo.convolutions == 2
    assert found.converted.hlo.dots == found.converted.hlo.convolutions == 0
    calls = found.converted.hlo.custom_calls
    assert sum(n for name, n in calls.items() if name.startswith("__cudnn$conv")) == 2
    assert not any("cudnn" in name for name in found.original.hlo.custom_calls)
