"""The zoo runs where its extra is installed, and says so where it is not."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path):
    # Doctest collection would import every module. None of the zoo's holds a doctest.
    return True if not collection_path.name.startswith("test_") else None
