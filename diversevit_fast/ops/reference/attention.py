"""Attention by its definition: equations (1)-(9) of ``kernels/README.md``."""

from typing import Any

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import QKV, AttentionBackward, AttentionDoubleBackward


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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(2)  O = P V.   [B, H, Nq, d] x [B, Hkv, Nk, d] x [B, Hkv, Nk, d_v] -> [B, H, Nq, d_v]."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_forward(q, k, v, mask, is_causal, s)[0]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(1)-(2)  ``o`` [B, H, Nq, d_v] and (1a) [B, H, 2, Nq], the latter at least float32."""
    p, softmax = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))
    o = p.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return o, softmax.to(torch.promote_types(q.dtype, torch.float32))


def attention_backward(
    inputs: AttentionBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(3)-(5)  Pull the cotangent ``do`` of the output back to q, k, v (``into``) and an additive mask."""
    q, k, v, mask, _, _, do, is_causal, scale, mask_grad = inputs
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    dp = do @ v.repeat_interleave(group, 1).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (_sum_groups(x, group) for x in (scale * ds.mT @ q, p.mT @ do))
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * ds @ k.repeat_interleave(group, 1), dk, dv), dmask


def attention_double_backward(
    inputs: AttentionDoubleBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(6)-(9)  Pull the cotangents of (5) back to q, k, v (``into``), do and an additive mask."""
    q, k, v, mask, _, _, do, _, ddq, ddk, ddv, ddmask, is_causal, scale, mask_grad = inputs
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    given = ((q, ddq), (k, ddk), (v, ddv))
    ddq, ddk, ddv = (torch.zeros_like(x) if dd is None else dd for x, dd in given)
    k, v, ddk, ddv = (x.repeat_interleave(group, 1) for x in (k, v, ddk, ddv))
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dds = scale * (ddq @ k.mT + q @ ddk.mT) + (0.0 if ddmask is None else ddmask.to(q.dtype))
    eta = (p * dds).sum(-1, keepdim=True)
    ddp = p * (dds - eta)
    a = ds * (dds - eta) + p * (do @ ddv.mT)
    gs = a - p * a.sum(-1, keepdim=True)
    gk = _sum_groups(scale * (gs.mT @ q + ds.mT @ ddq), group)
    gv = _sum_groups(ddp.mT @ do, group)
    gmask = gs.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * (gs @ k + ds @ ddk), gk, gv), ddp @ v + p @ ddv, gmask


def attention_empty_qkv(qkv: Tensor) -> Tensor:
    """Uninitialised, dense, like ``qkv`` [B, N, 3, H, d]: what ``into`` may be views of."""
    return qkv.new_empty(qkv.shape)


def _written(into: tuple[Tensor, ...] | None, *results: Tensor) -> Any:
    return results if into is None else tuple(map(Tensor.copy_, into, results))


def _sum_groups(x: Tensor, group: int) -> Tensor:
    """Sum query heads that share a key head.   [B, H, N, d] -> [B, H / group, N, d]."""
    return x.unflatten(1, (-1, group)).sum(2)
