"""Every optimizer and wrapper of optax, with what becomes of its state."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import one_in
from flax import serialization
from optax import contrib

import fcconv_jax as fc
from fcconv_jax.params.leaves import flatten_with_path

KERNEL = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
X = np.ones((2, 3, 2, 4), np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return nn.Dense(6, name="fc")(x)


PLAN = fc.make_plan(Net(), X)
PARAMS = {"fc": {"kernel": jnp.asarray(KERNEL), "bias": jnp.arange(6.0)}}


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def named(params):
    return {"fc": {"kernel": True, "bias": False}}


# What converts, and goes on as if nothing had happened.
RIGHT = {
    "adabelief": lambda: optax.adabelief(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": lambda: optax.adamaxw(0.1),
    "adamw": lambda: optax.adamw(0.1, mask=named),
    "adan": lambda: optax.adan(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "lamb": lambda: optax.lamb(0.1, weight_decay=0.1, mask=named),
    "lars": lambda: optax.lars(0.1, weight_decay=0.1, weight_decay_mask=named),
    "lion": lambda: optax.lion(0.1),
    "nadam": lambda: optax.nadam(0.1),
    "nadamw": lambda: optax.nadamw(0.1),
    "novograd": lambda: optax.novograd(0.1),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9, centered=True),
    "rprop": lambda: optax.rprop(0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "yogi": lambda: optax.yogi(0.1),
    "signum": lambda: optax.signum(0.1),
    "contrib.adopt": lambda: contrib.adopt(0.1),
    "contrib.madgrad": lambda: contrib.madgrad(0.1),
    "contrib.acprop": lambda: contrib.acprop(0.1),
    "contrib.ademamix": lambda: contrib.ademamix(0.1),
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(0.1),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(1.0),
    "contrib.dog": lambda: contrib.dog(1.0),
    "contrib.dowg": lambda: contrib.dowg(1.0),
    "contrib.momo": lambda: contrib.momo(0.1),
    "contrib.momo_adam": lambda: contrib.momo_adam(0.1),
    "contrib.prodigy": lambda: contrib.prodigy(1.0),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.1),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.1), contrib.reduce_on_plateau()
    ),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.adam(0.1)),
    "clip_by_block_rms": lambda: optax.chain(
        optax.clip_by_block_rms(0.1), optax.adam(0.1)
    ),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adam(0.1)
    ),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(0.1)),
    "ema": lambda: optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "masked": lambda: optax.masked(optax.adam(0.1), named),
    "partition": lambda: optax.partition(
        {True: optax.adam(0.1), False: optax.sgd(0.1)}, named
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    # A number of shape (1,) for each leaf.
    "scale_by_distance_over_gradients": lambda: optax.chain(
        optax.scale_by_distance_over_gradients(), optax.sgd(0.1)
    ),
    # Their init measures the params, and monitor's state grows with its first update.
    "snapshot": lambda: optax.chain(
        optax.adam(0.1), optax.snapshot("last", lambda updates: updates)
    ),
    "monitor": lambda: optax.chain(
        optax.monitor(
            {
                "norm": optax.tree.norm,
                "norms": lambda g: jax.tree.map(jnp.linalg.norm, g),
                "ema": optax.measure_with_ema(optax.tree.norm, 0.9),
                "gradients": optax.ema(0.9),
            }
        ),
        optax.adam(0.1),
    ),
}
# What is refused: the state means another thing, or the next update would differ.
REFUSED = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "sm3": lambda: optax.sm3(0.1),
    "lbfgs": lambda: optax.lbfgs(0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "contrib.muon": lambda: contrib.muon(0.1),
    "contrib.galore": lambda: contrib.galore(0.1),
    # Its updates want more than gradients: gradients for each example, an objective.
    "contrib.dpsgd": lambda: contrib.dpsgd(0.1, 1.0, 0.5, seed=0),
    "contrib.sophia": lambda: contrib.sophia(0.1),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(1.0)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(0.1)),
    "adamw by ndim": lambda: optax.adamw(0.1, weight_decay=0.5, mask=matrices),
    "lamb by ndim": lambda: optax.lamb(0.1, weight_decay=0.5, mask=matrices),
    "lars by ndim": lambda: optax.lars(
        0.1, weight_decay=0.5, weight_decay_mask=matrices
    ),
    "partition by ndim": lambda: optax.partition(
        {True: optax.sgd(0.1), False: optax.sgd(1.0)}, matrices
    ),
    "stateless by shape": lambda: optax.stateless(
        lambda g, p: jax.tree.map(lambda leaf: leaf / leaf.shape[0], g)
    ),
}


def state_of(tx):
    """The state after an update, with some numbers in it."""
    state = tx.init(PARAMS)
    update = optax.with_extra_args_support(tx).update
    extra = {"value": jnp.ones(()), "grad": PARAMS, "value_fn": lambda p: 1.0}
    return update(jax.tree.map(jnp.cos, PARAMS), state, PARAMS, **extra)[1]


@pytest.mark.parametrize(
    "name", one_in(2, [name for name, make in RIGHT.items() if make])
)
def test_the_next_update_is_the_same(name):
    tx = RIGHT[name]()
    state = state_of(tx)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS)
    gradients = jax.tree.map(jnp.sin, PARAMS)
    update = optax.with_extra_args_support(tx).update

    def step(gradients, state, params):
        extra = {"value": jnp.ones(()), "grad": gradients}
        return update(gradients, state, params, **extra)[0]

    want = fc.convert_params(step(gradients, state, PARAMS), PLAN)
    there = [fc.convert_params(tree, PLAN) for tree in (gradients, PARAMS)]
    got = step(there[0], moved, there[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), got, want)


def test_a_checkpoint_shows_whose_state_it_is():
    """Beside another model, where its own copies stay unless they are asked for."""
    kernel, other = PARAMS["fc"]["kernel"], {"fc": {"kernel": jnp.ones((3, 2))}}
    for name, make in RIGHT.items():
        state = jax.eval_shape(lambda make=make: state_of(make()))
        model = {"params": PARAMS, "tx": serialization.to_state_dict(state)}
        tree = {"gen": model, "disc": {"params": other}}
        found = fc.convert_params(tree, PLAN, prefix="gen/params")
        for path, leaf in flatten_with_path(found["gen"])[0]:
            moved = np.shape(leaf) != kernel.shape
            assert moved, f"{name}: add the field in {path} to copies._OPTAX"


@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # optax's own dpsgd
@pytest.mark.parametrize("name", [name for name, make in REFUSED.items() if make])
def test_what_would_go_on_otherwise_is_refused_by_name(name):
    tx = REFUSED[name]()
    with pytest.raises(fc.PlanError, match=r"fc/kernel|entry by entry|not be run"):
        fc.convert_opt_state(tx.init(PARAMS), PLAN, tx=tx, params=PARAMS)


def test_measurements_move_with_the_params():
    for name in ("snapshot", "monitor"):
        tx = RIGHT[name]()
        state = state_of(tx)
        moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS)
        key = "last" if name == "snapshot" else "gradients"
        want = fc.convert_params(optax.tree.get(state, key), PLAN)
        jax.tree.map(np.testing.assert_array_equal, optax.tree.get(moved, key), want)


def test_a_measurement_of_entries_in_a_row_is_refused():
    rows = optax.snapshot("rows", lambda updates: jax.tree.leaves(updates)[1].ravel())
    tx = optax.chain(optax.adam(0.1), rows)
    for check in (True, False):
        with pytest.raises(
            fc.PlanError, match="may hold entries of converted parameters"
        ):
            fc.convert_opt_state(
                tx.init(PARAMS), PLAN, tx=tx, params=PARAMS, check=check
            )


def test_the_check_can_be_left_out():
    tx = REFUSED["adamw by ndim"]()
    state = tx.init(PARAMS)
    moved = fc.convert_opt_state(state, PLAN, tx=tx, params=PARAMS, check=False)
    assert jax.tree.structure(moved) == jax.tree.structure(state)


def test_abstract_states_are_checked_too():
    state = jax.eval_shape(optax.adam(0.1).init, PARAMS)
    abstract = jax.eval_shape(lambda: PARAMS)
    fc.convert_opt_state(state, PLAN, tx=optax.adam(0.1), params=abstract)
    tx = REFUSED["adamw by ndim"]()
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(fc.PlanError, match="would go on otherwise"):
        fc.convert_opt_state(state, PLAN, tx=tx, params=abstract)


def _aliases(module, prefix=""):
    """Yield the optimizers of a module of optax: what takes a learning rate."""
    for name, value in vars(module).items():
        if name.startswith(("_", "scale_by_")) or not inspect.isfunction(value):
            continue
        if "learning_rate" in inspect.signature(value).parameters:
            yield f"{prefix}{name}"


def test_every_optimizer_has_its_verdict():
    found = {*_aliases(optax), *_aliases(contrib, "contrib.")}
    known = RIGHT.keys() | REFUSED.keys()
    # Deprecated, and the same as its second version.
    assert found - known - {"optimistic_adam"} == set()


def test_clipping_by_units_knows_maps_but_no_sequences():
    tx = optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0))
    # (24, 6) and (3, 2, 4, 6) have the same units, and optax takes them alike.
    fc.convert_opt_state(tx.init(PARAMS), PLAN, tx=tx, params=PARAMS)
    plan = fc.make_plan(nn.Dense(6), np.ones((2, 24), np.float32))
    params = PARAMS["fc"]
    with pytest.raises(fc.PlanError, match="'kernel' differs by"):
        fc.convert_opt_state(tx.init(params), plan, tx=tx, params=params)
