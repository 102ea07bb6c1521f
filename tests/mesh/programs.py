"""Runs both forms over 8 CPU devices; started by test_mesh.py in a process of its own.

Prints one line of JSON for each case: what differs, and the collectives of both forms.
"""

import functools
import json
import sys
import traceback

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fcconv_jax as fc
from fcconv_jax.backends.census import count_hlo, count_stablehlo

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def put(tree, specs, where):
    """Small integers in the shapes of a tree, over the mesh."""
    rng = np.random.default_rng(0)

    def fill(leaf, spec):
        values = rng.integers(-2, 2, leaf.shape, endpoint=True).astype(leaf.dtype)
        return jax.device_put(values, NamedSharding(where, spec))

    return jax.tree.map(fill, tree, specs)


def compare(original, converted, params, moved, x, plan):
    """Output, gradients and a step of both forms, to the bit, and their collectives."""
    signs = np.random.default_rng(1)

    def step(f):
        def run(params, x):
            def loss(params, x):
                y = f(params, x)
                return (y * weights).sum(), y

            grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
            # Powers of two keep the arithmetic exact.
            after = jax.tree.map(lambda p, g: p - 0.25 * g, params, grads[0])
            return y, grads, after

        return run

    weights = signs.choice(
        np.float32([-1, 1]), jax.eval_shape(original, params, x).shape
    )
    # What goes in with a sharding comes out with it, as in any training loop.
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, moved, x))
    runs = {}
    for name, f, p, at in (
        ("original", original, params, where[0]),
        ("converted", converted, moved, where[1]),
    ):
        run = jax.jit(step(f), out_shardings=(None, (at, where[2]), at))
        runs[name] = (run, p)
    y, (grad, dx), after = runs["original"][0](params, x)
    z, (grad2, dx2), after2 = runs["converted"][0](moved, x)
    back = fc.restore_params(grad2, plan), fc.restore_params(after2, plan)
    same = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
        (y, dx, grad, after),
        (z, dx2, *back),
    )
    lowered = jax.jit(converted).lower(moved, x)
    found = {
        "equal": all(jax.tree.leaves(same)),
        "typed": jax.typeof(y) == jax.typeof(z) and jax.typeof(dx) == jax.typeof(dx2),
        "convolutions": count_stablehlo(lowered.as_text()).convolutions,
        "shards": [
            leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(moved)
        ],
    }
    for phase in ("forward", "step"):
        for name, f, p in (
            ("original", original, params),
            ("converted", converted, moved),
        ):
            program = jax.jit(f) if phase == "forward" else runs[name][0]
            hlo = count_hlo(program.lower(p, x).compile().as_text())
            found[f"{phase}/{name}"] = (hlo.collectives, hlo.collective_bytes)
    return found


class Mlp(nn.Module):
    explicit: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="up")(x))
        if self.explicit:  # a dot over two sharded axes asks for a sharding
            x = jax.sharding.reshard(x, P("data"))
        return nn.Dense(32, name="down")(x)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 8), name="up")(x)
        return nn.DenseGeneral(32, axis=(-2, -1), name="down")(x)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(16, name="down")(x)


SPECS = {
    "data": {},
    "tensor": {
        "up/kernel": P(None, "model"),
        "up/bias": P("model"),
        "down/kernel": P("model"),
    },
    "column": {"up/kernel": P(None, "model"), "down/kernel": P(None, "model")},
    "fsdp": {"up/kernel": P("data"), "down/kernel": P("data")},
    "both": {"up/kernel": P("data", "model"), "down/kernel": P("model")},
}


def specs_of(tree, table):
    def spec(path, leaf):
        del leaf
        return table.get("/".join(key.key for key in path[-2:]), P())

    return jax.tree_util.tree_map_with_path(spec, tree)


def run_linen(model, shape, spec, table, kind, to="conv", rules=()):
    where = mesh(kind)
    x = put(jax.ShapeDtypeStruct(shape, jnp.float32), spec, where)
    with jax.set_mesh(where):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
        params = put(params, specs_of(params, table), where)
        plan = fc.make_plan(model, x, to=to, rules=rules)
        moved = fc.convert_params(params, plan)
        restored = fc.restore_params(moved, plan)
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(restored)):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        converted = fc.convert_model(model, plan)
        return compare(model.apply, converted.apply, params, moved, x, plan)


for _name, _table in SPECS.items():
    for _shape in ((8, 32), (8, 16, 32)):
        CASES[f"linen {_name} {len(_shape)}"] = lambda t=_table, s=_shape: run_linen(
            Mlp(), s, P("data"), t, AxisType.Auto
        )
for _name in ("data", "tensor", "fsdp"):
    CASES[f"heads {_name}"] = lambda t=SPECS[_name]: run_linen(
        Heads(), (8, 16, 32), P("data"), t, AxisType.Auto
    )
    CASES[f"flat {_name}"] = lambda t=SPECS[_name]: run_linen(
        Flat(), (8, 4, 4, 8), P("data"), t, AxisType.Auto
    )
for _name in ("data", "fsdp", "column"):
    CASES[f"linen explicit {_name}"] = lambda t=SPECS[_name]: run_linen(
        Mlp(explicit=True), (8, 16, 32), P("data"), t, AxisType.Explicit
    )
CASES["linen sequence"] = lambda: run_linen(
    Mlp(), (8, 16, 32), P("data", "model"), {}, AxisType.Auto
)
CASES["linen explicit sequence"] = lambda: run_linen(
    nn.Dense(16), (8, 16, 32), P("data", "model"), {}, AxisType.Explicit
)


@case
def nnx_explicit_tensor():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(32, 64, rngs=rngs)
            self.down = nnx.Linear(64, 32, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.up(x, out_sharding=P("data", None, "model")))
            return self.down(x, out_sharding=P("data"))

    return run_nnx(Net, AxisType.Explicit)


@case
def nnx_auto_tensor():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(32, 64, rngs=rngs)
            self.down = nnx.Linear(64, 32, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    return run_nnx(Net, AxisType.Auto)


def run_nnx(cls, kind):
    where = mesh(kind)
    model = cls(nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    params = put(state, specs_of(state, SPECS["tensor"]), where)
    x = put(jax.ShapeDtypeStruct((8, 16, 32), jnp.float32), P("data"), where)
    with jax.set_mesh(where):
        nnx.update(model, params)
        plan = fc.make_plan(model, x)
        other = fc.convert_model(model, plan)
        moved = nnx.to_pure_dict(nnx.state(other))
        want = fc.convert_params(params, plan)
        assert jax.tree.map(jax.typeof, moved) == jax.tree.map(jax.typeof, want)
        assert jax.tree.map(lambda a: a.sharding, moved) == jax.tree.map(
            lambda a: a.sharding, want
        )

        def call(model):
            graph, _ = nnx.split(model)
            return lambda params, x: nnx.merge(graph, as_state(model, params))(x)

        def as_state(model, params):
            state = nnx.state(model)
            nnx.replace_by_pure_dict(state, params)
            return state

        return compare(call(model), call(other), params, moved, x, plan)


def run_function(function, params, specs, x, spec, kind, to="conv"):
    where = mesh(kind)
    struct = lambda s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    params = put({k: struct(s) for k, s in params.items()}, specs, where)
    x = put(struct(x), spec, where)
    with jax.set_mesh(where):
        plan = fc.make_plan(function, params, x, to=to)
        assert len(plan) == len(params), plan
        converted = fc.convert_model(function, plan)
        moved = fc.convert_params(params, plan)
        return compare(function, converted, params, moved, x, plan)


def mlp(p, x):
    h = jnp.maximum(x @ p["a"], 0)
    out = P("data") if typed(x) else None
    return jnp.einsum("...f,fo->...o", h, p["b"], out_sharding=out)


def typed(x):
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def attention_output(p, x):
    h = jnp.einsum("bsi,ihd->bshd", x, p["a"])
    out = P("data") if typed(x) else None
    return jnp.einsum("bshd,hdo->bso", h, p["b"], out_sharding=out)


def layers(p, x):
    return jax.lax.scan(lambda c, w: (mlp(w, c), None), x, p)[0]


def conv(p, x):
    out = P("data", None, None, "model") if typed(x) else None
    return jax.lax.conv_general_dilated(
        x,
        p["a"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        out_sharding=out,
    )


_AB = {"a": (32, 64), "b": (64, 32)}
_TENSOR = {"a": P(None, "model"), "b": P("model")}
for _kind in (AxisType.Auto, AxisType.Explicit):
    for _name, _specs in (
        ("data", {"a": P(), "b": P()}),
        ("tensor", _TENSOR),
        ("fsdp", {"a": P("data"), "b": P("data")}),
        ("both", {"a": P("data", "model"), "b": P("model", "data")}),
    ):
        CASES[f"function {_kind.name} {_name}"] = lambda s=_specs, k=_kind: (
            run_function(mlp, _AB, s, (8, 16, 32), P("data"), k)
        )
    CASES[f"function {_kind.name} heads"] = lambda k=_kind: run_function(
        attention_output,
        {"a": (32, 4, 8), "b": (4, 8, 32)},
        _TENSOR,
        (8, 16, 32),
        P("data"),
        k,
    )
    CASES[f"function {_kind.name} scan"] = lambda k=_kind: run_function(
        layers,
        {"a": (3, 32, 64), "b": (3, 64, 32)},
        {"a": P(None, None, "model"), "b": P(None, "model")},
        (8, 32),
        P("data"),
        k,
    )
    for _window in (1, 4):
        CASES[f"function {_kind.name} to dense {_window}"] = functools.partial(
            run_function,
            conv,
            {"a": (_window, _window, 8, 16)},
            {"a": P(None, None, None, "model")},
            (8, 4, 4, 8),
            P("data"),
            _kind,
            to="dense",
        )


@case
def shard_map():
    where = mesh(AxisType.Explicit)
    model = Mlp()
    x = put(jax.ShapeDtypeStruct((8, 32), jnp.float32), P("data"), where)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((8, 32))))
    params = put(params, specs_of(params, {}), where)
    plan = fc.make_plan(model, jnp.zeros((8, 32)))
    with jax.set_mesh(where):
        moved = fc.convert_params(params, plan)

        def spread(f):
            return jax.shard_map(
                f, mesh=where, in_specs=(P(), P("data")), out_specs=P("data")
            )

        other = fc.convert_model(model, plan)
        return compare(spread(model.apply), spread(other.apply), params, moved, x, plan)


@case
def optimizer():
    """The moments lie as their parameters do."""
    where = mesh(AxisType.Auto)
    model, x = Mlp(), jnp.zeros((8, 32))
    params = model.init(jax.random.key(0), x)
    params = put(params, specs_of(params, SPECS["both"]), where)
    tx, plan = optax.adam(1e-3), fc.make_plan(model, x)
    state = jax.jit(tx.init)(params)
    state = optax.tree_map_params(
        tx, lambda s, p: jax.device_put(s, p.sharding), state, params
    )
    moved = fc.convert_opt_state(state, plan, tx=tx, params=params)
    want = fc.convert_params(params, plan)
    got = moved[0].mu
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, got, want)
    return {"equal": all(jax.tree.leaves(same)), "typed": True, "convolutions": 1}


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for name, function in CASES.items():
        if sys.argv[1:] and not any(part in name for part in sys.argv[1:]):
            continue
        try:
            found = function()
        except Exception:
            found = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps({"case": name, **found}), flush=True)
