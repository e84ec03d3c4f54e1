"""Attention where it is trained: saturated rows, rows masked by finite numbers; judged by eager PyTorch's own error."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.eager import softmax_attention

H = 2


class Problem(NamedTuple):
    """What attention to second order takes: inputs (q, k, v, perhaps a mask), and cotangents of each order."""

    inputs: list[Tensor]
    do: Tensor
    dd: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Problem":
        inputs, dd = ([x.to(dtype) for x in some] for some in (self.inputs, self.dd))
        return Problem(inputs, self.do.to(dtype), dd)


def saturated(Nq: int, Nk: int, d: int, top: float, mask: bool, seed: int, dtype) -> Problem:
    """Scores up to ``top``, and with ``mask`` one that wants a gradient."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = make(1, H, Nq, d), make(1, H, Nk, d), make(1, H, Nk, d)
    q *= top / (q @ k.mT * d**-0.5).abs().max()
    inputs = [q, k, v, *((make(1, H, Nq, Nk) * top / 8,) if mask else ())]
    return Problem(inputs, make(1, H, Nq, d), [make(*x.shape) for x in inputs]).to(dtype)


def to_second_order(attend: Callable[..., Tensor], p: Problem) -> dict[str, Tensor]:
    """Output, gradients, and gradients of these, by name."""
    inputs, do = [x.detach().requires_grad_() for x in p.inputs], p.do.detach().requires_grad_()
    o = attend(*inputs)
    first = torch.autograd.grad(o, inputs, do, create_graph=True)
    second = torch.autograd.grad(first, [*inputs, do], p.dd)
    names = "qkvm"[: len(inputs)]
    results = dict(zip([f"d{x}" for x in names], first, strict=True))
    results |= dict(zip([f"g{x}" for x in (*names, "do")], second, strict=True))
    return {"o": o.detach(), **{name: x.detach() for name, x in results.items()}}


def error(x: Tensor, exact: Tensor) -> float:
    """The largest difference; at least a half ulp of the largest number, for eager is now and then exact."""
    least = float(exact.abs().max()) * torch.finfo(x.dtype).eps / 2
    return max(float((x.double() - exact).abs().max()), least)


def errors_over_eager(
    attend: Callable[..., Tensor], problems: Iterator[Problem]
) -> dict[str, list[float]]:
    """For each result, what its error is over eager PyTorch's in the same dtype, a number a problem."""
    ratios = defaultdict(list)
    for p in problems:
        exact = to_second_order(softmax_attention, p.to(torch.float64))
        eager = to_second_order(softmax_attention, p)
        for name, ours in to_second_order(attend, p).items():
            assert torch.isfinite(ours).all(), name
            ratios[name].append(error(ours, exact[name]) / error(eager[name], exact[name]))
    return ratios


def mean(ratios) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def assert_as_exact_as_eager(ratios: dict[str, list[float]], all_of: float, worst: float) -> None:
    """Geometric means: over everything at most ``all_of``, of every result at most ``worst``."""
    means = {name: mean(some) for name, some in ratios.items()}
    whole = mean(list(itertools.chain.from_iterable(ratios.values())))
    assert whole <= all_of, f"{whole:.2f} x eager's error: {means}"
    assert max(means.values()) <= worst, means


MASKED = {
    "one row": lambda Nq, Nk: torch.arange(Nq).view(1, 1, Nq, 1).eq(Nq // 2).expand(1, 1, Nq, Nk),
    "all rows": lambda Nq, Nk: torch.ones(1, 1, Nq, Nk, dtype=torch.bool),
    "padding of one head": lambda Nq, Nk: (
        torch.arange(Nk).ge(Nk // 2).logical_or(torch.arange(H).view(1, H, 1, 1).eq(1))
    ),
}
"""Where a mask holds a large finite number, [1, 1 | H, Nq | 1, Nk]: some rows are masked from end to end."""


def with_uniform_rows(where: Tensor) -> Callable[..., Tensor]:
    """Attention by formula, but that rows masked from end to end are uniform over their keys.

    As scores are in an arithmetic to which they are nothing beside the mask; their gradients flow as ever.
    """
    empty = where.all(-1, keepdim=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(where & ~empty, -torch.inf)
        scores = torch.where(empty, scores - scores.detach(), scores)
        return (scores + sum(m - m.detach() for m in mask)).softmax(-1) @ v

    return attend
