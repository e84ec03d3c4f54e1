"""Shared fixtures. Tests run on the CPU with one thread per worker, seeded by their own generators."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rows of the README's tables go into the report (``--junitxml``) with their tests' outcomes."""
    for item in items:
        for mark in item.iter_markers("system"):
            item.user_properties.append(("system", "\t".join(mark.args)))
