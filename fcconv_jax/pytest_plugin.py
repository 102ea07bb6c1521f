"""The pytest plugin: tests of equivalence, once for each backend that is chosen."""

# Every pytest run in an environment with this package loads this file: what is heavy,
# JAX above all, is imported by the fixtures alone.

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from .verification.report import VerifyReport

_PROPERTY = "fcconv_backend"
_DEFAULT = pytest.StashKey[list[str]]()
_HELP = (
    "backends to check conversions on, such as cpu,tpu:v5e,cuda:h100: executed where "
    "the device is present, else compiled ahead of time (default: what is present, "
    "and tpu:v5e and cuda:h100 where their compilers are installed)"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and its twin in the configuration file."""
    group = parser.getgroup("fcconv_jax", "equivalence of converted models")
    group.addoption("--fcconv-backends", metavar="NAMES", help=_HELP)
    parser.addini("fcconv_backends", _HELP, type="args")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse names of backends that do not exist before any test is collected."""
    _chosen(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that asks for ``fcconv_backend`` once for each backend."""
    if "fcconv_backend" not in metafunc.fixturenames:
        return
    own = metafunc.definition.iter_markers("parametrize")
    if any("fcconv_backend" in str(mark.args[:1]) for mark in own):
        return  # the test says for itself which
    names = _chosen(metafunc.config)
    if not names:
        stash = metafunc.config.stash
        names = stash[_DEFAULT] = stash.get(_DEFAULT, None) or _default()
    metafunc.parametrize("fcconv_backend", names, indirect=True, scope="session")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Report which backends were asked for."""
    chosen = _chosen(config)
    return [f"fcconv backends: {', '.join(chosen)}"] if chosen else []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report how far each backend was checked: executed, compiled, or only lowered."""
    counts = collections.Counter(
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == _PROPERTY
    )
    if counts:
        terminalreporter.section("fcconv: conversions checked")
        for headline, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count} x {headline}")


@pytest.fixture(scope="session")
def fcconv_backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend: one of ``--fcconv-backends`` after the other.

    Skips the test if the device is absent and its compiler isn't installed; the reason
    shows how to install it.
    """
    from .backends.resolution import resolve

    found = resolve(request.param)
    if found.how == "lowered" and "pip install" in found.reason:
        pytest.skip(f"{request.param}: {found.reason}")
    return request.param


@pytest.fixture
def assert_equivalent(
    fcconv_backend: str, record_property: Callable[[str, object], None]
) -> Callable[..., VerifyReport]:
    """:func:`fcconv_jax.assert_equivalent` on ``fcconv_backend``.

    Call it with a model, its params and inputs, and ``plan=``. What it asserts depends
    on what the backend allows here:

    - *executed*: all that :func:`fcconv_jax.verify` checks.
    - *compiled* or *lowered*: the parameters are the same bits, rearranged; XLA's
      compiler for that device accepts both programs (compiled only); and for every
      planned layer, the converted program asks for a matrix product less and a
      convolution more, or the other way round. No number is compared.

    Returns the report; ``backends[0].how`` is how far the check got.
    """

    def check(
        model: object, params: PyTree, *inputs: Any, plan: Any, **options: Any
    ) -> Any:
        from .verification.structure import structure_failures
        from .verification.verify import verify

        report = verify(
            model, params, *inputs, plan=plan, backends=[fcconv_backend], **options
        )
        (found,) = report.backends
        failures = [
            failure
            if failure.startswith(f"{fcconv_backend}:")
            else f"{fcconv_backend}: {failure}"
            for failure in report.failures
        ]
        if found.how != "executed":
            failures += structure_failures(report, plan)
        record_property(_PROPERTY, found.headline)
        if failures:
            raise AssertionError("the two forms differ\n" + "\n".join(failures))
        return report

    return check


def _chosen(config: pytest.Config) -> list[str]:
    """Return the names from the command line, or from the configuration file."""
    option = config.getoption("--fcconv-backends")
    source = "--fcconv-backends"
    names = None if option is None else option.split(",")
    if names is None:
        source = "fcconv_backends"
        names = [n for word in config.getini(source) for n in word.split(",") if n]
        if not names:
            return []
    from .backends.name import Backend
    from .messages.errors import BackendError

    try:
        return [str(b) for b in dict.fromkeys(map(Backend.parse, names))]
    except BackendError as error:
        raise pytest.UsageError(f"{source}: {error}") from None


def _default() -> list[str]:
    """Return the present backends, and a target for each installed compiler."""
    from .backends.name import Backend
    from .backends.resolution import missing_extra, present

    names = [
        name for name in ("cpu", "cuda", "rocm", "tpu") if present(Backend.parse(name))
    ]
    for platform in ("tpu", "cuda"):
        if platform not in names and not missing_extra(platform):
            names.append(str(Backend(platform).target))
    return names
