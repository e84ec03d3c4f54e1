"""Softmax of tiles of scores and its derivatives, between attention's products: (1)-(8) of kernels/README.md.

Each of forward, backward and double backward has one formula for Inductor, which compiles it into a few passes over
rows that stay in the cache (``inductor``). Where it is not compiled, or a cotangent is absent, PyTorch's operators do
the same in place, one after the other.

Shapes   tiles s, p, dp, ds, dds, ddp, gs, y [pairs, rows, keys]; a statistic [pairs, rows, 1].
Dtypes   the accumulation dtype; only float32 is compiled.
P        is exp(S - top) over its own row sum, (1a); ``top``, the largest score, is +inf where a row attends to nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.inductor import Formula, Function, compiled_if_worth

Buffer = Callable[[str], Tensor]
"""Returns scratch memory of a tile's shape, by name."""


def _forward(s: Tensor) -> tuple[Tensor, Tensor]:
    """(1a): ``p`` [rows, keys] and the statistics [rows, 2] of scores, the largest and the share."""
    top = s.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.inf, top)
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    share = 1 / torch.where(total == 0, 1.0, total)
    return p * share, torch.cat((top, share), 1)


def _backward(s: Tensor, top: Tensor, dp: Tensor) -> tuple[Tensor, Tensor]:
    """(1), (3)-(4): ``p`` and ``ds`` [rows, keys]; delta is the row sum of P o dP."""
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    return p, p * (dp - (p * dp).sum(1, keepdim=True))


def _double_backward(
    s: Tensor, top: Tensor, dp: Tensor, dds: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1), (3)-(8): ``p``, ``ds``, ``ddp`` and ``gs`` [rows, keys]; y is dO ddV^T."""
    p = torch.exp(s - top)
    total = p.sum(1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    centred = dds - (p * dds).sum(1, keepdim=True)
    gs = p * y + ds * centred
    return p, ds, p * centred, gs - p * gs.sum(1, keepdim=True)


def _examples(*columns: bool) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """Return a function that makes example arguments: statistics [6, 1] where ``columns``, else tiles [6, 40]."""
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
    """Return the compiled formula for attention of q and k, if there is one and the scores repay compiling it."""
    dtype = accumulation_dtype(q.dtype)
    return compiled_if_worth(formula, dtype, q.shape[:3].numel() * k.shape[2])


def _call(run: Function, formula: Formula, *operands: Tensor) -> tuple[Tensor, ...]:
    """Call the formula, which takes [rows, keys], on tiles [pairs, rows, keys]."""
    flat = [x.reshape(-1, x.shape[-1]) for x in operands]
    if min(flat[0].shape) < 2:  # sizes are compiled from 2 on
        run = formula.function
    return tuple(x.view(*operands[0].shape[:2], -1) for x in run(*flat))


def forward(run: Function | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``p`` and (1a) [pairs, rows, 2], the largest score and the share; may overwrite ``s``."""
    if run is not None:
        p, softmax = _call(run, FORWARD, s)
        return p, softmax
    top = s.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, torch.inf)
    p = s.sub_(top).exp_()
    share = (
        p.sum(-1, keepdim=True).clamp_min_(1.0).reciprocal_()
    )  # 0 in an empty row, else at least 1
    return p.mul_(share), torch.cat((top, share), -1)


def backward(
    run: Function | None, s: Tensor, top: Tensor, dp: Tensor, buffer: Buffer
) -> tuple[Tensor, Tensor]:
    """Return ``p`` and ``ds``; may overwrite ``s`` and ``dp``."""
    if run is not None:
        p, ds = _call(run, BACKWARD, s, top, dp)
        return p, ds
    p = s.sub_(top).exp_()
    p /= p.sum(-1, keepdim=True).clamp_min_(
        0.5
    )  # 0 in an empty row, else at least 1 but for rounding
    delta = torch.mul(p, dp, out=buffer("ddp")).sum(-1, keepdim=True)
    return p, dp.sub_(delta).mul_(p)


def double_backward(
    run: Function | None,
    s: Tensor,
    top: Tensor,
    dp: Tensor,
    dds: Tensor | None,
    y: Tensor | None,
    buffer: Buffer,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return ``p``, ``ds``, ``ddp`` (None without ``dds``) and ``gs``; may overwrite the arguments.

    ``run`` is called only if ``dds`` and ``y`` are given.
    """
    if run is not None and dds is not None and y is not None:
        p, ds, ddp, gs = _call(run, DOUBLE_BACKWARD, s, top, dp, dds, y)
        return p, ds, ddp, gs
    p, ds = backward(None, s, top, dp, buffer)
    ddp = None
    gs = y.mul_(p) if y is not None else buffer("y").zero_()
    if dds is not None:
        dds.sub_(torch.mul(p, dds, out=buffer("ddp")).sum(-1, keepdim=True))
        gs.addcmul_(ds, dds)
        ddp = torch.mul(p, dds, out=buffer("ddp"))
    return p, ds, ddp, gs.addcmul_(p, gs.sum(-1, keepdim=True), value=-1)
