"""Tests of the Triton kernels themselves: in the interpreter on a CPU, or on a real GPU.

``TRITON_INTERPRET=1 pytest tests/kernels/triton`` interprets them; ``pytest -m gpu`` on a machine with a GPU runs
the same tests on it. Anywhere else they are skipped, and say so. With ``SANITIZE=1`` beside ``TRITON_INTERPRET=1`` no
lane may touch memory outside the tensors of its launch, not even the gaps of a strided view.
"""

import os
from contextlib import nullcontext

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if not str(item.path).startswith(here):
            continue
        if not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(
                        reason="no GPU; TRITON_INTERPRET=1 pytest tests/kernels/triton"
                    )
                )


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def quickly(request):
    """Interprets at three times the speed, except where integer overflow is what a test is about."""
    if not INTERPRETED or request.node.get_closest_marker("overflow"):
        yield
        return
    from tools.interpreter.quick import quick
    from tools.interpreter.sanitizer import sanitizer

    with quick(), sanitizer() if os.environ.get("SANITIZE") == "1" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Every result a kernel allocates is poisoned with NaN and lies between guard zones."""
    from diversevit_kernels.triton.runtime import tensors
    from tests.helpers.guards import Guards

    guards = Guards()
    monkeypatch.setattr(tensors, "allocator", guards.empty)
    yield guards
    guards.check()
