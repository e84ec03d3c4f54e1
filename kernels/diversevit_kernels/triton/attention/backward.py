"""Attention backward on a GPU, (3)-(5), without atomics: row programs give dq, column programs dk and dv.

Traffic  a row tile reads its q, do once and all k, v of its head; a column tile its k, v once and all q, do.
         Outputs are written once. With few queries one program does both and reads everything once.
Δ        is summed from P ∘ dP where a tile holds all keys of its rows, else it is rowsum(dO ∘ O); row programs
         write it for the column programs.
Source   FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from ...common.contracts import QKV, AttentionBackward
from ..runtime.launch import run_kernel
from ..runtime.plan import target_of
from ..runtime.sizes import cdiv
from ..runtime.tensors import empty_heads, operand
from ..runtime.tiles import add_dot, as_number, scale_split
from . import configs
from .dropout import dropped, empty_words, factors, load_words, row_words
from .few_queries import delta_with_dropout
from .mask_gradient import mask_gradient
from .tiles import (
    FEW_QUERIES,
    RowStatistics,
    arguments,
    empty_statistic,
    first_row_tile,
    indices,
    last_key,
    load_qk,
    load_softmax,
    load_statistic,
    load_v,
    probabilities,
    probabilities_of_all_keys,
    program_tile,
    row_delta,
    row_delta_of_few_queries,
    store_qk,
    store_statistic,
    store_v,
    value_product,
    widest,
    zeros_qk,
    zeros_v,
)


@triton.jit
def attention_backward_rows_kernel(
    args,  # Arguments
    dq,  # Operand like q, written
    stats,  # RowStatistics: delta, written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    ALL_KEYS_IN_TILE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward, (3)-(5), dq. One program owns BLOCK_M query rows of one head and walks its keys BLOCK_N at a time."""
    b, h, tile = program_tile(tl.cdiv(args.Nq, BLOCK_M), args.H)
    scale = as_number(scale, const.ACC)
    rows = indices(tile * BLOCK_M, BLOCK_M, const)
    i, key_head = rows[:, None], h // const.GROUP
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    do = load_v(args.do, b, h, rows, args.Nq, const)
    top, share = load_softmax(args, b, h, rows, scale, const)
    top, share = top[:, None], share[:, None]
    words = row_words(args, stats.words, b, h, rows)
    sums = zeros_qk(BLOCK_M, const)
    if ALL_KEYS_IN_TILE:
        cols = indices(0, BLOCK_N, const)
        k = load_qk(args.k, b, key_head, cols, args.Nk, const)
        v = load_v(args.v, b, key_head, cols, args.Nk, const)
        p = probabilities_of_all_keys(q, k, top, args, b, h, i, cols[None, :], scale, const)
        dp = dropped(value_product(do, v, const), factors(args, words, cols[None, :], const))
        delta = tl.sum(p * dp, 1)
        store_statistic(stats.delta, args, b, h, rows, delta)
        sums = add_dot(sums, p * (dp - delta[:, None]), k.tile, const.PRECISION)
    else:
        delta = row_delta(args, stats, do, b, h, rows, const)[:, None]
        for start in range(0, last_key(tile, args, BLOCK_M, const), BLOCK_N):
            cols = indices(start, BLOCK_N, const)
            k = load_qk(args.k, b, key_head, cols, args.Nk, const)
            v = load_v(args.v, b, key_head, cols, args.Nk, const)
            p = probabilities(q, k, top, share, args, b, h, i, cols[None, :], scale, const)
            dp = dropped(value_product(do, v, const), factors(args, words, cols[None, :], const))
            ds = p * (dp - delta)
            sums = add_dot(sums, ds, k.tile, const.PRECISION)
    store_qk(dq, b, h, rows, args.Nq, scale_split(sums, scale), const)


@triton.jit
def attention_backward_columns_kernel(
    args,  # Arguments
    dk,  # Operand like k, written
    dv,  # Operand like v, written
    stats,  # RowStatistics: delta
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward, (3)-(5), dk and dv. One program owns BLOCK_N keys of one key head, transposed tiles [keys, queries].

    It walks the query rows of every query head of its group, BLOCK_M at a time.
    """
    b, key_head, tile = program_tile(tl.cdiv(args.Nk, BLOCK_N), args.H // const.GROUP)
    scale = as_number(scale, const.ACC)
    cols = indices(tile * BLOCK_N, BLOCK_N, const)
    k = load_qk(args.k, b, key_head, cols, args.Nk, const)
    v = load_v(args.v, b, key_head, cols, args.Nk, const)
    dk_sums = zeros_qk(BLOCK_N, const)
    dv_sums = zeros_v(BLOCK_N, const)
    first = first_row_tile(tile, BLOCK_M, BLOCK_N, const)
    for member in range(const.GROUP):
        h = key_head * const.GROUP + member
        for start in range(first * BLOCK_M, args.Nq, BLOCK_M):
            rows = indices(start, BLOCK_M, const)
            i, j = rows[None, :], cols[:, None]
            q = load_qk(args.q, b, h, rows, args.Nq, const)
            do = load_v(args.do, b, h, rows, args.Nq, const)
            top, share = load_softmax(args, b, h, rows, scale, const)
            top, share = top[None, :], share[None, :]
            delta = load_statistic(stats.delta, args, b, h, rows)[None, :]
            p = probabilities(k, q, top, share, args, b, h, i, j, scale, const, True)
            z = factors(args, load_words(stats.words, args, b, h, rows, 0), j, const)
            ds = p * (dropped(value_product(v, do, const), z) - delta)
            dv_sums = add_dot(dv_sums, dropped(p, z), do.tile, const.PRECISION)
            dk_sums = add_dot(dk_sums, ds, q.tile, const.PRECISION)
    store_qk(dk, b, key_head, cols, args.Nk, scale_split(dk_sums, scale), const)
    store_v(dv, b, key_head, cols, args.Nk, dv_sums, const)


@triton.jit
def attention_backward_few_queries_kernel(
    args,  # Arguments, Nq at most BLOCK_M, GROUP 1
    dq,  # Operand like q, written
    dk,  # Operand like k, written
    dv,  # Operand like v, written
    stats,  # RowStatistics: delta, written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    ALL_KEYS_IN_TILE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward, (3)-(5). One program owns one head whose queries all fit BLOCK_M rows, and walks its keys once."""
    b, h, _ = program_tile(1, args.H)
    scale = as_number(scale, const.ACC)
    rows = indices(0, BLOCK_M, const)
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    do = load_v(args.do, b, h, rows, args.Nq, const)
    top, share = load_softmax(args, b, h, rows, scale, const)
    words = row_words(args, stats.words, b, h, rows)
    if not ALL_KEYS_IN_TILE:
        if words is None:
            delta = row_delta_of_few_queries(args, stats, do, b, h, rows, const)
        else:
            delta = delta_with_dropout(
                q, do, top, share, words, args, stats, b, h, rows, scale, const, BLOCK_N
            )
    top, share = top[:, None], share[:, None]
    sums = zeros_qk(BLOCK_M, const)
    for start in range(0, args.Nk, BLOCK_N):
        cols = indices(start, BLOCK_N, const)
        i, j = rows[:, None], cols[None, :]
        k = load_qk(args.k, b, h, cols, args.Nk, const)
        v = load_v(args.v, b, h, cols, args.Nk, const)
        z = factors(args, words, j, const)
        if ALL_KEYS_IN_TILE:
            p = probabilities_of_all_keys(q, k, top, args, b, h, i, j, scale, const)
            dp = dropped(value_product(do, v, const), z)
            own_delta = tl.sum(p * dp, 1)
            store_statistic(stats.delta, args, b, h, rows, own_delta)
            ds = p * (dp - own_delta[:, None])
        else:
            p = probabilities(q, k, top, share, args, b, h, i, j, scale, const)
            ds = p * (dropped(value_product(do, v, const), z) - delta[:, None])
        sums = add_dot(sums, ds, k.tile, const.PRECISION)
        dk_tile = add_dot(zeros_qk(BLOCK_N, const), tl.trans(ds), q.tile, const.PRECISION)
        dv_tile = add_dot(
            zeros_v(BLOCK_N, const), tl.trans(dropped(p, z)), do.tile, const.PRECISION
        )
        store_qk(dk, b, h, cols, args.Nk, scale_split(dk_tile, scale), const)
        store_v(dv, b, h, cols, args.Nk, dv_tile, const)
    store_qk(dq, b, h, rows, args.Nq, scale_split(sums, scale), const)


def attention_backward(
    inputs: AttentionBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Attention backward, (3)-(5): ``dq``, ``dk``, ``dv`` like q, k, v, and ``dmask`` like the mask if ``mask_grad``.

    ``softmax`` is (1a). ``into``: where to write the first three.
    """
    q, k, v, mask, seed, o, softmax, do, is_causal, scale, dropout_p, mask_grad = inputs
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    given = q, k, v, mask, seed, is_causal, scale, dropout_p
    args, const = arguments(*given, softmax, o=o, do=do)
    target = target_of(q, widest(q, v))
    dq, dk, dv = into or map(empty_heads, (q, k, v))
    stats = RowStatistics(empty_statistic(q), words=empty_words(q, seed))
    if Nq <= FEW_QUERIES and const.GROUP == 1:
        plan = configs.BACKWARD_FEW_QUERIES.plan(target)
        all_keys = plan.holding(Nk, "BLOCK_N")
        run_kernel(
            all_keys or plan,
            attention_backward_few_queries_kernel,
            lambda _: B * H,
            args,
            operand(dq),
            operand(dk),
            operand(dv),
            stats,
            scale,
            const=const,
            ALL_KEYS_IN_TILE=all_keys is not None,
        )
    else:
        plan = configs.BACKWARD_ROWS.plan(target)
        all_keys = configs.BACKWARD_ROWS_ALL_KEYS.holding(Nk, "BLOCK_N", target)
        all_keys = all_keys or plan.holding(Nk, "BLOCK_N")
        run_kernel(
            all_keys or plan,
            attention_backward_rows_kernel,
            lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
            args,
            operand(dq),
            stats,
            scale,
            const=const,
            ALL_KEYS_IN_TILE=all_keys is not None,
        )
        run_kernel(
            configs.BACKWARD_COLUMNS.plan(target),
            attention_backward_columns_kernel,
            lambda c: B * key_heads * cdiv(Nk, c["BLOCK_N"]),
            args,
            operand(dk),
            operand(dv),
            stats,
            scale,
            const=const,
        )
    dmask = None
    if mask_grad and mask is not None:
        dmask = mask_gradient(args, const, mask, stats, scale, q)
    return dq, dk, dv, dmask
