"""The gradient of an additive mask, dmask = dS of (5) or gmask = gS of (9), without atomics.

Traffic  a program reads q, k, v, do (and their cotangents) of its rows and keys for every sample and head that
         share its part of the mask, and writes that part once. A mask that one row of queries or keys serves is
         summed in the program. Where the mask has too few tiles to fill the device, several programs share one,
         and a second kernel adds what they summed, in order.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.device import multiprocessors
from ..runtime.launch import run_kernel
from ..runtime.plan import target_of
from ..runtime.sizes import cdiv
from ..runtime.tensors import allocate
from ..runtime.tiles import as_number
from . import configs
from .dropout import dropped, factors, load_words
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
    out_ptr,  # [splits, samples, heads, Nq | 1, Nk | 1], dense, written
    stats,  # RowStatistics; at first order t is None
    scale: tl.float64,
    samples,  # of the mask
    heads,
    shared_samples,  # samples that one part of the mask serves: 1, or all
    shared_heads,  # heads that one part of the mask serves: 1, or all
    splits,  # programs that share the work of a tile
    const: tl.constexpr,  # Constants
    ONE_ROW: tl.constexpr,  # the mask has one row, for all queries
    ONE_COLUMN: tl.constexpr,  # the mask has one column, for all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mask gradient, (5) or (9). One program owns a tile of one sample and head of the mask, or a share of its work.

    It sums dS, or gS as in (49), over the samples, heads, rows and columns that share the tile, in order.
    """
    row_tiles, column_tiles = tl.cdiv(args.Nq, BLOCK_M), tl.cdiv(args.Nk, BLOCK_N)
    own_rows = 1 if ONE_ROW else row_tiles
    own_columns = 1 if ONE_COLUMN else column_tiles
    shared_rows = row_tiles if ONE_ROW else 1
    shared_columns = column_tiles if ONE_COLUMN else 1
    program = tl.program_id(0).to(tl.int64)
    tile, split_part = program % (own_rows * own_columns), program // (own_rows * own_columns)
    part = split_part % (samples * heads)
    split = (split_part // (samples * heads)).to(tl.int32)  # divisions of 64 bits are long
    scale = as_number(scale, const.ACC)
    total = tl.zeros([BLOCK_M, BLOCK_N], const.ACC)
    steps = shared_samples * shared_heads * shared_rows * shared_columns
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum(steps, (split + 1) * share)):
        column_tile = tile % own_columns + step % shared_columns
        row_tile = tile // own_columns + step // shared_columns % shared_rows
        head = step // shared_columns // shared_rows
        b = part // heads + head // shared_heads
        h = part % heads + head % shared_heads
        rows = indices(row_tile * BLOCK_M, BLOCK_M, const)
        cols = indices(column_tile * BLOCK_N, BLOCK_N, const)
        i, j = rows[:, None], cols[None, :]
        key_head = h // const.GROUP
        q = load_qk(args.q, b, h, rows, args.Nq, const)
        do = load_v(args.do, b, h, rows, args.Nq, const)
        k = load_qk(args.k, b, key_head, cols, args.Nk, const)
        v = load_v(args.v, b, key_head, cols, args.Nk, const)
        top, weight = load_softmax(args, b, h, rows, scale, const)
        top, weight = top[:, None], weight[:, None]
        delta = load_statistic(stats.delta, args, b, h, rows)[:, None]
        p = probabilities(q, k, top, weight, args, b, h, i, j, scale, const, True)
        z = factors(args, load_words(stats.words, args, b, h, rows, 1), j, const)
        ds = p * (dropped(value_product(do, v, const), z) - delta)
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
                total += p * dropped(value_product(do, ddv, const), z)
    row, column = (tile // own_columns) * BLOCK_M, (tile % own_columns) * BLOCK_N
    row_count, column_count = args.Nq, args.Nk
    if ONE_ROW:
        total, row_count = tl.sum(total, 0, keep_dims=True), 1
    if ONE_COLUMN:
        total, column_count = tl.sum(total, 1, keep_dims=True), 1
    i = row + tl.arange(0, total.shape[0])[:, None]
    j = column + tl.arange(0, total.shape[1])[None, :]
    at = (split_part * row_count + i) * column_count + j
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, total, mask=(i < row_count) & (j < column_count))


@triton.jit
def attention_mask_sums_kernel(
    parts_ptr,  # [parts, size], dense
    out_ptr,  # [size], dense, written
    size,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over ``parts``. One program owns BLOCK_N of them and walks its parts BLOCK_M at a time, in order."""
    own = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], parts_ptr.dtype.element_ty)
    for start in range(0, parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        inside = (part < parts)[:, None] & (own < size)[None, :]
        total += tl.load(parts_ptr + part[:, None] * size + own[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + own, sums, mask=own < size)


def mask_gradient(
    args: Arguments,
    const: Constants,
    mask: Tensor,
    stats: RowStatistics,
    scale: float,
    q: Tensor,
) -> Tensor:
    """The gradient dmask, or gmask if ``stats`` has t, shaped like ``mask`` and in its dtype.

    Besides it at most as many numbers are allocated as twice the device's multiprocessors have in their tiles,
    whatever the number of queries and keys.
    """
    (B, H, Nq, _), (samples, heads, mask_rows, mask_columns) = q.shape, mask.shape
    plan = configs.MASK_GRADIENT.plan(target_of(q, max(const.WIDTH, const.VALUE_WIDTH)))
    shared = B if samples == 1 else 1, H if heads == 1 else 1

    def tiles(c: Any) -> int:
        return samples * heads * cdiv(mask_rows, c["BLOCK_M"]) * cdiv(mask_columns, c["BLOCK_N"])

    whole = cdiv(Nq, plan["BLOCK_M"]) * cdiv(args.Nk, plan["BLOCK_N"]) * B * H
    owned = max(1, tiles(plan))
    splits = max(1, min(whole // owned, 2 * (multiprocessors(q) or 0) // owned))
    out = allocate(tuple(mask.shape), mask.dtype, q)
    parts = out
    if splits > 1:
        parts = allocate((splits, *mask.shape), stats.delta.dtype, q)
    run_kernel(
        plan,
        attention_mask_gradient_kernel,
        lambda c: splits * tiles(c),
        args,
        parts,
        stats,
        scale,
        samples,
        heads,
        *shared,
        splits,
        const=chunked(const),
        ONE_ROW=mask_rows == 1,
        ONE_COLUMN=mask_columns == 1,
    )
    return out if parts is out else sum_into(out, parts)


def sum_into(out: Tensor, parts: Tensor) -> Tensor:
    """Write the sum over the first axis of ``parts`` into ``out``; returns it."""
    run_kernel(
        configs.MASK_SUMS.plan(target_of(out)),
        attention_mask_sums_kernel,
        lambda c: cdiv(out.numel(), c["BLOCK_N"]),
        parts,
        out,
        out.numel(),
        parts.shape[0],
    )
    return out
