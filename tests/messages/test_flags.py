import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcconv_jax as fc

MODEL, X = nn.Dense(3), jnp.ones((2, 4))
PARAMS = MODEL.init(jax.random.key(0), X)
PLAN = fc.make_plan(MODEL, X)
TX = optax.sgd(0.1)


def opt_state(**options):
    return fc.convert_opt_state(TX.init(PARAMS), PLAN, tx=TX, params=PARAMS, **options)


CALLS = [
    (fc.convert_model, (MODEL, PLAN)),
    (fc.convert_params, (PARAMS, PLAN)),
    (fc.restore_params, (PARAMS, PLAN)),
    (fc.convert_checkpoint, ("src", "dst", PLAN)),
    (fc.restore_checkpoint, ("src", "dst", PLAN)),
    (fc.verify, (MODEL, PARAMS, X)),
    (fc.compare, (MODEL, MODEL, [PARAMS, X])),
    (fc.assert_same, (MODEL, MODEL, [PARAMS, X])),
    (fc.classify, (4, 4)),
    (fc.dense_kernel_to_conv, (np.ones((4, 3)), 1)),
    (fc.conv_kernel_to_dense, (np.ones((1, 4, 3)),)),
    (fc.Rule, ("*",)),
]
FLAGS = [
    (function, args, name)
    for function, args in CALLS
    for name, parameter in inspect.signature(function).parameters.items()
    if "bool" in str(parameter.annotation) and name != "progress"
]
FLAGS += [(opt_state, (), "check")]
NAMES = ("fold", "any_batch", "any_size")
FLAGS += [(fc.export, (MODEL, PARAMS, X), name) for name in NAMES]


@pytest.mark.parametrize("word", ["no", "yes"])
@pytest.mark.parametrize(("function", "args", "name"), FLAGS)
def test_a_word_is_no_flag(function, args, name, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"path": "m.onnx"} if function is fc.export else {}
    with pytest.raises(TypeError, match=f"Pass {name}={word == 'yes'}"):
        function(*args, **{name: word}, **options)
    assert not list(tmp_path.iterdir())


def test_every_public_flag_is_tried():
    tried = {function for function, *_ in FLAGS} | {fc.convert_opt_state}
    for name in dir(fc):
        function = getattr(fc, name)
        if not inspect.isfunction(function):
            continue
        for parameter in inspect.signature(function).parameters.values():
            if isinstance(parameter.default, bool):
                assert function in tried, (name, parameter.name)


def test_flags_of_numpy_are_taken():
    fc.convert_params(PARAMS, PLAN, strict=np.bool_(True))
