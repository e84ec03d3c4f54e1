"""What happens to tiles of scores between attention's products on a CPU: (1)-(9) of kernels/README.md, row by row.

Inductor compiles each rung's part to one formula, a few passes over rows that are still in the cache
(``inductor``). Where a formula is not compiled, or a cotangent is absent, the same is done in place, operator by
operator.

Shapes   tiles s, p, dp, ds, x, y, e, r [pairs, rows, keys]; a statistic [pairs, rows, 1].
Dtypes   the accumulation dtype; compiled in float32 alone.
P        is exp(S - top) over its own row sum, (1a); ``top``, the largest score, is +inf where a row attends to nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.inductor import Formula, Function, compiled_if_worth

Buffer = Callable[[str], Tensor]
"""Scratch memory of a tile's shape, by name."""


def _forward(s: Tensor) -> tuple[Tensor, Tensor]:
    """(1a), (1)-(2): of scores [rows, keys] ``p``, and [rows, 2], the largest and the share of a row's weights."""
    top = s.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.inf, top)
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    share = 1 / torch.where(total == 0, 1.0, total)
    return p * share, torch.cat((top, share), 1)


def _backward(s: Tensor, top: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
    """(1), (3)-(5): ``p`` and ``ds`` of [rows, keys]; D from P o dP."""
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    return p, p * (dp - (p * dp).sum(1, keepdim=True))


def _double_backward(
    s: Tensor, top: Tensor, dp: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1), (3)-(8): ``p``, ``ds``, ``e`` = P o (X - x) and ``r`` of [rows, keys]; y is dO C^T."""
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    centred = x - (p * x).sum(1, keepdim=True)
    r = p * y + ds * centred
    return p, ds, p * centred, r - p * r.sum(1, keepdim=True)


def _examples(*columns: bool) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """Arguments of a formula: statistics [6, 1] where ``columns`` says so, else tiles [6, 40]."""
    return lambda dtype: tuple(
        torch.ones(6, 1 if column else 40, dtype=dtype) for column in columns
    )


_TILE, _STATISTIC = ("rows", "keys"), ("rows", None)
FORWARD = Formula("attention_forward", _forward, _examples(False), (_TILE,))
BACKWARD = Formula(
    "attention_backward", _backward, _examples(False, True, False), (_TILE, _STATISTIC, _TILE)
)
DOUBLE_BACKWARD = Formula(
    "attention_double_backward",
    _double_backward,
    _examples(False, True, False, False, False),
    (_TILE, _STATISTIC, _TILE, _TILE, _TILE),
)


def fused(formula: Formula, q: Tensor, k: Tensor) -> Function | None:
    """The compiled formula for tiles of so many scores, if there is one and it is worth it."""
    dtype = accumulation_dtype(q.dtype)
    return compiled_if_worth(formula, dtype, q.shape[:3].numel() * k.shape[2])


def _call(run: Function, formula: Formula, *operands: Tensor) -> tuple[Tensor, ...]:
    """The formula of tiles [pairs, rows, keys] as of [pairs rows, keys]."""
    flat = [x.reshape(-1, x.shape[-1]) for x in operands]
    if min(flat[0].shape) < 2:  # sizes of 1 are not compiled for
        run = formula.function
    return tuple(x.view(*operands[0].shape[:2], -1) for x in run(*flat))


def forward(run: Function | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """``p``, and (1a) [pairs, rows, 2], top and share; ``s`` may be overwritten."""
    if run is not None:
        p, softmax = _call(run, FORWARD, s)
        return p, softmax
    top = s.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, torch.inf)
    p = s.sub_(top).exp_()
    share = p.sum(-1, keepdim=True).clamp_min_(1.0).reciprocal_()  # less than 1 is 0: an empty row
    return p.mul_(share), torch.cat((top, share), -1)


def backward(
    run: Function | None, s: Tensor, top: Tensor, dp: Tensor, buffer: Buffer
) -> tuple[Tensor, Tensor]:
    """``p`` and ``ds``; ``s`` and ``dp`` may be overwritten."""
    if run is not None:
        p, ds = _call(run, BACKWARD, s, top, dp)
        return p, ds
    p = s.sub_(top).exp_()
    p /= p.sum(-1, keepdim=True).clamp_min_(0.5)  # 0, or 1 and more but for the rounding of S
    delta = torch.mul(p, dp, out=buffer("e")).sum(-1, keepdim=True)
    return p, dp.sub_(delta).mul_(p)


def double_backward(
    run: Function | None,
    s: Tensor,
    top: Tensor,
    dp: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    buffer: Buffer,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``p``, ``ds``, ``e`` (None without ``x``) and ``r``; the arguments may be overwritten.

    ``run`` may be given only with ``x`` and ``y``.
    """
    if run is not None and x is not None and y is not None:
        p, ds, e, r = _call(run, DOUBLE_BACKWARD, s, top, dp, x, y)
        return p, ds, e, r
    p, ds = backward(None, s, top, dp, buffer)
    e = None
    r = y.mul_(p) if y is not None else buffer("y").zero_()
    if x is not None:
        x.sub_(torch.mul(p, x, out=buffer("e")).sum(-1, keepdim=True))
        r.addcmul_(ds, x)
        e = torch.mul(p, x, out=buffer("e"))
    return p, ds, e, r.addcmul_(p, r.sum(-1, keepdim=True), value=-1)
