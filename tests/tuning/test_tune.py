"""The choice of forms, layouts and options: its logic, and that it changes nothing."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fcconv_jax as fc
from fcconv_jax.backends.compilation import Program
from fcconv_jax.backends.options import known_options
from fcconv_jax.messages.errors import BackendError
from fcconv_jax.plan import Plan
from fcconv_jax.plan.tuning import Figure, Tuning
from fcconv_jax.tuning import meters, tune
from fcconv_jax.tuning.layers import _in_context, _ways, products_in

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 8, 4, 3)), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (2, 2), (2, 2), padding="VALID", name="patches")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(nn.Conv(8, (3, 3), name="body")(x))
        x = nn.Dense(5, name="each")(x)
        return nn.Dense(4, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(0), X)


def figure(median, spread=0.0):
    return Figure(median, median * (1 - spread), median * (1 + spread))


class Meter:
    """Stands for a device on which each form takes as long as it is told."""

    def __init__(self, first, again=None, alone=None):
        self.found = {"": first, "again": again or first, "alone": alone or first}

    def measure(self, candidates, seconds, again="", settle=False):
        assert seconds > 0
        assert settle == bool(again)
        return {name: self.found[again][name] for name in candidates}


def choose(first, again=None, plainness=None, alone=None):
    order = plainness or range(len(first))
    forms = {
        name: tune._Variant(
            Plan("conv"), tuple((f"option{i}", 1) for i in range(options))
        )
        for name, options in zip(first, order)
    }
    meter = Meter(first, again, alone)
    race = tune._Race(forms, lambda form: None, meter, lambda *told: None)
    race.choose(1.0)
    race.confirm(1.0)
    return race.choice


def test_what_wins_beyond_the_noise_is_taken():
    assert choose({"own": figure(10), "a": figure(8), "b": figure(5)}) == "b"
    assert choose({"own": figure(10), "a": figure(12)}) == "own"
    assert choose({"own": figure(10, 0.1), "a": figure(9, 0.1)}) == "own"
    assert choose({"own": figure(10, 0.1), "a": figure(8, 0.1)}) == "a"


def test_of_two_as_good_the_plainer_is_taken():
    times = {"own": figure(10), "a": figure(5.0), "b": figure(5.05)}
    assert choose(times, plainness=[0, 2, 1]) == "b"
    assert choose(times, plainness=[0, 1, 2]) == "a"


def test_what_does_not_win_again_is_not_taken():
    times = {"own": figure(10), "a": figure(5)}
    assert choose(times, again={"own": figure(6), "a": figure(6)}) == "own"
    assert choose(times, again={"own": figure(6), "a": figure(5)}) == "a"


def test_what_may_win_among_many_is_measured_alone():
    noisy = {"own": figure(10, 0.1), "a": figure(9, 0.1)}
    clear = {"own": figure(10), "a": figure(9)}
    assert choose(noisy, again=clear, alone=clear) == "a"
    assert choose(noisy, again=clear) == "own"
    assert choose(noisy, again=noisy, alone=clear) == "own"
    little = {"own": figure(10, 0.1), "a": figure(9.9, 0.1)}
    assert choose(little, again=clear, alone=clear) == "own"


def test_a_gain_of_slow_programs_gets_the_rounds_to_show(monkeypatch):
    """One of 15 rounds is disturbed: with 5, that round would have hidden the gain."""
    now = {"time": 0.0}
    rounds = {"own": 0, "dense": 0}

    def runner(name, seconds):
        def run():
            rounds[name] += 1
            disturbed = name == "dense" and rounds[name] == 4
            now["time"] += seconds * (1.5 if disturbed else 1)

        return run

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now["time"])
    runs = {"own": runner("own", 3.0), "dense": runner("dense", 2.85)}
    found = meters.race(runs, 1.0)
    assert not found["dense"].beats(found["own"])
    rounds |= {"own": 0, "dense": 0}
    found = meters.race(runs, 1.0, settle=True)
    assert found["dense"].beats(found["own"])
    assert rounds["own"] == rounds["dense"] < 16  # settled before the last round
    rounds |= {"own": 0, "dense": 0}
    runs = {"own": runner("own", 3.0), "dense": runner("dense", 3.0)}
    found = meters.race(runs, 1.0, settle=True)
    assert not found["dense"].beats(found["own"])
    assert rounds["own"] == 16  # the first is not counted


def test_what_gains_little_is_not_taken():
    assert choose({"own": figure(10), "a": figure(9.9)}) == "own"
    times = {"own": figure(10), "a": figure(5)}
    assert choose(times, again={"own": figure(6), "a": figure(5.9)}) == "own"


def test_slow_programs_leave_the_race(monkeypatch):
    now = {"time": 0.0}
    cost = {"first": 0.12, "quick": 0.1, "as good": 0.101, "slower": 0.11}
    cost |= {"slow": 0.2, "hopeless": 30.0}
    runs = dict.fromkeys(cost, 0)

    def runner(name):
        def run():
            runs[name] += 1
            now["time"] += cost[name]

        return run

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now["time"])
    found = meters.race({name: runner(name) for name in runs}, seconds=4.0)
    assert runs["hopeless"] == 1  # a minute of it would tell no more
    assert runs["slow"] == 4  # by chance at first, perhaps
    assert runs["slower"] == 6  # settled, although others take much longer
    assert runs["first"] == runs["quick"] == runs["as good"] >= 8
    for name, ms in cost.items():
        assert found[name].median == pytest.approx(1e3 * ms)
        assert found[name].low == pytest.approx(found[name].high)


def test_opponents_make_nothing_leave(monkeypatch):
    now = {"time": 0.0}
    cost = {"own": 0.1, "other": 0.11, "opponent": 0.01, "slow opponent": 0.3}

    def runner(name):
        def run():
            now["time"] += cost[name]

        return run

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now["time"])
    runs = {name: runner(name) for name in cost}
    opponents = ("opponent", "slow opponent")
    times = meters.race_times(runs, 4.0, opponents=opponents)
    assert len(times["own"]) == len(times["other"]) == len(times["opponent"]) > 10
    assert len(times["slow opponent"]) == 3


def test_apart_each_run_follows_its_own():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = meters.race_times(runs, 0.0, apart=1e-4)
    rounds = max(map(len, times.values()))
    assert order[:6] == ["a", "b", "a", "a", "b", "b"]  # one run each, then in pairs
    assert rounds >= 5


def test_each_starts_a_round_as_often():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    meters.race_times(runs, 0.0)
    assert "".join(order).startswith("abc" + "abcbcacab")


def test_the_interval_is_that_of_the_median():
    found = Figure.of(range(1, 102))
    assert (found.median, found.low, found.high) == (51, 41, 61)
    few = Figure.of([3.0, 1.0, 2.0])
    assert (few.median, few.low, few.high) == (2.0, 1.0, 3.0)


def busy_rounds(seed, gain, rounds=11):
    """Two programs on a busy machine, where rounds differ more than the programs."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0.0, 0.7, rounds)
    own = rng.lognormal(0.0, 0.03, (2, rounds))
    before, after = own * load * [[1.0], [gain]]
    return before, after


def test_rounds_of_a_race_are_compared_in_pairs():
    paired = alone = 0
    for seed in range(100):
        before, after = busy_rounds(seed, gain=0.9)
        paired += Figure.of(after).beats(Figure.of(before))
        alone += Figure.of(after, "one").beats(Figure.of(before, "another"))
    assert paired > 90
    assert alone < 10


def test_noise_alone_seldom_wins():
    won = 0
    for seed in range(400):
        before, after = busy_rounds(seed, gain=1.0)
        won += Figure.of(after).beats(Figure.of(before))
    assert won < 0.04 * 400


@pytest.fixture
def rigged(monkeypatch):
    """Timings by what is in a program: convolutions cost, but for those 3x3."""

    def present(self, candidates, lowered, *_):
        del self, candidates
        return {key: figure(*self_cost(low.as_text())) for key, low in lowered.items()}

    def self_cost(text):
        dots = text.count("stablehlo.dot_general")
        convolutions = text.count("stablehlo.convolution")
        return 1 + dots + 10 * convolutions, 0.01

    monkeypatch.setattr(meters.Meter, "_present", present)


def test_both_directions_at_once_and_only_what_wins(rigged, variables):
    plan = fc.tune(Net(), variables, X, progress=False)
    assert plan.to == "dense"
    assert list(plan) == ["patches"]
    assert "Padding" in plan.skipped["body"]
    assert plan.skipped["each"] == "its original form is as good or better"
    assert plan.tuning.ratio < 1
    lines = str(plan.tuning).splitlines()
    assert lines[0].startswith(f"{plan.tuning.ratio:.2f}x: ")
    assert any(line.startswith("patches  Conv 2x8x4x3 by") for line in lines)
    assert any(line.startswith("body") and "Padding" in line for line in lines)


def test_layers_are_tried_in_the_company_of_the_others(monkeypatch, variables):
    """Alone `each` is best as it is; in the model it is better as a convolution."""

    def present(self, candidates, lowered, *_):
        del self, candidates
        return {key: cost(low.as_text()) for key, low in lowered.items()}

    def cost(text):
        convolutions = [line for line in text.splitlines() if "convolution(" in line]
        ms = 1 + 0.1 * len(convolutions)
        if "rsqrt" in text:  # the whole model
            ms -= 0.5 * any("1x1x8x5x" in line for line in convolutions)
        return figure(ms, 0.01)

    monkeypatch.setattr(meters.Meter, "_present", present)
    told = []
    plan = fc.tune(Net(), variables, X, progress=lambda *step: told.append(step[0]))
    assert {path: layer.to for path, layer in plan.items()} == {
        "patches": "dense",
        "each": "conv",
    }
    assert plan.tuning.choice == "refined"
    assert plan.tuning.ratio == pytest.approx(0.7 / 1.2)
    rows = {row.paths[0]: row for row in plan.tuning.layers}
    assert rows["each"].choice.startswith("conv ")
    assert rows["each"].gain == pytest.approx(1.1)  # alone
    assert rows["head"].choice == "dense"
    assert any(step.startswith("in the model: ") for step in told)
    assert fc.verify(Net(), variables, X, plan=plan, progress=False).passed
    short = fc.tune(Net(), variables, X, budget=0.0, progress=False)
    assert "refined" not in dict(short.tuning.programs)


@pytest.mark.parametrize("kind", ["linen", "function", "nnx"])
def test_the_tuned_model_is_the_same(kind, variables, tmp_path):
    if kind == "nnx":
        model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.relu)
        params = nnx.state(model, nnx.Param)
    elif kind == "function":
        model, params = (lambda params, x: jnp.tanh(x @ params["w"])), {"w": X[0, 0].T}
    else:
        model, params = Net(), variables
    file = tmp_path / "timings.json"
    arguments = {"budget": 2.0, "timings": file, "progress": False}
    plan = fc.tune(model, params, X, **arguments)
    content = file.read_text()
    assert fc.tune(model, params, X, **arguments) == plan
    assert file.read_text() == content
    assert fc.verify(model, params, X, plan=plan, progress=False).passed
    assert plan.tuning.ratio <= 1
    assert bool(plan or plan.options) != bool(plan.tuning.why)
    if kind == "nnx":  # jitted by the user, who would not know of them
        assert not plan.options
        assert not any("xla" in name for name, _ in plan.tuning.programs)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.tuning == plan.tuning
    assert str(again) == str(plan)


def test_tied_layers_go_together(monkeypatch):
    """Alone the larger of two is better as it is, and they have one kernel."""

    class Tied(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = nnx.Linear(3, 3, rngs=rngs)
            self.second = nnx.Linear(3, 3, rngs=rngs)
            self.second.kernel = self.first.kernel
            self.third = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            x = self.third(self.first(x))
            return self.second(jnp.concatenate([x, x]))

    def present(self, candidates, lowered, *_):
        texts = {key: low.as_text() for key, low in lowered.items()}
        return {
            key: figure(10 - text.count("stablehlo.convolution"), 0.001)
            for key, text in texts.items()
        }

    monkeypatch.setattr(meters.Meter, "_present", present)
    model = Tied()
    plan = fc.tune(model, None, X, progress=False)
    assert set(plan) == {"first", "second", "third"}
    assert fc.verify(model, None, X, plan=plan, progress=False).passed
    rows = {row.paths: row.choice for row in plan.tuning.layers}
    assert rows["first",] == rows["second",] == "tied to a layer unlike it"
    assert rows["third",].startswith("conv")
    left = fc.tune(model, None, X, rules=["first=skip"], progress=False)
    assert set(left) == {"third"}


def test_rules_leave_layers_alone(variables):
    rules = ["patches=skip", "head=skip"]
    plan = fc.tune(Net(), variables, X, rules=rules, objective="memory", progress=False)
    measured = {path for layer in plan.tuning.layers for path in layer.paths}
    assert measured == {"each"}
    assert "excluded by rule" in dict(plan.tuning.left)["head"]
    with pytest.raises(fc.PlanError, match="nowhere"):
        fc.tune(Net(), variables, X, rules=["nowhere=skip"], progress=False)


def test_a_plan_of_options_alone(variables):
    options = (("xla_cpu_enable_fast_min_max", True),)
    plan = Plan("conv", options=options)
    converted = fc.convert_model(Net(), plan)
    got = converted.apply(variables, X)
    np.testing.assert_allclose(got, Net().apply(variables, X), rtol=1e-5, atol=1e-5)
    # Within another jit it is that jit's options that count.
    for outer in (
        jax.jit(converted.apply),
        jax.jit(lambda *_: converted.apply(variables, X)),  # constants, too
        lambda *args: lax.map(lambda _: converted.apply(*args), jnp.zeros(1))[0],
        jax.vmap(converted.apply, in_axes=(None, None), axis_size=1, out_axes=None),
    ):
        np.testing.assert_allclose(outer(variables, X), got, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda v: converted.apply(v, X).sum())(variables)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables)
    # JAX shows which options a program was compiled with by refusing unknown ones.
    with pytest.warns(RuntimeWarning, match="xla_no_such_option.*Tune again"):
        assert known_options([("xla_no_such_option", 1)]) == {}
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(plan) != hash(Plan("conv"))
    assert "compiled with xla_cpu_enable_fast_min_max=True" in str(plan)


def test_scanned_layers_are_measured_in_a_loop():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3, name="fc")(x), None

    looped = nn.scan(
        Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    plan = fc.make_plan(looped, X, None)
    layer = plan["fc"]
    assert layer.stack_axes == (0,)
    ways = _ways(layer, jnp.float32)
    assert list(ways) == ["dense", "conv flat", "conv fold", "conv keep"]
    for _, program in ways.values():
        assert (
            "stablehlo.while"
            in jax.jit(program.function).lower(*program.args).as_text()
        )
    args = [
        jnp.asarray(RNG.normal(size=a.shape), a.dtype) for a in ways["dense"][1].args
    ]
    want = args[0] @ args[1] + args[2]
    np.testing.assert_allclose(ways["dense"][1].function(*args), want, rtol=1e-5)
    alone = Program(lambda x: x, (X,))
    unlooped = fc.make_plan(nn.Dense(3), X)[""]
    assert _in_context(alone, unlooped) is alone


def test_a_convolution_in_a_loop_is_tried_as_a_matmul():
    def model(params, x):
        def step(_, x):
            return lax.conv_general_dilated(
                x, params["w"], (1,), "VALID", dimension_numbers=("NCW", "OIW", "NCW")
            )

        return lax.fori_loop(0, 2, step, x)

    params, x = {"w": jnp.ones((4, 4, 1)) / 4}, jnp.ones((2, 4, 8))
    plan = fc.tune(model, params, x, budget=0.5, progress=False)
    assert "all to dense" in dict(plan.tuning.programs)
    assert fc.verify(model, params, x, plan=plan, progress=False).passed


def test_what_cannot_be_measured_is_refused(variables):
    with pytest.raises(
        BackendError, match=r'cycles are estimated.*objective="latency"'
    ):
        fc.tune(Net(), variables, X, objective="cycles", progress=False)
    with pytest.raises(BackendError, match="rocm"):
        fc.tune(Net(), variables, X, backend="rocm", progress=False)
    with pytest.raises(fc.PlanError, match="'training', got 'speed'"):
        fc.tune(Net(), variables, X, objective="speed", progress=False)  # pyright: ignore
    abstract = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.raises(TypeError, match="Expected arrays to run on cpu"):
        fc.tune(Net(), variables, abstract, progress=False)


def test_layers_measured_before_need_no_time(rigged, variables, tmp_path):
    options = {"timings": tmp_path / "t.json", "progress": False}
    first = fc.tune(Net(), variables, X, budget=60.0, **options)
    later = fc.tune(Net(), variables, X, budget=0.0, **options)
    assert first.tuning is not None
    assert later.tuning is not None
    assert [row.figures for row in later.tuning.layers] == [
        row.figures for row in first.tuning.layers
    ]


def test_the_costly_layers_come_first_when_time_is_short(rigged, variables):
    told = []
    plan = fc.tune(
        Net(), variables, X, budget=0.0, progress=lambda *step: told.append(step[0])
    )
    assert {layer.choice for layer in plan.tuning.layers} == {"no time to measure it"}
    # The whole model is measured in each form all the same.
    assert list(plan) == ["patches"]
    assert any(step.startswith("layers: ") for step in told)
    assert any(step.startswith("whole model: ") for step in told)


def test_the_record_reads_what_it_wrote(rigged, variables):
    tuning = fc.tune(Net(), variables, X, progress=False).tuning
    assert Tuning.from_content(json.loads(json.dumps(tuning.content()))) == tuning
    damaged = json.loads(fc.tune(Net(), variables, X, progress=False).to_json())
    del damaged["tuning"]["layers"]
    with pytest.raises(fc.PlanError, match="damaged"):
        Plan.from_json(json.dumps(damaged))


@pytest.mark.parametrize(
    ("model", "shape", "products"),
    [
        (nn.Dense(3), (2, 4), 2 * 4 * 3),
        (nn.Conv(6, (2, 2), (2, 2), padding="VALID"), (2, 4, 8, 3), 16 * 12 * 6),
        (nn.Conv(5, (1, 1), (2, 2)), (2, 4, 6, 3), 12 * 3 * 5),
        (nn.Conv(6, (1, 1), feature_group_count=3), (2, 4, 4, 3), 32 * 6),
        (nn.ConvTranspose(5, (2, 3), (2, 3)), (2, 3, 4, 6), 24 * 6 * 6 * 5),
        (nn.ConvTranspose(5, (4, 4), (2, 2)), (2, 3, 4, 6), 24 * 6 * 16 * 5),
    ],
)
def test_costly_layers_are_those_of_many_products(model, shape, products):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (layer,) = (
        fc.make_plan(model, x)
        or fc.make_plan(model, x, to="dense", rules=["*=phases", "*=auto"])
    ).values()
    assert products_in(layer) == products
