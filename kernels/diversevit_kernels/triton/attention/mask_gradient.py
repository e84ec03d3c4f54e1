"""The gradient of an additive mask, dmask = dS of (5) or gmask = gS of (9), without atomics.

Traffic  a program reads q, k, v, do (and their cotangents) of its rows and keys for every sample and head that
         share its part of the mask, and writes that part once. A mask that one row of queries or keys serves is
         summed by a second kernel, from parts in the accumulator's dtype.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import run_kernel
from ..runtime.plan import target_of
from ..runtime.sizes import cdiv
from ..runtime.tensors import allocate
from ..runtime.tiles import as_number
from . import configs
from .tiles import (
    Arguments,
    Constants,
    RowStatistics,
    chunked,
    indices,
    load_qk,
    load_softmax,
    load_statistic,
    load_v,
    probabilities,
    score_cotangent,
    value_product,
)


@triton.jit
def attention_mask_gradient_kernel(
    args,  # Arguments
    out_ptr,  # [samples of the mask, heads of the mask, Nq, Nk], dense, written
    stats,  # RowStatistics; at first order t is None
    scale: tl.float64,
    mask_heads,
    shared_samples,  # samples that one part of the mask serves: 1, or all
    shared_heads,  # heads that one part of the mask serves: 1, or all
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mask gradient, (5) or (9). One program owns [BLOCK_M, BLOCK_N] elements of one sample and head of the mask.

    It sums dS, or gS as in (49), over the samples and heads that share them, in order.
    """
    column_tiles = tl.cdiv(args.Nk, BLOCK_N)
    tiles = tl.cdiv(args.Nq, BLOCK_M) * column_tiles
    program = tl.program_id(0).to(tl.int64)
    part, tile = program // tiles, program % tiles
    scale = as_number(scale, const.ACC)
    rows = indices((tile // column_tiles) * BLOCK_M, BLOCK_M, const)
    cols = indices((tile % column_tiles) * BLOCK_N, BLOCK_N, const)
    i, j = rows[:, None], cols[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], const.ACC)
    for step in range(shared_samples * shared_heads):
        b = part // mask_heads + step // shared_heads
        h = part % mask_heads + step % shared_heads
        key_head = h // const.GROUP
        q = load_qk(args.q, b, h, rows, args.Nq, const)
        do = load_v(args.do, b, h, rows, args.Nq, const)
        k = load_qk(args.k, b, key_head, cols, args.Nk, const)
        v = load_v(args.v, b, key_head, cols, args.Nk, const)
        top, share = load_softmax(args, b, h, rows, scale, const)
        top, share = top[:, None], share[:, None]
        delta = load_statistic(stats.delta, args, b, h, rows)[:, None]
        p = probabilities(q, k, top, share, args, b, h, i, j, scale, const, True)
        ds = p * (value_product(do, v, const) - delta)
        if stats.t is None:
            total += ds
        else:
            total -= p * load_statistic(stats.t, args, b, h, rows)[:, None]
            if const.HAS_DDS:
                ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
                ddk = load_qk(args.ddk, b, key_head, cols, args.Nk, const)
                dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
                total += ds * (dds - load_statistic(stats.eta, args, b, h, rows)[:, None])
            if args.ddv is not None:
                ddv = load_v(args.ddv, b, key_head, cols, args.Nk, const)
                total += p * value_product(do, ddv, const)
    at = (part * args.Nq + i) * args.Nk + j
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, total, mask=(i < args.Nq) & (j < args.Nk))


@triton.jit
def attention_mask_sums_kernel(
    parts_ptr,  # [parts, Nq, Nk], dense
    out_ptr,  # [parts, kept], dense, written
    size,  # Nq Nk
    kept,  # elements of a part that keep a place of their own: Nk (queries are summed up), Nq (keys are) or 1
    summed,  # elements that are summed up for each of them
    kept_step,  # elements between neighbours in a part
    summed_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of a mask's gradient over its axes of size 1. One program owns BLOCK_M of the sums of one part, in order."""
    tiles = tl.cdiv(kept, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    part, own = program // tiles, program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], parts_ptr.dtype.element_ty)
    for start in range(0, summed, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N).to(tl.int64)
        at = part * size + own[:, None] * kept_step + other[None, :] * summed_step
        inside = (own < kept)[:, None] & (other < summed)[None, :]
        total += tl.load(parts_ptr + at, mask=inside, other=0.0)
    sums = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part * kept + own, sums, mask=own < kept)


def mask_gradient(
    args: Arguments,
    const: Constants,
    mask: Tensor,
    stats: RowStatistics,
    scale: float,
    q: Tensor,
) -> Tensor:
    """The gradient dmask, or gmask if ``stats`` has t, shaped like ``mask`` and in its dtype."""
    samples, heads = mask.shape[:2]
    whole = (samples, heads, args.Nq, args.Nk)
    out = allocate(tuple(mask.shape), mask.dtype, q)
    parts = out if whole == mask.shape else allocate(whole, stats.delta.dtype, q)
    run_kernel(
        configs.MASK_GRADIENT.plan(target_of(q, max(const.WIDTH, const.VALUE_WIDTH))),
        attention_mask_gradient_kernel,
        lambda c: samples * heads * cdiv(args.Nq, c["BLOCK_M"]) * cdiv(args.Nk, c["BLOCK_N"]),
        args,
        parts,
        stats,
        scale,
        heads,
        q.shape[0] if samples == 1 else 1,
        q.shape[1] if heads == 1 else 1,
        const=chunked(const),
    )
    return out if parts is out else sum_into(out, parts)


def sum_into(out: Tensor, parts: Tensor) -> Tensor:
    """Write ``parts`` [., ., Nq, Nk] into ``out`` [., ., Nq|1, Nk|1], summed up over its axes of size 1; returns it."""
    (samples, heads, queries, keys), (Nq, Nk) = out.shape, parts.shape[2:]
    kept = queries * keys
    by_query = queries > 1  # keys are summed up
    run_kernel(
        configs.MASK_SUMS.plan(target_of(out)),
        attention_mask_sums_kernel,
        lambda c: samples * heads * cdiv(kept, c["BLOCK_M"]),
        parts,
        out,
        Nq * Nk,
        kept,
        Nq * Nk // max(1, kept),
        Nk if by_query else 1,
        1 if by_query or kept == 1 else Nk,
    )
    return out
