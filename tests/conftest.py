"""Shared fixtures. Tests run on the CPU with one thread per worker, seeded by their own generators."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
