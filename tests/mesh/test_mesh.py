"""Both forms over 8 CPU devices: the same numbers, and no collective more."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fcconv_jax as fc
from fcconv_jax.geometry import meshes

PROGRAMS = pathlib.Path(__file__).with_name("programs.py")


def run_programs():
    """What the programs found, by case; JAX counts its devices once per process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAMS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    return {case["case"]: case for case in cases}


def every_program_ran(found):
    failed = {name: case["error"] for name, case in found.items() if "error" in case}
    assert not failed, "\n".join(failed.values())
    for kind in ("linen", "nnx", "function", "shard_map", "Auto", "Explicit"):
        assert any(kind.lower() in name.lower() for name in found)


def numbers_and_shardings_are_those_of_the_original(found):
    assert [n for n, case in found.items() if not case["equal"]] == []
    assert [n for n, case in found.items() if not case["typed"]] == []


def the_layers_are_converted(found):
    for name, case in found.items():
        assert (case["convolutions"] > 0) == ("to dense" not in name), name


def no_collective_is_added(found):
    added = {}
    for (name, case), phase in itertools.product(found.items(), ("forward", "step")):
        if f"{phase}/original" not in case:
            continue
        (before, size), (after, new_size) = (
            case[f"{phase}/{form}"] for form in ("original", "converted")
        )
        counts = sum(before.values()), sum(after.values())
        sizes = sum(size.values()), sum(new_size.values())
        if counts[0] < counts[1] or sizes[0] < sizes[1]:
            added[name, phase] = (before, after)
    assert added == {}


def collectives_were_there_to_be_counted(found):
    assert found["linen data 2"]["step/original"][0]["all-reduce"] > 0
    assert found["linen tensor 2"]["forward/original"][0]["all-reduce"] > 0
    assert found["linen fsdp 3"]["forward/original"][0]["all-gather"] > 0


def params_stay_sharded(found):
    assert [1, 32, 16] in found["linen tensor 3"]["shards"]
    assert [1, 16, 64] in found["linen fsdp 3"]["shards"]


@pytest.mark.slow
def test_programs_over_eight_devices(subtests):
    found = run_programs()
    for check in (
        every_program_ran,
        numbers_and_shardings_are_those_of_the_original,
        the_layers_are_converted,
        no_collective_is_added,
        collectives_were_there_to_be_counted,
        params_stay_sharded,
    ):
        with subtests.test(check.__name__):
            check(found)


MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def struct(shape, *spec):
    sharding = NamedSharding(MESH, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def product(w, x):
    return x @ w


def test_layouts_follow_the_shardings_of_the_inputs():
    w = struct((32, 8))
    for spec, layout in (
        (("data",), "fold"),
        (("data", "model"), "keep"),
        (("data", None, "model"), "fold"),
    ):
        x = struct((8, 4, 32), *spec)
        plan = fc.make_plan(product, w, x, backend="any")
        assert plan[""].layout == layout
    x = struct((8, 4, 32), "data", "model")
    rules = [fc.Rule("*", layout="fold")]
    assert fc.make_plan(product, w, x, rules=rules)[""].layout == "fold"
    ids = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=x.sharding)
    plan = fc.make_plan(
        lambda p, i: p["e"][i] @ p["w"], {"e": w, "w": struct((8, 3))}, ids
    )
    assert plan["w"].layout == "keep"
    flat = fc.make_plan(product, w, struct((8, 32), "data"), rules=["*=2x2"])
    assert flat[""].layout == "flat"
    assert fc.Plan.from_json(flat.to_json()) == flat


def test_a_grouped_layer_over_a_mesh_is_left_and_refused():
    def experts(w, x):
        return jnp.einsum("gbi,gio->gbo", x, w)

    w, x = (struct(shape, "model") for shape in ((4, 8, 3), (4, 2, 8)))
    assert "XLA" in fc.make_plan(experts, w, x).skipped[""]
    alone = fc.make_plan(experts, jnp.zeros(w.shape), jnp.zeros(x.shape))
    assert alone[""].case == "grouped"
    for leaf in (w, w.sharding, P("model")):
        with pytest.raises(fc.PlanError, match=r"grouped convolution.*rule"):
            fc.convert_params(leaf, alone)


def test_a_reshape_that_would_move_entries_is_refused():
    sharding = NamedSharding(MESH, P("data", "model"))
    with pytest.raises(ValueError, match=r"layout='keep'.*or reshard"):
        meshes.respec(sharding, (8, 4, 16), (32, 16))
    with pytest.raises(ValueError, match="without moving entries"):
        meshes.respec(sharding, (8, 16), (8, 2, 8))  # 2 does not divide by 4
    assert meshes.respec(sharding, (8, 16), (8, 4, 4)).spec == P("data", "model", None)
    assert meshes.respec(None, (8, 16), (8, 4, 4)) is None


def test_flat_windows_are_the_same_map():
    layer = fc.make_plan(
        product,
        jnp.zeros((24, 5)),
        jnp.zeros((2, 24)),
        rules=[fc.Rule("*", window=(2, 3), order="CWH", layout="flat")],
    )
    rng = jax.random.key(0)
    w = jax.random.randint(rng, (24, 5), -3, 4).astype(jnp.float32)
    x = jax.random.randint(rng, (2, 24), -3, 4).astype(jnp.float32)
    flat = fc.convert_model(product, layer)
    y = flat(fc.convert_params(w, layer), x)
    assert (y == x @ w).all()
    text = jax.jit(flat).lower(fc.convert_params(w, layer), x).as_text()
    assert "tensor<1x24x5xf32>" in text
