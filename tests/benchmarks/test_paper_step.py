"""Tests of the paper's step: its implementations agree, and ratios are medians over rounds."""

import torch

from benchmarks.scripts.paper_step import steps
from benchmarks.timing import interleaved, summary


def test_implementations_agree():
    torch.manual_seed(0)
    jobs = steps(batch=3)
    ours, loop = (
        torch.stack([jobs[name]() for _ in range(3)]) for name in ("ours", "published loop")
    )
    erm, stock = (torch.stack([jobs[name]() for _ in range(3)]) for name in ("erm", "stock erm"))
    torch.testing.assert_close(ours, loop, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(erm, stock, rtol=1e-3, atol=1e-4)
    assert (ours - erm).abs().max() > 1e-4


def test_ratios_are_medians_over_rounds():
    rows = summary({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 9.0]}, "a")
    assert rows["b"]["ratio"] == 2.0
    assert rows["a"]["ratio"] == 1.0
    assert rows["b"]["median_ms"] == 2000.0
    order = []
    interleaved({"x": lambda: order.append("x"), "y": lambda: order.append("y")}, rounds=2)
    assert order == ["x", "y"] * 3
