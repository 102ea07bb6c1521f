import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import one_in
from optax import contrib
from trees import assert_trees_all_close, assert_trees_all_equal_shapes

import fcconv_jax as fc


class Net(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, ("in", "out"))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(5, name="head", kernel_init=init)(x))
        return nn.Dense(3, name="out")(x)


X = np.random.default_rng(0).normal(size=(4, 3, 2, 4)).astype(np.float32)
MODEL = Net()
PLAN = fc.make_plan(MODEL, X)
CONV = fc.convert_model(MODEL, PLAN)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), X)["params"]


def loss(apply, params):
    return (apply({"params": params}, X) ** 2).sum() - apply({"params": params}, X)[
        0, 0
    ]


DENSE_GRAD = jax.jit(jax.grad(lambda p: loss(MODEL.apply, p)))


def bits(tree):
    return [
        (jax.tree_util.keystr(path), np.shape(leaf), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def kernels(tree):
    return {
        "head": {"kernel": True, "bias": False},
        "out": {"kernel": True, "bias": False},
    }


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.01),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw": lambda: optax.adamw(0.01, mask=kernels),
    "lion": lambda: optax.lion(0.01),
    "lamb": lambda: optax.lamb(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, centered=True, momentum=0.5),
    "adagrad": lambda: optax.adagrad(0.01),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "masked": lambda: optax.masked(optax.adam(0.01), kernels),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.01), "b": optax.sgd(0.01, momentum=0.9)},
        {"head": "a", "out": "b"},
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.01), 2
    ).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 4)
    ),
    "schedule_free": lambda: contrib.schedule_free(optax.sgd(0.01), 0.01),
    "ema": lambda: optax.chain(optax.adam(0.01), optax.ema(0.9)),
    "bf16 moments": lambda: optax.adam(0.01, mu_dtype=jnp.bfloat16),
}


# They sum the squares of a kernel, in the order of its axes: steps differ by rounding.
NORMS = ("chain", "lamb")
# jaxlib 0.7 rounds entries of rmsprop's trace as the shape around them suggests.
ROUNDED = (*NORMS, "rmsprop") if jax.__version_info__ < (0, 8) else NORMS


def train(tx, grad, params, state, steps=3):
    # Op by op, inside cond and jit too: what XLA fuses rounds as the shape suggests.
    for _ in range(steps):
        gradients = grad(params)
        with jax.disable_jit():
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", one_in(3, OPTIMIZERS))
def test_training_goes_on_in_the_other_form(name):
    tx = OPTIMIZERS[name]()
    params, state = train(tx, DENSE_GRAD, PARAMS, tx.init(PARAMS))
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=params)
    conv_params = fc.convert_params(params, PLAN)
    wanted = jax.eval_shape(tx.init, conv_params)
    assert jax.tree.structure(moved) == jax.tree.structure(wanted)
    assert [np.shape(x) for x in jax.tree.leaves(moved)] == [
        x.shape for x in jax.tree.leaves(wanted)
    ]
    back = fc.convert_opt_state(moved, PLAN.inverse(), tx=tx, params=conv_params)
    assert bits(back) == bits(state)

    def gradient(moved):  # the same numbers, so that only the optimizer counts
        return fc.convert_params(DENSE_GRAD(fc.restore_params(moved, PLAN)), PLAN)

    want, state = train(tx, DENSE_GRAD, params, state, 1)
    got, moved = train(tx, gradient, conv_params, moved, 1)
    if name != "chain":  # lamb's first moments do not depend on its norms
        back = fc.convert_opt_state(moved, PLAN.inverse(), tx=tx, params=got)
        assert bits(back) == bits(state)
    want, state = train(tx, DENSE_GRAD, want, state, 2)
    got, moved = train(tx, gradient, got, moved, 2)
    back = fc.convert_opt_state(moved, PLAN.inverse(), tx=tx, params=got)
    got = fc.restore_params(got, PLAN)
    if name in ROUNDED:
        assert_trees_all_close((got, back), (want, state), rtol=1e-5, atol=1e-7)
    else:
        assert bits((got, back)) == bits((want, state))


def test_moments_move_as_the_params_do():
    tx = optax.adam(0.01)
    state = tx.init(PARAMS)
    numbered = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), PARAMS)
    state = (state[0]._replace(mu=numbered), *state[1:])  # pyright: ignore
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS)
    assert bits(moved[0].mu) == bits(fc.convert_params(numbered, PLAN))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adafactor(0.01, min_dim_size_to_factor=2),
        lambda: optax.sm3(0.01),
        lambda: optax.lbfgs(),
        lambda: contrib.muon(0.01),
    ],
    ids=["adafactor", "sm3", "lbfgs", "muon"],
)
def test_statistics_of_other_shapes_are_refused(make):
    tx = make()
    with pytest.raises(fc.PlanError, match="does not follow its parameters"):
        fc.convert_opt_state(tx.init(PARAMS), PLAN, tx=tx, params=PARAMS)


def test_a_state_of_other_params_is_refused():
    tx = optax.adam(0.01)
    conv = fc.convert_params(PARAMS, PLAN)
    with pytest.raises(fc.PlanError, match="head/kernel"):
        fc.convert_opt_state(tx.init(conv), PLAN, tx=tx, params=PARAMS)
    with pytest.raises(fc.PlanError, match="head/kernel"):
        fc.convert_opt_state(tx.init(PARAMS), PLAN, tx=tx, params=conv)


def test_abstract_and_boxed_states():
    tx = optax.adam(0.01)
    state = jax.eval_shape(tx.init, PARAMS)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS)
    assert moved[0].mu["head"]["kernel"].shape == (3, 2, 4, 5)
    boxed = Net(boxed=True)
    params = jax.eval_shape(boxed.init, jax.random.key(0), X)["params"]
    state = jax.eval_shape(tx.init, params)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=params)
    kernel = moved[0].nu["head"]["kernel"]
    assert kernel.names == (None, None, "in", "out")
    assert kernel.value.shape == (3, 2, 4, 5)


def test_full_variables_as_the_trained_tree():
    tx = optax.adam(0.01)
    variables = {"params": PARAMS}
    moved = fc.convert_opt_state(tx.init(variables), PLAN, tx=tx, params=variables)
    assert moved[0].mu["params"]["head"]["kernel"].shape == (3, 2, 4, 5)


# ------------------------------------------------------------ keywords of updates


def scaled(update):
    return optax.chain(
        optax.scale_by_adam(),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update),
    )


def temperature_with_default(updates, state, params=None, *, temperature=1.0):
    return jax.tree.map(lambda u: -temperature * u, updates), state


def temperature_required(updates, state, params=None, *, temperature, **_):
    return temperature_with_default(updates, state, temperature=temperature)


def weights_required(updates, state, params=None, *, weights):
    return jax.tree.map(jnp.multiply, updates, weights), state


@pytest.mark.parametrize(
    ("tx", "kwargs"),
    [
        (contrib.sam(optax.sgd(0.1), optax.sgd(0.05)), None),
        (optax.polyak_sgd(), None),
        (contrib.reduce_on_plateau(), None),
        (scaled(temperature_with_default), None),
        (scaled(temperature_required), {"temperature": 2.0}),
        (scaled(weights_required), {"weights": jax.tree.map(jnp.cos, PARAMS)}),
        (
            optax.conditionally_transform(
                optax.adam(0.1), lambda _, metric: metric > 0, forward_extra_args=True
            ),
            {"metric": 1.0},
        ),
    ],
)
def test_an_update_gets_the_keywords_that_it_takes(tx, kwargs):
    state = tx.init(PARAMS)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS, probe_kwargs=kwargs)
    assert_trees_all_equal_shapes(moved, tx.init(fc.convert_params(PARAMS, PLAN)))
    if kwargs:
        with pytest.raises(
            fc.PlanError, match=r"could not be run.*probe_kwargs={\.\.\.}"
        ):
            fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS)


def test_keywords_do_not_hide_a_difference():
    def update(updates, state, params=None, *, factor):
        by_rank = jax.tree.map(lambda u: factor * u.ndim * u, updates)
        return by_rank, state

    tx = scaled(update)
    with pytest.raises(fc.PlanError, match="would go on otherwise"):
        fc.convert_opt_state(
            tx.init(PARAMS), PLAN, tx=tx, params=PARAMS, probe_kwargs={"factor": 2.0}
        )


def test_the_pair_of_lookahead():
    tx = optax.lookahead(optax.adam(0.01), 3, 0.5)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(pair)
    updates, state = tx.update(DENSE_GRAD(PARAMS), state, pair)
    pair = optax.apply_updates(pair, updates)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=pair)
    there = fc.convert_params(pair, PLAN)
    assert moved.fast_state[0].mu["head"]["kernel"].shape == (3, 2, 4, 5)
    grad = jax.tree.map(jnp.cos, PARAMS)
    want, _ = tx.update(grad, state, pair)
    got, _ = tx.update(fc.convert_params(grad, PLAN), moved, there)
    assert_trees_all_close(got, fc.convert_params(want, PLAN), rtol=1e-6)
