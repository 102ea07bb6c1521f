import collections
import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from _pytest.doctest import DoctestModule
from flax.core import meta

import fcconv_jax as fc
from fcconv_jax.backends.resolution import resolve
from fcconv_jax.verification.agreement import named_leaves, working_errors
from fcconv_jax.verification.perturbed import PERTURBED, perturbed_by_an_ulp
from fcconv_jax.verification.reading import Reading

# Marked `versions`: modules that touch what releases of JAX, Flax and Orbax change most
# (tracing, modules, trees, checkpoint handlers, strict modes), and two tests of every
# other module. `.ci/run` runs these on the oldest and the newest versions.
VERSIONS = (
    "checkpoints/test_orbax.py",
    "frontends/linen/test_model.py",
    "frontends/nnx/test_model.py",
    "params/test_trees.py",
    "test_public.py",
    "test_strict_switches.py",
    "tracing/test_jaxprs.py",
)

# The tests that take over a second of CPU time, a line each; those marked `versions`
# may take four. `pytest -n 2 --list-slow` measures all that run and writes the list.
SLOW = Path(__file__).parent / "slow.txt"
_SECONDS, _SECONDS_OF_VERSIONS = 1, 4


def needs(package, version):
    """Skips a test on earlier versions of a package, which lack what it is about."""
    have = importlib.metadata.version(package)
    older = tuple(map(int, have.split(".")[:3])) < tuple(map(int, version.split(".")))
    return pytest.mark.skipif(older, reason=f"needs {package} {version}, got {have}")


def one_in(number, cases):
    """The cases of a parameter; one in so many runs without ``-m slow``."""
    return [
        case if n % number == 0 else pytest.param(case, marks=pytest.mark.slow)
        for n, case in enumerate(cases)
    ]


def pytest_configure(config):
    """Keeps what XLA compiles: both workers share it, and a second run is quicker."""
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)


def pytest_addoption(parser):
    parser.addoption(
        "--list-slow",
        action="store_true",
        help="write tests/slow.txt by what tests take",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path):
    """Collects no doctests of tests: they hide that a module fails to import."""
    return [x for x in (yield) if not isinstance(x, DoctestModule)]


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    counts = collections.Counter()
    listed_slow = set()
    if not config.getoption("--list-slow"):
        listed_slow.update(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid.removeprefix("tests/") in listed_slow:
            item.add_marker(pytest.mark.slow)
        slow = item.get_closest_marker("slow")
        if slow is None and item.path.is_relative_to(here):
            counts[item.path] += 1
            listed = item.path.relative_to(here).as_posix() in VERSIONS
            if listed or counts[item.path] <= 2:
                item.add_marker(pytest.mark.versions)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Measures the CPU time of a test and of the processes that it starts."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu", sum(os.times()[:4]) - before))


_cpu_seconds = {}


def pytest_runtest_logreport(report):
    # Not yet for a subtest, which is reported before its test has ended.
    seconds = dict(report.user_properties).get("cpu")
    if seconds is None or report.when != "call":
        return
    if report.nodeid.startswith("tests/"):
        versions = "versions" in report.keywords
        most = _SECONDS_OF_VERSIONS if versions else _SECONDS
        _cpu_seconds[report.nodeid] = seconds / most


def pytest_sessionfinish(session):
    worker = hasattr(session.config, "workerinput")
    if session.config.getoption("--list-slow") and not worker:
        slow = sorted(name for name, share in _cpu_seconds.items() if share > 1)
        SLOW.write_text("".join(f"{each.removeprefix('tests/')}\n" for each in slow))


_missing_extras = set()


def pytest_report_teststatus(report):
    """Counts the tests of a module that need the same missing extra as one skip."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        module = report.nodeid.partition("::")[0]
        if "pip install" in reason:
            if (module, reason) in _missing_extras:
                return "", "", ""
            _missing_extras.add((module, reason))
    return None


def integers(tree, seed=0, high=3):
    """Arrays of small integers in the shapes of a tree: sums of products are exact."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        values = rng.integers(-high, high, leaf.shape, endpoint=True)
        return np.asarray(values).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


def same_bits(a, b):
    """Whether two trees are equal in structure, shapes, dtypes and bits."""
    (x, tx), (y, ty) = jax.tree.flatten(a), jax.tree.flatten(b)
    return tx == ty and all(
        p.shape == q.shape and p.dtype == q.dtype and p.tobytes() == q.tobytes()
        for p, q in zip(map(np.asarray, x), map(np.asarray, y))
    )


@pytest.fixture
def assert_close():
    """Asserts that ``got`` is as close to ``f(*args)`` in float64 as ``f`` itself is.

    No worse than twice its error, and a few units in the last place.
    """

    def run(got, f, *args):
        jaxpr, out = jax.make_jaxpr(f, return_shape=True)(*args)
        outputs, _ = Reading(jaxpr)(jax.tree.leaves(args))
        reference = jax.tree.unflatten(jax.tree.structure(out), outputs)
        runs = [
            f(*args),
            *(f(*perturbed_by_an_ulp(args, seed)) for seed in range(PERTURBED)),
        ]
        leaves = [jax.tree.leaves(each) for each in runs]
        errors = working_errors(
            "outputs", named_leaves(reference, "output"), leaves, jax.tree.leaves(got)
        )
        assert [f"{e.path}: {e.reason}" for e in errors if not e.passed] == []

    return run


@pytest.fixture(scope="module")
def device(request):
    """The device that a module's ``BACKEND`` names; the module is skipped without."""
    found = resolve(request.module.BACKEND)
    if found.how != "executed":
        pytest.skip(
            f"no {request.module.BACKEND} device is present (JAX_PLATFORMS hides those "
            "it leaves out)"
        )
    with jax.default_device(found.device):
        yield found.device


@pytest.fixture
def verify_there(device, request):
    """Verifies a model on that device, in the default layouts or in its own."""

    def run(model, params, x, backend):
        plan = fc.make_plan(model, x, backend=backend)
        there = [request.module.BACKEND]
        report = fc.verify(model, params, x, plan=plan, backends=there)
        assert report.passed, str(report)
        (found,) = report.backends
        assert found.how == "executed"
        assert all(found.milliseconds[form] > 0 for form in ("dense", "conv"))

    return run


@dataclasses.dataclass(frozen=True)
class Case:
    plan: fc.Plan
    model: Any
    converted: Any
    variables: Any
    moved: Any
    output: Any
    moved_output: Any


@pytest.fixture
def check_there(fcconv_backend, assert_equivalent):
    """Checks a conversion on the backend that the test runs for.

    Does nothing on JAX's default one: there each test compares both forms itself.
    """

    def run(model, params, *inputs, **options):
        if fcconv_backend != jax.default_backend():
            assert_equivalent(model, params, *inputs, gradients=False, **options)

    return run


@pytest.fixture
def check(check_there, assert_close):
    """Plans a linen model and checks all that must hold for every plan.

    The plan survives JSON and its inverse, params go there and back to the bit, the
    converted init has the converted shapes, and both forms give the same output: to
    the bit, or up to rounding for models that do not keep integers integers.
    """

    def run(model, *inputs, to="conv", rules=(), plan=None, exact=True, **kwargs):
        key = jax.random.key(0)
        plan = plan or fc.make_plan(model, *inputs, to=to, rules=rules, **kwargs)
        assert fc.Plan.from_json(plan.to_json()) == plan
        assert hash(fc.Plan.from_json(plan.to_json())) == hash(plan)
        assert plan.inverse().inverse() == plan
        assert all((path or "(root)") in str(plan) for path in plan)
        inputs = integers(inputs)
        init = jax.eval_shape(lambda: model.init(key, *inputs, **kwargs))
        boxed = jax.tree.map(
            lambda x: isinstance(x, meta.AxisMetadata),
            init,
            is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
        )
        assert not any(jax.tree.leaves(boxed)), "planning left its boxes behind"
        variables = {
            name: integers(tree, seed=1)
            if name == "params"
            else jax.tree.map(lambda s: np.ones(s.shape, s.dtype), tree)
            for name, tree in init.items()
        }
        moved = fc.convert_params(variables, plan)
        assert same_bits(fc.restore_params(moved, plan), variables)
        converted = fc.convert_model(model, plan)
        there = jax.eval_shape(lambda: converted.init(key, *inputs, **kwargs))
        assert jax.tree.map(lambda a: (a.shape, a.dtype), there) == jax.tree.map(
            lambda a: (a.shape, a.dtype), fc.convert_params(init, plan)
        )

        def apply(variables, *inputs):
            return model.apply(variables, *inputs, **kwargs)

        y = jax.jit(apply)(variables, *inputs)
        z = converted.apply(moved, *inputs, **kwargs)
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(z), strict=True):
            assert a.dtype == b.dtype
            if exact:
                np.testing.assert_array_equal(a, b)
        if not exact:
            assert_close(z, apply, variables, *inputs)
        check_there(model, variables, *inputs, plan=plan, **kwargs)
        return Case(plan, model, converted, variables, moved, y, z)

    return run
