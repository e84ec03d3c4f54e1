"""Attention by its definition: equations (1)-(9) and (53)-(57) of ``kernels/README.md``."""

from typing import Any

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import QKV, AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.common.dropout import kept_by


def attention_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """(1)  S = scale Q K^T + mask, minus infinity where a query may not look.   -> [B, H, Nq, Nk]."""
    s = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if is_causal:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~seen, -torch.inf)
    return s


def softmax_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    """(1a)  P = softmax(S), and [B, H, 2, Nq]: largest scores and shares; of an empty row P = 0, +inf and 1."""
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, torch.inf)
    weight = (s - top).exp()
    total = weight.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return weight / total, torch.cat((top.mT, 1 / total.mT), -2)


def dropped(p: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """(53)  P o Z, P [B, H, Nq, Nk]: some weights zero, the others larger; all as they are without a seed."""
    if seed is None:
        return p
    B, H, Nq, Nk = p.shape
    kept = kept_by(seed, (B, H, Nq, Nk), dropout_p)
    return (p * (1 / (1 - dropout_p))).masked_fill(~kept, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """(2)  O = (P o Z) V.   [B, H, Nq, d] x [B, Hkv, Nk, d] x [B, Hkv, Nk, d_v] -> [B, H, Nq, d_v]."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_forward(q, k, v, mask, seed, is_causal, s, dropout_p)[0]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(1)-(2)  ``o`` [B, H, Nq, d_v] and (1a) [B, H, 2, Nq], the latter at least float32."""
    p, softmax = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))
    p = dropped(p.to(v.dtype), seed, dropout_p)
    o = p @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return o, softmax.to(torch.promote_types(q.dtype, torch.float32))


def attention_backward(
    inputs: AttentionBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(3)-(5)  Pull the cotangent ``do`` of the output back to q, k, v (``into``) and an additive mask."""
    q, k, v, mask, seed, _, _, do, is_causal, scale, dropout_p, mask_grad = inputs
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    dp = dropped(do @ v.repeat_interleave(group, 1).mT, seed, dropout_p)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    products = scale * ds.mT @ q, dropped(p, seed, dropout_p).mT @ do
    dk, dv = (_sum_groups(x, group) for x in products)
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * ds @ k.repeat_interleave(group, 1), dk, dv), dmask


def attention_double_backward(
    inputs: AttentionDoubleBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(6)-(9)  Pull the cotangents of (5) back to q, k, v (``into``), do and an additive mask."""
    q, k, v, mask, seed, _, _, do, _, ddq, ddk, ddv, ddmask = inputs[:13]
    is_causal, scale, dropout_p, mask_grad = inputs[13:]
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    given = ((q, ddq), (k, ddk), (v, ddv))
    ddq, ddk, ddv = (torch.zeros_like(x) if dd is None else dd for x, dd in given)
    k, v, ddk, ddv = (x.repeat_interleave(group, 1) for x in (k, v, ddk, ddv))
    dp, y = (dropped(do @ x.mT, seed, dropout_p) for x in (v, ddv))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dds = scale * (ddq @ k.mT + q @ ddk.mT) + (0.0 if ddmask is None else ddmask.to(q.dtype))
    eta = (p * dds).sum(-1, keepdim=True)
    a = ds * (dds - eta) + p * y
    gs = a - p * a.sum(-1, keepdim=True)
    ddp, p = (dropped(x, seed, dropout_p) for x in (p * (dds - eta), p))
    gk = _sum_groups(scale * (gs.mT @ q + ds.mT @ ddq), group)
    gv = _sum_groups(ddp.mT @ do, group)
    gmask = gs.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * (gs @ k + ds @ ddk), gk, gv), ddp @ v + p @ ddv, gmask


def attention_empty_qkv(qkv: Tensor, queries: int) -> Tensor:
    """Dense, like ``qkv`` [B, N, 3, H, d], zero in the part of q from token ``queries`` on: for ``into``."""
    made = qkv.new_empty(qkv.shape)
    made[:, queries:, 0] = 0
    return made


def _written(into: tuple[Tensor, ...] | None, *results: Tensor) -> Any:
    return results if into is None else tuple(map(Tensor.copy_, into, results))


def _sum_groups(x: Tensor, group: int) -> Tensor:
    """Sum query heads that share a key head.   [B, H, N, d] -> [B, H / group, N, d]."""
    return x.unflatten(1, (-1, group)).sum(2)
