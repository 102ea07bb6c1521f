"""Tuning for a device that is not present, by cycles; skips without its compiler."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fcconv_jax as fc
from fcconv_jax.backends.name import Backend
from fcconv_jax.backends.resolution import missing_extra
from fcconv_jax.messages.errors import BackendError

X = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)


class Patches(nn.Module):
    """The embedding of a ViT and a layer on its 197 tokens."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(256, (16, 16), (16, 16), padding="VALID", name="embed")(x)
        x = x.reshape(x.shape[0], -1, 256)
        x = jnp.concatenate([x[:, :1], x], axis=1)
        return nn.Dense(512, name="mlp")(x)


def test_a_tpu_takes_both_directions(tmp_path):
    if missing := missing_extra(Backend.parse("tpu:v5e").platform):
        pytest.skip(missing)
    model = Patches()
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    file = tmp_path / "v5e.json"
    plan = fc.tune(model, params, X, backend="tpu:v5e", timings=file, progress=False)
    assert plan.to == "mix"
    assert (plan["embed"].to, plan["mlp"].to) == ("dense", "conv")
    assert plan["mlp"].layout == "keep"  # 197 rows fill no tiles of 8
    assert plan.tuning.objective == "cycles"
    assert plan.tuning.ratio < 0.5
    assert plan.options == ()
    again = fc.tune(model, params, X, backend="tpu:v5e", timings=file, progress=False)
    assert again == plan
    with pytest.raises(BackendError, match=r'no run can be timed.*"cycles"'):
        fc.tune(model, params, X, backend="tpu:v5e", objective="latency")


def test_cuda_gives_no_cycles_but_memory():
    if missing := missing_extra(Backend.parse("cuda:h100").platform):
        pytest.skip(missing)
    model, x = nn.Dense(8), jnp.ones((4, 16))
    params = model.init(jax.random.key(0), x)
    options = {"backend": "cuda:h100", "progress": False}
    with pytest.raises(BackendError, match=r'report cycles.*objective="memory"'):
        fc.tune(model, params, x, **options)
    plan = fc.tune(model, params, x, objective="memory", **options)
    assert plan.tuning.device == "cuda:h100"
