"""Transposed convolutions in every front end, against Flax's and lax's own layers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import integers, one_in, same_bits
from flax import nnx

import fcconv_jax as fc

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))


class Decoder(nn.Module):
    """Two steps up, through a norm and dropout."""

    transpose_kernel: bool = False
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x, train=False):
        options = {
            "padding": self.padding,
            "transpose_kernel": self.transpose_kernel,
        }
        x = nn.ConvTranspose(5, (2, 3), (2, 3), name="up", **options)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.LayerNorm()(x)))
        x = nn.ConvTranspose(4, (2, 2), (2, 2), use_bias=False, name="out", **options)(
            x
        )
        return nn.ConvTranspose(3, (1, 1), name="point", **options)(x)


def converted(plan):
    return {path: (layer.case, layer.layer) for path, layer in plan.items()}


@pytest.mark.parametrize("transpose_kernel", one_in(2, [False, True]))
@pytest.mark.parametrize("padding", one_in(2, ["SAME", "VALID"]))
def test_a_linen_decoder(transpose_kernel, padding):
    model = Decoder(transpose_kernel, padding)
    variables = model.init(jax.random.key(1), X)
    plan = fc.make_plan(model, X, to="dense")
    assert [layer.case for layer in plan.values()] == [
        "unpatchify",
        "unpatchify",
        "pointwise",
    ]
    assert not plan.skipped
    assert fc.Plan.from_json(plan.to_json()) == plan
    dense = fc.convert_params(variables, plan)
    up: Any = dense["params"]["up"]
    assert up["kernel"].shape == (6, 2 * 3 * 5)
    assert up["bias"].shape == (5,)
    assert same_bits(fc.restore_params(dense, plan), variables)
    report = fc.verify(model, variables, X, plan=plan, progress=False)
    assert report.passed
    # The convolutions are gone from the program.
    run = fc.convert_model(model, plan).apply
    assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(dense, X))


def test_dropout_and_a_training_step_are_those_of_the_original():
    model = Decoder()
    variables = integers(model.init(jax.random.key(1), X))
    plan = fc.make_plan(model, X, to="dense")
    rngs = {"dropout": jax.random.key(3)}
    call = {"train": True, "rngs": rngs}
    x = integers(X)
    want = model.apply(variables, x, **call)
    dense = fc.convert_params(variables, plan)
    got = fc.convert_model(model, plan).apply(dense, x, **call)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    tx = optax.adam(1e-2)
    state = tx.init(variables)
    moved = fc.convert_opt_state(state, plan, tx=tx, params=variables)
    assert same_bits(
        jax.tree.map(jnp.shape, moved), jax.tree.map(jnp.shape, tx.init(dense))
    )


def test_overlapping_windows_are_skipped_with_the_fix():
    model = nn.ConvTranspose(3, (4, 4), (2, 2))
    (reason,) = fc.make_plan(model, X, to="dense").skipped.values()
    assert "windows of outputs overlap" in reason
    assert "strides equal to the kernel size" in reason


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_an_nnx_decoder(transpose_kernel):
    class Up(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.ConvTranspose(
                *(6, 5, (2, 3), (2, 3)), transpose_kernel=transpose_kernel, rngs=rngs
            )
            self.head = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.up(x)))

    model = Up(nnx.Rngs(0))
    plan = fc.make_plan(model, X, to="dense")
    assert converted(plan) == {"up/kernel": ("unpatchify", "conv_transpose")}
    assert fc.verify(model, None, X, plan=plan, progress=False).passed
    dense = fc.convert_model(model, plan)
    assert dense.up.kernel.shape == (6, 30)
    np.testing.assert_allclose(dense(X), model(X), rtol=1e-5, atol=1e-6)
    back = fc.convert_model(dense, plan.inverse())
    assert same_bits(nnx.state(back), nnx.state(model))


@pytest.mark.parametrize(
    ("window", "groups", "layout"),
    [
        ((3,), 1, ("NWC", "WIO", "NWC")),
        ((2, 3), 2, ("NHWC", "HWIO", "NHWC")),
        ((2, 3), 3, ("NCHW", "OIHW", "NCHW")),
        ((2, 1, 3), 1, ("NDHWC", "DHWIO", "NDHWC")),
    ],
)
def test_functions_of_every_rank_with_groups_and_layouts(window, groups, layout):
    def shaped(spec, sizes):
        return np.zeros([sizes[axis] for axis in spec], np.float32)

    axes = layout[0].replace("N", "").replace("C", "")
    sizes = dict(zip(axes, (4, 3, 2)), N=2, C=6)
    x = integers(shaped(layout[0], sizes))
    kernel = dict(zip(axes, window), I=6 // groups, O=2 * groups)
    params = {"w": integers(shaped(layout[1], kernel), seed=1)}

    def up(params, x):
        return jax.lax.conv_general_dilated(
            *(x, params["w"], (1,) * len(window), [(k - 1, k - 1) for k in window]),
            lhs_dilation=window,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    plan = fc.make_plan(up, params, x, to="dense")
    case = "unpatchify" if groups == 1 else "grouped"
    assert converted(plan) == {"w": (case, "conv_transpose")}
    dense = fc.convert_params(params, plan)
    assert same_bits(fc.restore_params(dense, plan), params)
    got = fc.convert_model(up, plan)(dense, x)
    np.testing.assert_array_equal(got, up(params, x))
    assert fc.verify(up, params, x, plan=plan, progress=False).passed


def test_a_single_input_fills_the_whole_window():
    def up(w, x):
        return jax.lax.conv_transpose(x, w, (1, 1), "VALID")

    w, x = (
        integers(np.zeros((4, 3, 5, 2), "f4")),
        integers(np.zeros((2, 1, 1, 5), "f4")),
    )
    plan = fc.make_plan(up, w, x, to="dense")
    assert [layer.window for layer in plan.values()] == [(4, 3)]
    got = fc.convert_model(up, plan)(fc.convert_params(w, plan), x)
    np.testing.assert_array_equal(got, up(w, x))
    # Of more inputs the windows overlap.
    with pytest.raises(fc.PlanError, match="its forms differ"):
        fc.convert_model(up, plan)(fc.convert_params(w, plan), jnp.ones((2, 2, 1, 5)))


@pytest.mark.parametrize("lift", [nn.vmap, nn.scan])
def test_stacked_layers(lift):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            y = nn.ConvTranspose(6, (2, 2), (2, 2), name="up")(x)
            return (y[:, :3, :4], None) if lift is nn.scan else y

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    if lift is nn.scan:
        stack, x = nn.scan(Step, length=3, **axes)(), X
    else:
        stack, x = nn.vmap(Step, in_axes=0, **axes)(), jnp.stack([X, 2 * X, X + 1])
    variables = stack.init(jax.random.key(0), x)
    plan = fc.make_plan(stack, x, to="dense")
    # vmap makes one convolution of its steps, with a group for each.
    case = "unpatchify" if lift is nn.scan else "grouped"
    assert [(layer.case, layer.base) for layer in plan.values()] == [
        (case, "unpatchify")
    ]
    assert fc.verify(stack, variables, x, plan=plan, progress=False).passed


@pytest.mark.parametrize("lift", [nnx.vmap, nnx.scan])
def test_stacked_nnx_layers(lift):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return nnx.ConvTranspose(4, 4, (2, 3), (2, 3), padding="VALID", rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = stacked(nnx.Rngs(0))

        def __call__(self, x):
            if lift is nnx.vmap:
                return nnx.vmap(lambda layer, x: layer(x))(self.layers, x)
            axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
            return nnx.scan(lambda x, layer: layer(x)[:, :3, :4], **axes)(
                x, self.layers
            )

    stack, x = Stack(), X[..., :4]
    nnx.update(stack, jax.tree.map(integers, nnx.state(stack, nnx.Param)))
    x = jnp.stack([x, 2 * x, x + 1]) if lift is nnx.vmap else x
    plan = fc.make_plan(stack, x, to="dense")
    case = "grouped" if lift is nnx.vmap else "unpatchify"
    assert [layer.case for layer in plan.values()] == [case]
    np.testing.assert_array_equal(fc.convert_model(stack, plan)(x), stack(x))


@pytest.mark.parametrize(
    ("pads", "holes", "spread", "case"),
    [
        (((1, 1), (-1, 2)), (2, 3), (1, 1), "phases"),
        (((-2, -1), (-5, 1)), (2, 3), (1, 1), "phases"),  # of inputs, too
        (((1, 2), (1, 3)), (3, 5), (1, 1), "phases"),  # outputs that read no input
        (((3, 1), (0, 2)), (3, 2), (2, 3), "phases"),
        (((2, 2), (2, 2)), (2, 3), (2, 1), None),
    ],
)
def test_spaced_inputs_with_any_padding(pads, holes, spread, case):
    def run(params, x):
        return jax.lax.conv_general_dilated(
            *(x, params["w"], (1, 1), pads, holes, spread),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    params = {"w": integers(np.zeros((2, 3, X.shape[-1], 4), "f4"))}
    plan = fc.make_plan(run, params, X, to="dense", rules=["w=phases"])
    assert [layer.case for layer in plan.values()] == ([case] if case else [])
    assert list(plan.skipped) == ([] if case else ["w"])
    got = fc.convert_model(run, plan)(fc.convert_params(params, plan), X)
    np.testing.assert_array_equal(got, run(params, X))


def test_strides_of_a_single_position():
    """Phases would give a position for each step of the window."""

    def run(params, x):
        return jax.lax.conv_general_dilated(
            *(x, params["w"], (3, 1), [(1, 1), (0, 1)], (3, 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    params, x = {"w": integers(np.zeros((1, 3, 6, 4), "f4"))}, integers(X[:, :1])
    plan = fc.make_plan(run, params, x, to="dense", rules=["w=phases"])
    assert [layer.case for layer in plan.values()] == ["phases"]
    got = fc.convert_model(run, plan)(fc.convert_params(params, plan), x)
    np.testing.assert_array_equal(got, run(params, x))
    with pytest.raises(fc.PlanError, match="its forms differ"):
        fc.convert_model(run, plan)(fc.convert_params(params, plan), X)


def test_a_reversed_kernel_of_a_dense_is_followed():
    def f(params, x):
        return x.reshape(2, -1) @ params["w"][::-1]

    params = {"w": integers(np.zeros((72, 5), "f4"))}
    plan = fc.make_plan(f, params, X)
    conv = fc.convert_params(params, plan)
    assert conv["w"].shape == (3, 4, 6, 5)
    assert same_bits(fc.restore_params(conv, plan), params)
    x = integers(X)
    np.testing.assert_array_equal(fc.convert_model(f, plan)(conv, x), f(params, x))


def test_checkpoints_hold_the_reversed_window(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = Decoder()
    variables = model.init(jax.random.key(1), X)
    plan = fc.make_plan(model, X, to="dense")
    kernel = np.asarray(variables["params"]["up"]["kernel"])
    tree = jax.tree_util.tree_leaves_with_path(variables["params"])
    flat = {".".join(k.key for k in path): np.asarray(leaf) for path, leaf in tree}
    save_file(flat, tmp_path / "a.safetensors")
    fc.convert_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", plan, progress=False
    )
    moved = load_file(tmp_path / "b.safetensors")["up.kernel"]
    want = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(6, 30)
    np.testing.assert_array_equal(moved, want)
    fc.restore_checkpoint(
        tmp_path / "b.safetensors", tmp_path / "c.safetensors", progress=False
    )
    assert same_bits(load_file(tmp_path / "c.safetensors"), flat)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_checkpoints_convert_with_their_optimizer_state(transpose_kernel, tmp_path):
    from flax import serialization

    model = Overlapping(transpose_kernel)
    params = integers(model.init(jax.random.key(1), X)["params"])
    plan = fc.make_plan(model, X, to="dense", rules=["*=phases"])
    tx = optax.adam(1e-2)
    _, state = tx.update(params, tx.init(params), params)
    moved = fc.convert_opt_state(state, plan, tx=tx, params=params)
    files = [tmp_path / f"{name}.msgpack" for name in ("a", "b", "c")]
    tree = {"params": params, "opt_state": state}
    files[0].write_bytes(serialization.to_bytes(tree))
    fc.convert_checkpoint(*files[:2], plan, progress=False)
    fc.restore_checkpoint(*files[1:], progress=False)
    like = {"params": fc.convert_params(params, plan), "opt_state": moved}
    found = serialization.from_bytes(like, files[1].read_bytes())
    assert same_bits(found, like)
    assert same_bits(serialization.from_bytes(tree, files[2].read_bytes()), tree)


def test_a_plan_of_one_input_size_holds_for_others():
    model = Decoder()
    variables = model.init(jax.random.key(1), X)
    plan = fc.make_plan(model, X, to="dense")
    larger = jnp.ones((1, 7, 5, 6))
    got = fc.convert_model(model, plan).apply(
        fc.convert_params(variables, plan), larger
    )
    np.testing.assert_allclose(
        got, model.apply(variables, larger), rtol=1e-4, atol=1e-6
    )


def test_a_lost_flip_is_seen():
    """The check can fail: params moved without the reversal are another model's."""
    model = Decoder()
    variables = model.init(jax.random.key(1), X)
    plan = fc.make_plan(model, X, to="dense")
    dense = fc.convert_params(variables, plan)
    layer = plan["up/kernel"]
    plain = dataclasses.replace(layer.kernel, flip=())
    dense["params"]["up"]["kernel"] = plain(variables["params"]["up"]["kernel"])
    report = fc.verify(
        *(model, variables, X), plan=plan, converted_params=dense, progress=False
    )
    assert not report.passed


class Overlapping(nn.Module):
    """A step up whose windows overlap, between layers that have other forms."""

    transpose_kernel: bool = False

    @nn.compact
    def __call__(self, x):
        options = {"strides": (2, 2), "transpose_kernel": self.transpose_kernel}
        x = nn.ConvTranspose(5, (2, 2), name="apart", **options)(x)
        return nn.ConvTranspose(4, (4, 3), name="up", **options)(nn.relu(x))


@pytest.mark.slow
def test_a_rule_runs_overlapping_windows_in_phases():
    model = Overlapping()
    variables = model.init(jax.random.key(1), X)
    plan = fc.make_plan(model, X, to="dense", rules=["*=phases"])
    assert converted(plan) == {
        "apart/kernel": ("unpatchify", "conv_transpose"),
        "up/kernel": ("phases", "conv_transpose"),
    }
    assert fc.Plan.from_json(plan.to_json()) == plan
    moved = fc.convert_params(variables, plan)
    assert same_bits(moved["params"]["up"], variables["params"]["up"])
    assert same_bits(fc.restore_params(moved, plan), variables)
    run = fc.convert_model(model, plan).apply
    assert "lhs_dilation=(2" not in str(jax.make_jaxpr(run)(moved, X))
    assert fc.verify(model, variables, X, plan=plan, progress=False).passed
    # Of other sizes, too, down to one input.
    for shape in ((1, 5, 2, 6), (1, 1, 1, 6)):
        x = integers(np.zeros(shape, "f4"))
        np.testing.assert_allclose(
            run(moved, x), model.apply(variables, x), rtol=1e-5, atol=1e-5
        )


def test_nnx_layers_run_in_phases_and_back():
    model = nnx.ConvTranspose(6, 5, (3, 4), (2, 3), padding="VALID", rngs=nnx.Rngs(0))
    plan = fc.make_plan(model, X, to="dense", rules=["*=phases"])
    assert [layer.base for layer in plan.values()] == ["phases"]
    phased = fc.convert_model(model, plan)
    np.testing.assert_allclose(phased(X), model(X), rtol=1e-5, atol=1e-5)
    back = fc.convert_model(phased, plan.inverse())
    assert same_bits(nnx.state(back), nnx.state(model))
    assert fc.verify(model, None, X, plan=plan, progress=False).passed
    assert fc.verify(phased, None, X, plan=plan.inverse(), progress=False).passed


def test_phases_of_functions_with_groups_layouts_and_dilations():
    params = {"w": integers(np.zeros((6, 2, 3, 4), "f4"), seed=1)}
    x = integers(np.zeros((2, 6, 5, 4), "f4"))

    def up(params, x):
        return jax.lax.conv_general_dilated(
            *(x, params["w"][..., ::-1], (1, 1), [(2, 3), (4, 1)]),
            lhs_dilation=(2, 3),
            rhs_dilation=(3, 1),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=3,
        )

    plan = fc.make_plan(up, params, x, to="dense", rules=["w=phases"])
    assert [(layer.case, layer.base) for layer in plan.values()] == [
        ("grouped", "phases")
    ]
    got = fc.convert_model(up, plan)(fc.convert_params(params, plan), x)
    np.testing.assert_array_equal(got, up(params, x))
    assert fc.verify(up, params, x, plan=plan, progress=False).passed


def test_a_rule_of_phases_leaves_other_layers_to_the_trace():
    model = nn.Conv(3, (2, 2))
    plan = fc.make_plan(model, X, to="dense", rules=["*=phases"])
    assert len(plan) == 0
    assert "phases" not in next(iter(plan.skipped.values()))


def test_gradients_of_convolutions_are_not_layers():
    """A strided convolution's gradient is a transposed one, with the same kernel."""
    params = {"w": integers(np.zeros((3, 3, 6, 4), "f4"))}

    def energy(params, x):
        y = jax.lax.conv_general_dilated(
            *(x, params["w"], (2, 2), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return (y**2).sum()

    def force(params, x):
        return jax.grad(energy, 1)(params, x)

    assert "lhs_dilation=(2" in str(jax.make_jaxpr(force)(params, X))
    plan = fc.make_plan(force, params, X, to="dense", rules=["w=phases"])
    assert len(plan) == 0
    assert "Padding" in plan.skipped["w"]

    def pull(params, x):
        """The gradient of a transposed convolution, beside the layer itself."""

        def up(x):
            return jax.lax.conv_transpose(x, params["w"][:, :, :4], (2, 2), "SAME")

        y, back = jax.vjp(up, x)
        return back(y * y)[0]

    small = {"w": integers(np.zeros((3, 3, 4, 6), "f4"))}
    x = integers(np.zeros((2, 3, 5, 4), "f4"))
    plan = fc.make_plan(pull, small, x, to="dense", rules=["w=phases"])
    assert [layer.base for layer in plan.values()] == ["phases"]
    got = fc.convert_model(pull, plan)(fc.convert_params(small, plan), x)
    np.testing.assert_array_equal(got, pull(small, x))


def test_an_explicit_mesh_refuses_transposed_layers_by_name():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    for window in (2, 3):
        model = nn.ConvTranspose(4, (window, window), (2, 2), use_bias=False)
        variables = model.init(jax.random.key(1), X)
        plan = fc.make_plan(model, X, to="dense", rules=["*=phases"])
        moved = fc.convert_params(variables, plan)
        with jax.set_mesh(mesh):
            x = jax.device_put(X, jax.P("batch"))
            with pytest.raises(fc.PlanError, match="without explicitly sharded axes"):
                fc.convert_model(model, plan).apply(moved, x)
