import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frontends.library_checks import check_held, check_model, check_slide

import fcconv_jax as fc
from fcconv_jax.messages.extras import install_command

pytest.importorskip("equinox", reason=install_command("equinox"))
import equinox as eqx


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __call__(self, x):
        return self.head(jax.nn.relu(self.conv(x)).ravel())


def make_net(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    conv = eqx.nn.Conv2d(2, 3, 3, key=keys[0])
    return Net(conv, eqx.nn.Linear(3 * 4 * 6, 5, key=keys[1]))


X = jax.random.normal(jax.random.key(1), (2, 2, 6, 8))


def test_a_module_on_one_example():
    net = make_net()
    plan = check_model(net, X[0], "head/weight", "CHW")
    back = check_held(net, X[0], plan, net(X[0]))
    np.testing.assert_array_equal(back.head.weight, net.head.weight)
    moved = fc.convert_params(net, plan)
    assert moved.head.weight.shape == (4, 6, 3, 5)
    restored = fc.restore_params(moved, plan)
    np.testing.assert_array_equal(restored.head.weight, net.head.weight)


def test_a_module_on_a_batch():
    net = make_net()
    batched = eqx.filter_vmap(net)
    plan = fc.make_plan(batched, X)
    assert len(plan) == 1
    check_held(batched, X, plan, jax.vmap(net)(X))
    check_slide(batched, X, (2, 3), jax.vmap(net)(X))


def test_the_params_of_another_module():
    net, trained = make_net(), make_net(7)
    plan = fc.make_plan(net, X[0])
    assert fc.verify(net, trained, X[0], plan=plan, progress=False).passed
    other = fc.convert_params(make_net(8), plan)
    report = fc.verify(
        net, trained, X[0], plan=plan, converted_params=other, progress=False
    )
    assert not report.passed


def test_a_model_without_layers_says_so():
    net = eqx.nn.Lambda(jnp.tanh)
    assert not fc.make_plan(net, X[0])
