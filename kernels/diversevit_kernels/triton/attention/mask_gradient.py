"""The gradient of an additive mask, dM = dS of (5) or gM = R of (9), without atomics.

Traffic  a program reads q, k, v, do (and their cotangents) of its rows and keys for every sample and head that
         share its part of the mask, and writes that part once, in the accumulator's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import allocate, cdiv, launch
from .tiles import (
    Problem,
    Static,
    as_number,
    chunked,
    indices,
    load_rows,
    load_softmax,
    load_statistic,
    probabilities,
    product,
    score_cotangent,
)


@triton.jit
def _mask_kernel(
    P,  # Problem
    out_ptr,  # [samples of the mask, heads of the mask, Nq, Nk], dense
    delta_ptr,  # [B, H, Nq], dense: D
    x_ptr,  # [B, H, Nq], dense: x of (7); None without X
    t_ptr,  # [B, H, Nq], dense: rowsum(R') of (8); None: first order
    scale: tl.float64,
    mask_heads,
    shared_samples,  # samples that one part of the mask serves: 1, or all
    shared_heads,  # heads that one part of the mask serves: 1, or all
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(5) or (9). One program owns [BLOCK_M, BLOCK_N] elements of one sample and head of the mask.

    It sums dS, or R = dS ∘ (X − x) + P ∘ (Y − t), over the samples and heads that share them, in order.
    """
    column_tiles = tl.cdiv(P.Nk, BLOCK_N)
    tiles = tl.cdiv(P.Nq, BLOCK_M) * column_tiles
    program = tl.program_id(0).to(tl.int64)
    part, tile = program // tiles, program % tiles
    scale = as_number(scale, S.ACC)
    rows, cols = (
        indices((tile // column_tiles) * BLOCK_M, BLOCK_M, S),
        indices((tile % column_tiles) * BLOCK_N, BLOCK_N, S),
    )
    i, j = rows[:, None], cols[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], S.ACC)
    for step in range(shared_samples * shared_heads):
        b = part // mask_heads + step // shared_heads
        h = part % mask_heads + step % shared_heads
        key_head = h // S.GROUP
        q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
        do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        k = load_rows(P.k, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
        v = load_rows(P.v, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        top, share = load_softmax(P, b, h, rows)
        delta = load_statistic(delta_ptr, P, b, h, rows, 0.0)[:, None]
        p = probabilities(q, k, top[:, None], share[:, None], P, b, h, i, j, scale, S)
        ds = p * (product(do, v, S.VALUE_WIDTH, S) - delta)
        if t_ptr is None:
            total += ds
        else:
            total -= p * load_statistic(t_ptr, P, b, h, rows, 0.0)[:, None]
            if S.HAS_X:
                ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
                ddk = load_rows(P.ddk, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
                x = score_cotangent(ddq, k, q, ddk, P, b, h, i, j, scale, S)
                total += ds * (x - load_statistic(x_ptr, P, b, h, rows, 0.0)[:, None])
            if P.ddv is not None:
                ddv = load_rows(P.ddv, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
                total += p * product(do, ddv, S.VALUE_WIDTH, S)
    at = (part * P.Nq + i) * P.Nk + j
    tl.store(out_ptr + at, total, mask=(i < P.Nq) & (j < P.Nk))


def mask_gradient(
    reads: Problem,
    static: Static,
    mask: Tensor,
    delta: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    scale: float,
    q: Tensor,
) -> Tensor:
    """dM, or gM if ``t`` is given, shaped like ``mask`` and in its dtype."""
    samples, heads = mask.shape[:2]
    parts = allocate((samples, heads, reads.Nq, reads.Nk), delta.dtype, q)
    launch(
        "attention_mask_gradient",
        _mask_kernel,
        lambda c: samples * heads * cdiv(reads.Nq, c["BLOCK_M"]) * cdiv(reads.Nk, c["BLOCK_N"]),
        q,
        max(static.WIDTH, static.VALUE_WIDTH),
        reads,
        parts,
        delta,
        x,
        t,
        scale,
        heads,
        q.shape[0] if samples == 1 else 1,
        q.shape[1] if heads == 1 else 1,
        S=chunked(static),
    )
    return parts.sum_to_size(mask.shape).to(mask.dtype)
