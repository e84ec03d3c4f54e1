"""Results of the CPU backend ask the system for large pages, and are whole without them."""

import mmap

import pytest
import torch

import diversevit_fast as dvf
from diversevit_kernels.cpu import fresh as module

LARGE = module.WORTH // 4 + 3  # float32


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int, int]]:
    """What ``madvise`` was called with, in place of calling it."""
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(module, "_madvise", lambda *call: calls.append(call))
    monkeypatch.setattr(module, "_HUGE_PAGE", 14)
    return calls


def test_whole_pages_inside_a_large_result_are_asked_for(asked):
    x = module.fresh(torch.empty(0), 1, LARGE)
    ((begin, size, advice),) = asked
    assert advice == 14
    assert begin % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert x.data_ptr() <= begin
    assert begin + size <= x.data_ptr() + x.nbytes
    assert size > x.nbytes - 2 * mmap.PAGESIZE


def test_small_results_are_left_alone(asked):
    module.fresh(torch.empty(0), LARGE // 2)
    assert not asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_system_without_large_pages(monkeypatch, dtype):
    monkeypatch.setattr(module, "_madvise", None)
    x = module.fresh(torch.empty(0, dtype=dtype), 2, LARGE)
    assert x.shape == (2, LARGE)
    assert x.is_contiguous()
    assert x.dtype == dtype


@pytest.mark.parametrize(
    ("operator", "results"),
    [
        (dvf.gelu, 4),
        (lambda x: dvf.layer_norm(x, (384,)), 4),
        (lambda x: dvf.attention(*(x.view(1, 14, 197, 384),) * 3), 8),
    ],
    ids=["gelu", "layer_norm", "attention"],
)
def test_every_result_of_a_ladder_is_fresh(asked, operator, results):
    x = torch.randn(14 * 197, 384, requires_grad=True)
    y = operator(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    dx.square().sum().backward()
    assert len(asked) == results
