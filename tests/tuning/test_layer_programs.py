"""Both forms of a layer as programs of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import compile_for

import fcconv_jax as fc
from fcconv_jax.tuning.layer_programs import layer_forms


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
