"""Both forms over a pod of 256 chips that you don't have; skips without the extra."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from compilers import compile_for
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fcconv_jax as fc
from fcconv_jax.backends.resolution import missing_extra

POD = "tpu:v5e:16x16"
MESH = AbstractMesh((16, 16), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
# Fully sharded over "data", tensor parallel over "model", column then row.
SPECS = {
    "attention/query/kernel": P("data", "model"),
    "attention/key/kernel": P("data", "model"),
    "attention/value/kernel": P("data", "model"),
    "attention/out/kernel": P("model", None, "data"),
    "up/kernel": P("data", "model"),
    "down/kernel": P("model", "data"),
    "head/kernel": P("data", "model"),
}
CONVERTED = {
    "attention/query/kernel": P(None, "data", "model"),
    "attention/key/kernel": P(None, "data", "model"),
    "attention/value/kernel": P(None, "data", "model"),
    "attention/out/kernel": P(None, "model", "data"),
    "up/kernel": P(None, "data", "model"),
    "down/kernel": P(None, "model", "data"),
    # The window's axis comes first: it has the sharding of the flattened input.
    "head/kernel": P("data", None, "model"),
}


class Encoder(nn.Module):
    """A block of attention and an MLP, then a head on all tokens: a full window."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(16, name="attention")(h)
        h = nn.gelu(nn.Dense(1024, name="up")(nn.LayerNorm()(x)))
        x = x + nn.Dense(256, name="down")(h)
        return nn.Dense(64, name="head")(x.reshape(x.shape[0], -1))


def over_mesh(leaf, *spec):
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(MESH, P(*spec))
    )


def by_name(tree):
    """The leaves of params by ``layer/leaf``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"])
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def sharded(model, x):
    """A model's abstract params over the mesh."""
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype))
    )

    def place(path, leaf):
        return over_mesh(leaf, *SPECS.get("/".join(key.key for key in path[1:]), ()))

    return jax.tree_util.tree_map_with_path(place, params)


def collectives(program):
    return sum(program.hlo.collectives.values())


def traffic(program):
    """Bytes over the links: XLA may trade a gather for a sum, which goes twice."""
    sizes = program.hlo.collective_bytes
    assert set(sizes) <= {"all-gather", "all-reduce"}
    return sizes.get("all-gather", 0) + 2 * sizes.get("all-reduce", 0)


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if missing := missing_extra("tpu"):
        pytest.skip(missing)


@pytest.fixture(scope="module")
def encoder():
    model = Encoder()
    x = over_mesh(jax.ShapeDtypeStruct((64, 64, 256), jnp.float32), "data")
    return model, sharded(model, x), x, fc.make_plan(model, x)


def test_params_keep_their_shardings(encoder):
    _, params, _, plan = encoder
    assert {path: layer.case for path, layer in plan.items()} == {
        **{path.removesuffix("/kernel"): "pointwise" for path in SPECS},
        "head": "full_window",
    }
    moved = fc.convert_params(params, plan)
    for path, leaf in by_name(moved).items():
        want = NamedSharding(MESH, CONVERTED.get(path, P()))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), path
        assert leaf.sharding.mesh == MESH
    for before, after in zip(
        jax.tree.leaves(params), jax.tree.leaves(fc.restore_params(moved, plan))
    ):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)


def test_the_forward_pass_has_the_same_collectives(encoder):
    model, params, x, plan = encoder
    report = fc.verify(model, params, x, plan=plan, backends=[POD])
    assert report.passed, str(report)
    (found,) = report.backends
    assert (found.how, found.device) == ("compiled", "256 x TPU v5 lite")
    for counts in (found.original.hlo.collectives, found.converted.hlo.collectives):
        # Each kernel is gathered from where it is fully sharded, and the rows of two
        # tensor parallel layers are summed.
        assert counts == {"all-gather": len(SPECS), "all-reduce": 2}
    assert found.original.hlo.collective_bytes == found.converted.hlo.collective_bytes


def test_a_training_step_has_no_more(encoder):
    model, params, x, plan = encoder

    def step_of(apply, params):
        def step(params, x):
            grads = jax.grad(lambda params: (apply(params, x) ** 2).mean())(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        step = jax.jit(step, out_shardings=shardings)
        return compile_for(step, (params, x), POD)

    moved = fc.convert_params(params, plan)
    dense = step_of(model.apply, params)
    conv = step_of(fc.convert_model(model, plan).apply, moved)
    # Each kernel is gathered for use, each gradient is summed over the batch.
    assert collectives(conv) >= 2 * len(SPECS)
    assert collectives(conv) <= collectives(dense)
    # A head's bias is flat in the conv form, and XLA decides anew for each bias whether
    # to sum it whole or in parts that it gathers. The smallest kernel has 256 KiB.
    biases = [leaf for path, leaf in by_name(params).items() if path.endswith("bias")]
    slack = sum(leaf.size * leaf.dtype.itemsize for leaf in biases)
    assert slack < 16 * 2**10
    assert traffic(conv) <= traffic(dense) + slack


def test_a_layout_that_adds_collectives_shows():
    """Tokens cut over the pod, folded into the batch: XLA has to gather them."""
    model = nn.Dense(256)
    x = over_mesh(jax.ShapeDtypeStruct((64, 64, 256), jnp.float32), "data", "model")
    params = sharded(model, x)
    found = {}
    for layout in ("keep", "fold"):
        plan = fc.make_plan(model, x, rules=[f"*={layout}"])
        report = fc.verify(model, params, x, plan=plan, backends=[POD])
        found[layout] = report.backends[0]
    chosen = fc.make_plan(model, x)
    assert chosen[""].layout == "keep"
    assert collectives(found["keep"].converted) == collectives(found["keep"].original)
    assert collectives(found["fold"].converted) > collectives(found["fold"].original)
