"""Decoders that end in transposed convolutions, small: U-Net, MAE, DPT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import one_in, same_bits
from zoo.in_linen import Dpt, Mae

import fcconv_jax as fc


class Unet(nn.Module):
    """Two levels down, two up by transposed convolutions, with skips."""

    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (4, 6):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        for width, skip in zip((6, 4), reversed(skips)):
            x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = nn.relu(nn.Conv(width, (3, 3))(jnp.concatenate([skip, x], -1)))
        return nn.Conv(2, (1, 1), padding="VALID")(x)


# A model, and how many of its layers are of each case.
DECODERS = {
    "unet": (Unet(), {"unpatchify": 2, "pointwise": 1}),
    "mae": (Mae(), {"patchify": 1, "unpatchify": 1}),
    "dpt": (Dpt(), {"patchify": 1, "pointwise": 3, "unpatchify": 2, "phases": 2}),
}


@pytest.mark.parametrize("name", one_in(3, sorted(DECODERS)))
def test_a_decoder_is_the_same_function_in_the_other_form(name):
    model, wanted = DECODERS[name]
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    plan = fc.make_plan(model, x, to="dense", rules=["*=phases"])
    cases = [layer.case for layer in plan.values()]
    assert {case: cases.count(case) for case in cases} == wanted
    moved = fc.convert_params(variables, plan)
    assert same_bits(fc.restore_params(moved, plan), variables)

    def step(apply):
        return jax.jit(jax.value_and_grad(lambda v: jnp.mean(apply(v, x) ** 2)))

    value, gradients = step(model.apply)(variables)
    other, converted = step(fc.convert_model(model, plan).apply)(moved)
    back = fc.restore_params(converted, plan)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)
