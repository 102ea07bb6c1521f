import os

import jax
import numpy as np
import pytest
from frontends.library_checks import check_held, check_model, check_slide

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason=install_command("keras"))

X = jax.random.normal(jax.random.key(1), (2, 6, 8, 2))


@pytest.fixture(scope="module")
def model():
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input(X.shape[1:]),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4, name="head"),
        ],
        name="net",
    )
    norm = net.layers[1]
    norm.moving_variance.assign(2 * np.ones(3))
    return net


# From Keras's saving, by which it pickles.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_model(model):
    want = np.asarray(model(X))
    plan = check_model(model, X, "net/head/kernel", "HWC")
    back = check_held(model, X, plan, want)
    np.testing.assert_array_equal(back["net/head/kernel"], model.layers[-1].kernel)
    check_slide(model, X, (1, 2), want)


def test_weights_of_another_run(model):
    plan = fc.make_plan(model, X)
    weights = [2 * np.asarray(v.value) for v in model.weights]
    assert fc.verify(model, weights, X, plan=plan, progress=False).passed
    with pytest.raises(TypeError, match="by variable path"):
        fc.verify(model, {"kernel": weights[0]}, X, plan=plan, progress=False)
    some = {v.path: v.value for v in model.trainable_variables}
    with pytest.raises(TypeError, match="moving_mean"):
        fc.verify(model, some, X, plan=plan, progress=False)


def test_a_frozen_layer_converts(model):
    model.layers[-1].trainable = False
    try:
        assert list(fc.make_plan(model, X)) == ["net/head/kernel"]
    finally:
        model.layers[-1].trainable = True


def test_what_cannot_be_run_is_refused(model):
    with pytest.raises(TypeError, match=r"build\(input_shape\)"):
        fc.make_plan(keras.Sequential([keras.layers.Dense(3)]), X)
    with pytest.raises(TypeError, match="training=False"):
        fc.make_plan(model, X, training=True)
