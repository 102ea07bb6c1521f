"""Messages on calls with unexpected arguments."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import fcconv_jax as fc


class Net(nn.Module):
    """A head behind a flatten."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


class Branches(nn.Module):
    """Decides by a value."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if x.sum() > 0:
            return x
        return -x


class NnxBranches(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        self.dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = self.dense(x)
        return float(x.sum()) * x


def branches(params, x):
    return [x, x @ params][int((x @ params).sum() > 0)]


def divides(params, x):
    return x.shape[0] % (x.shape[1] - 4)


MODEL, X = Net(), jnp.ones((2, 4, 3, 2))
VARIABLES = MODEL.init(jax.random.key(0), X)
PLAN = fc.make_plan(MODEL, X)
CONVERTED = fc.convert_model(MODEL, PLAN)
MOVED = fc.convert_params(VARIABLES, PLAN)


def test_inputs_of_another_size():
    other = jnp.ones((2, 5, 3, 2))
    with pytest.raises(fc.PlanError, match=r"\(30, 5\).*\(24, 5\).*'head': \(2, 24\)"):
        CONVERTED.apply(MOVED, other)
    with pytest.raises(
        fc.PlanError,
        match=r"expected shape \(30, 5\), got shape \(24, 5\)\. .*another size",
    ):
        fc.convert_params(VARIABLES, fc.make_plan(MODEL, other))


def test_what_was_never_converted_and_what_is_already():
    never = r"in this form already, converted before or never"
    with pytest.raises(fc.PlanError, match=never):
        fc.restore_params(VARIABLES, PLAN)
    with pytest.raises(fc.PlanError, match=never):
        fc.convert_params(MOVED, PLAN)
    with pytest.raises(
        fc.PlanError, match=r"Expected converted params, .* Pass convert_params"
    ):
        CONVERTED.apply(VARIABLES, X)


@pytest.mark.parametrize("cls", [Net, nnx.Linear])
def test_a_class_in_the_place_of_a_model(cls):
    with pytest.raises(TypeError, match=rf"got the class {cls.__name__}\. Pass an"):
        fc.make_plan(cls, X)


def test_a_converted_model():
    with pytest.raises(TypeError, match=r"got a converted Net\. Pass its"):
        fc.make_plan(CONVERTED, X)
    with pytest.raises(TypeError, match=r"Call apply\(variables, \.\.\.\)"):
        CONVERTED(X)


@pytest.mark.parametrize("inputs", [(VARIABLES,), (VARIABLES, X)])
def test_variables_among_the_inputs(inputs):
    with pytest.raises(fc.PlanError, match=r"got a dict\. .* alone, without params"):
        fc.make_plan(MODEL, *inputs)


@pytest.mark.parametrize(
    ("model", "inputs", "line"),
    [
        (Branches(), (jnp.ones((2, 4)),), "if x.sum() > 0"),
        (NnxBranches(), (jnp.ones((2, 4)),), "return float(x.sum()) * x"),
        (branches, (jnp.ones((4, 4)), jnp.ones((2, 4))), "return [x, x @ params]"),
    ],
    ids=["linen", "nnx", "function"],
)
def test_a_model_that_branches_on_values(model, inputs, line):
    with pytest.raises(jax.errors.JAXTypeError) as caught:
        fc.make_plan(model, *inputs)
    (note,) = [n for n in caught.value.__notes__ if "jax.lax.cond" in n]
    assert note.startswith(f"test_messages.py:{note.split(':')[1]}: {line}")


def test_a_branch_that_only_the_converted_call_takes():
    def switched(params, x, flag):
        y = x @ params
        return y if flag else -y

    params, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    plan = fc.make_plan(switched, params, x, True)
    converted = fc.convert_model(switched, plan)
    moved = fc.convert_params(params, plan)
    assert converted(moved, x, False).shape == (2, 3)
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        converted(moved, x, jnp.asarray(True))
    assert "return y if flag else -y" in "".join(caught.value.__notes__)


def test_a_shape_in_the_place_of_an_array():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    message = r"got the tuple \(4, 8\). Pass jax.ShapeDtypeStruct\(\(4, 8\), jnp.float"
    with pytest.raises(fc.PlanError, match=message):
        fc.make_plan(Net(), (4, 8))


def test_a_model_that_is_converted_already():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    plan = fc.make_plan(model, x)
    converted = fc.convert_model(model, plan)
    for again in (plan, plan.inverse()):
        with pytest.raises(fc.PlanError, match="n't converted yet, got one with ''"):
            fc.convert_model(converted, again)
    params = {"w": jnp.ones((4, 3))}

    def function(params, x):
        return x @ params["w"]

    plan = fc.make_plan(function, params, x)
    with pytest.raises(fc.PlanError, match="n't converted yet, got one with 'w'"):
        fc.convert_model(fc.convert_model(function, plan), plan)
    with pytest.raises(fc.PlanError, match=r"^Expected a Plan, got str\."):
        fc.convert_model(model, "plan")


def test_a_model_in_the_place_of_its_params():
    x = jnp.ones((2, 4))
    linen, held = nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    for model, fix in ((linen, "its variables"), (held, r"nnx.state\(model\)")):
        plan = fc.make_plan(model, x)
        with pytest.raises(fc.PlanError, match=f"the model .*Pass {fix}, or convert"):
            fc.convert_params(model, plan)


def test_errors_of_flax_get_a_fix():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    model, x = Norm(), jnp.ones((2, 4))
    variables, plan = model.init(jax.random.key(0), x), fc.make_plan(model, x)
    with pytest.raises(flax.errors.ModifyScopeVariableError) as caught:
        fc.verify(model, variables, x, train=True)
    assert "Call it as for inference" in "".join(caught.value.__notes__)
    converted = fc.convert_params(variables, plan)
    with pytest.raises(flax.errors.ScopeParamShapeError) as caught:
        fc.export(model, converted, x, path="m.stablehlo")
    assert "restore_params(params, plan) restores" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("model", [nn.Dense(3), lambda params, x: x @ params])
def test_only_nnx_models_convert_in_place(model):
    x = jnp.ones((2, 4))
    args = (x,) if isinstance(model, nn.Module) else (jnp.ones((4, 3)), x)
    plan = fc.make_plan(model, *args)
    name = type(model).__name__
    with pytest.raises(TypeError, match=f"NNX model for inplace=True, got a {name}"):
        fc.convert_model(model, plan, inplace=True)


TX = optax.adam(1e-3)
NNX = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
STATE = TrainState.create(apply_fn=MODEL.apply, params=VARIABLES["params"], tx=TX)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fc.make_plan(MODEL), r"the inputs of the call, got none .*Pass"),
        (lambda: fc.make_plan(MODEL, [[1, 2]]), r"got a list\. Pass numpy.asarray"),
        (
            lambda: fc.make_plan(MODEL, np.array([[None]])),
            r"one of Python objects\. Pas",
        ),
        (lambda: fc.make_plan(NNX, {"params": {}}, X), r"called on alone, without par"),
        (
            lambda: fc.verify(MODEL, VARIABLES, PLAN, X),
            r"got a Plan\. Pass .* plan=plan",
        ),
        (lambda: fc.verify(MODEL, STATE, X), r"got a TrainState\. Pass state\.params"),
        (lambda: fc.restore_params(PLAN, VARIABLES), r"Expected a Plan, got .*dict"),
        (
            lambda: jax.jit(lambda x: fc.verify(MODEL, VARIABLES, x))(X),
            r"t be traced\.",
        ),
        (lambda: fc.make_plan(MODEL, "2,4"), r"got a str\. Pass numpy.asarray"),
        (lambda: fc.make_plan(MODEL.apply, X), r"Pass the model itself"),
        (lambda: fc.make_plan(MODEL, X, method="run"), r"name of Net, got 'run'"),
        (lambda: fc.make_plan(divides, X, X), r"got 0 from .*\(2, 4, 3, 2\)"),
        (lambda: fc.make_plan(MODEL, X, rules=[5]), r"text such as 'head=7x7', got 5"),
        (
            lambda: fc.make_plan(MODEL, X, rules=[fc.Rule("head", to="both")]),  # pyright: ignore
            r"expected to='conv' or to='dense', got 'both'",
        ),
        (
            lambda: fc.convert_opt_state(
                TX.init(VARIABLES), PLAN, tx="adam", params=VARIABLES
            ),  # pyright: ignore
            r"got str\. Pass the optimizer",
        ),
        (
            lambda: fc.convert_opt_state(
                TX.init(VARIABLES), PLAN, tx=optax.sgd(0.1, 0.9), params=VARIABLES
            ),
            r"another optimizer or of other params looks alike: pass tx=",
        ),
        (lambda: fc.compare(MODEL, MODEL, [X]), r"Module first, got .*\[variables, x"),
        (lambda: fc.Plan.from_json(None), r"text of a plan, got None"),  # pyright: ignore
        (
            lambda: fc.convert_checkpoint(3, "out", PLAN),
            r"path of a checkpoint, got int",
        ),  # pyright: ignore
        (lambda: fc.open_image(None), r"path of an image, got None"),  # pyright: ignore
        (lambda: fc.export(MODEL, VARIABLES, X, path=5), r"path of a file, got 5"),  # pyright: ignore
        (lambda: fc.export(MODEL, VARIABLES, X, path="a\0.onnx"), r"path of a file"),
        (lambda: fc.tune(MODEL, VARIABLES, X, budget="60"), r"got '60'"),  # pyright: ignore
        (lambda: fc.tune(MODEL, VARIABLES, X, timings=5), r"path of a file, got 5"),  # pyright: ignore
        (lambda: fc.tune(MODEL, VARIABLES, X, timeout="1"), r"seconds, got '1'"),  # pyright: ignore
        (lambda: fc.make_plan(MODEL, X, rules=None), r"list of Rule or text"),  # pyright: ignore
        (lambda: fc.make_plan(MODEL, X, rules={"head": (4, 3)}), r"got a dict\. Pass"),  # pyright: ignore
        (lambda: fc.Rule("head", window="4x3"), r"sizes of a window, got '4x3'"),  # pyright: ignore
        (lambda: fc.Rule("head", layout="nchw"), r"one of fold, .* got 'nchw'"),  # pyright: ignore
        (lambda: fc.make_plan(NNX, nnx.state(NNX), X), r"holds its variables\. Pass"),
        (lambda: fc.convert_params(None, PLAN), r"tree of params, got None\. Pass"),
        (lambda: fc.convert_params("a.msgpack", PLAN), r"converts a file"),
        (lambda: fc.convert_params(VARIABLES, PLAN, prefix=3), r"got 3\. Pass 'actor'"),  # pyright: ignore
        (lambda: CONVERTED.apply(X, VARIABLES), r"variables of Net first, got a"),
        (
            lambda: fc.convert_train_state(VARIABLES, PLAN, MODEL),
            r"Expected a TrainState, or a tree with some, got dict",
        ),  # pyright: ignore
        (lambda: fc.convert_train_state(VARIABLES, PLAN, None), r"got NoneType\. Pass"),  # pyright: ignore
        (
            lambda: fc.convert_opt_state(
                TX.init(VARIABLES), PLAN, tx=TX, params=VARIABLES, probe_kwargs=[1]
            ),  # pyright: ignore
            r"dictionary of keywords of tx\.update, got \[1\]",
        ),
        (lambda: fc.verify(MODEL, VARIABLES, X, tx="adam"), r"got str\. Pass the opt"),  # pyright: ignore
        (lambda: fc.explain("pointwise"), r"classify returns, got 'pointwise'"),  # pyright: ignore
        (lambda: fc.fold_norms(MODEL), r"inputs of the call, got none"),
        (lambda: fc.verify_file(5), r"exported file, got 5\. Pass"),  # pyright: ignore
        (
            lambda: fc.slide(MODEL, (4, 3), 1).write(VARIABLES, [1], out=np.zeros(1)),
            r"images with a shape and a dtype .* got list\. Pass",
        ),
    ],
)
def test_mistakes_name_the_fix(call, message):
    with pytest.raises((fc.FcconvError, TypeError), match=message):
        call()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_time_limit_that_is_over_at_once(timeout):
    for call in (fc.verify, fc.tune):
        with pytest.raises(ValueError, match=r"positive number of seconds.* Pass 60"):
            call(MODEL, VARIABLES, X, timeout=timeout)


def test_windows_and_axes_that_are_no_whole_numbers():
    assert fc.slide(MODEL, np.array([4, 3]), np.int64(1)).window == (4, 3)
    with pytest.raises(ValueError, match=r"got \(1\.0, 2\.0\)\. Pass axes=\(1, 2\)"):
        fc.slide(MODEL, (4, 3), 1, axes=(1.0, 2.0))  # pyright: ignore
    with pytest.raises(ValueError, match=r"input_shape: .*, got None"):
        fc.classify(None, 7)  # pyright: ignore
    with pytest.raises(ValueError, match=r"array, got list\. Pass jnp\.asarray"):
        fc.dense_kernel_to_conv([[1.0, 2.0]], 1)  # pyright: ignore


@pytest.mark.parametrize(
    ("option", "value"),
    [("out", "grid.npy"), ("memory", "1GB"), ("resume", True), ("mesh", 2)],
)
def test_options_of_slide_write(option, value):
    grid = fc.slide(lambda x: x.sum((1, 2)), (2, 2), 1)
    given = {"out": np.zeros((2, 3, 2, 2), np.float32), option: value}
    with pytest.raises(ValueError, match=f"{option}: expected"):
        grid.write(X, **given)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("level", "0"), ("level", True), ("region", (0.5, 0, 2, 2))),
        *(("region", "0,0,2,2"), ("bands", 1), ("bands", "1"), ("bands", [1.5])),
    ],
)
def test_options_of_open_image(option, value, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 2)))
    with pytest.raises(fc.ImageError, match=r"a\.npy: expected"):
        fc.open_image(tmp_path / "a.npy", **{option: value})
