import jax
import numpy as np
import pytest
from frontends.library_checks import check_model

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

hk = pytest.importorskip("haiku", reason=install_command("haiku"))

X = jax.random.normal(jax.random.key(1), (2, 6, 8, 2))


def net(x):
    x = jax.nn.relu(hk.Conv2D(3, 3)(x))
    return hk.Linear(4)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("wrap", [lambda f: f, hk.without_apply_rng])
def test_a_transformed_function(wrap):
    model = wrap(hk.transform(net))
    rng = (None,) if wrap is not hk.without_apply_rng else ()
    params = model.init(jax.random.key(0), X)
    plan = check_model(model, X, "linear/w", "HWC", params)
    conv = fc.convert_model(model, plan)
    moved = fc.convert_params(params, plan)
    want = model.apply(params, *rng, X)
    np.testing.assert_allclose(conv.apply(moved, *rng, X), want, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, conv.init(jax.random.key(0), X), moved)
    grid = fc.slide(model, window=(6, 8))
    np.testing.assert_allclose(grid(params, *rng, X)[:, 0, 0], want, atol=1e-5)


def test_state_and_random_numbers():
    def normed(x, train):
        x = hk.BatchNorm(True, True, 0.9)(x.reshape(x.shape[0], -1), train)
        return hk.Linear(4)(hk.dropout(hk.next_rng_key(), 0.5, x))

    model = hk.transform_with_state(normed)
    pair = model.init(jax.random.key(0), X, True)
    options = {"rng": jax.random.key(3), "train": False, "progress": False}
    report = fc.verify(model, pair, X, **options)
    assert report.passed
    assert report.planned == 1
