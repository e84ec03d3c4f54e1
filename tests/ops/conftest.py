"""Ways in which attention runs on a CPU."""

import pytest

from tests.helpers.attention_cases import use_tiles


@pytest.fixture(params=["native", 1 << 20, 72], ids=["native", "one-tile", "small-tiles"])
def tile(request, monkeypatch):
    """The C++ kernel; PyTorch's tiles of the usual size, and so small that every loop runs several times."""
    if request.param != "native":
        use_tiles(monkeypatch, request.param)
