"""Random networks leave many compiled programs behind: they go with each test."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _compiled_programs_go():
    yield
    jax.clear_caches()
