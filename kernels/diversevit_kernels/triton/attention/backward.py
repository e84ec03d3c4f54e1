"""Attention backward on a GPU, (3)-(5), without atomics: row programs give dq, column programs dk and dv.

Traffic  a row tile reads its q, do once and all k, v of its head; a column tile its k, v once and all q, do.
         Outputs are written once. With few queries one program does both and reads everything once.
D        is summed from P ∘ dP where a tile holds whole rows, else is rowsum(do ∘ o); row programs write it for
         the column programs.
Source   FlashAttention-2 (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.configurations import fits
from ..runtime.launch import cdiv, launch
from ..runtime.tiles import add_dot, scale_split, zeros_split
from .mask_gradient import mask_gradient
from .tiles import (
    FEW_QUERIES,
    as_number,
    empty_heads,
    empty_statistic,
    few_delta,
    first_row_tile,
    indices,
    last_key,
    load_rows,
    load_softmax,
    load_statistic,
    operand,
    probabilities,
    problem,
    product,
    program_tile,
    row_delta,
    store_rows,
    store_statistic,
    whole_probabilities,
)


@triton.jit
def _rows_kernel(
    P,  # Problem
    dq,  # Operand like q
    delta_ptr,  # [B, H, Nq], dense: D, written
    scale: tl.float64,
    S: tl.constexpr,  # Static
    WHOLE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(3)-(5), dq. One program owns BLOCK_M query rows of one head and walks its keys BLOCK_N at a time."""
    b, h, tile = program_tile(tl.cdiv(P.Nq, BLOCK_M), P.H)
    scale = as_number(scale, S.ACC)
    rows = indices(tile * BLOCK_M, BLOCK_M, S)
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    top, share = load_softmax(P, b, h, rows)
    sums = zeros_split(BLOCK_M, S.WIDTHS, S.ACC)
    if WHOLE:
        cols = indices(0, BLOCK_N, S)
        k = load_rows(P.k, b, h // S.GROUP, cols, P.Nk, S.WIDTH, S.WIDTHS)
        v = load_rows(P.v, b, h // S.GROUP, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        p = whole_probabilities(q, k, top[:, None], P, b, h, rows[:, None], cols[None, :], scale, S)
        dp = product(do, v, S.VALUE_WIDTH, S)
        delta = tl.sum(p * dp, 1)
        store_statistic(delta_ptr, P, b, h, rows, delta)
        sums = add_dot(sums, p * (dp - delta[:, None]), k.tile, S.PRECISION)
    else:
        delta = row_delta(P, delta_ptr, do, b, h, rows, S)[:, None]
        for start in range(0, last_key(tile, P, BLOCK_M, S), BLOCK_N):
            cols = indices(start, BLOCK_N, S)
            k = load_rows(P.k, b, h // S.GROUP, cols, P.Nk, S.WIDTH, S.WIDTHS)
            v = load_rows(P.v, b, h // S.GROUP, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
            p = probabilities(
                q, k, top[:, None], share[:, None], P, b, h, rows[:, None], cols[None, :], scale, S
            )
            ds = p * (product(do, v, S.VALUE_WIDTH, S) - delta)
            sums = add_dot(sums, ds, k.tile, S.PRECISION)
    store_rows(dq, b, h, rows, P.Nq, scale_split(sums, scale), S.WIDTH, S.WIDTHS)


@triton.jit
def _columns_kernel(
    P,  # Problem
    dk,  # Operand like k
    dv,  # Operand like v
    delta_ptr,  # [B, H, Nq], dense: D
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(3)-(5), dk and dv. One program owns BLOCK_N keys of one key head, transposed tiles [keys, queries].

    It walks the query rows of every query head of its group, BLOCK_M at a time.
    """
    b, key_head, tile = program_tile(tl.cdiv(P.Nk, BLOCK_N), P.H // S.GROUP)
    scale = as_number(scale, S.ACC)
    cols = indices(tile * BLOCK_N, BLOCK_N, S)
    k = load_rows(P.k, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
    v = load_rows(P.v, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    dk_sums = zeros_split(BLOCK_N, S.WIDTHS, S.ACC)
    dv_sums = zeros_split(BLOCK_N, S.VALUE_WIDTHS, S.ACC)
    first = first_row_tile(tile, BLOCK_M, BLOCK_N, S)
    for member in range(S.GROUP):
        h = key_head * S.GROUP + member
        for start in range(first * BLOCK_M, P.Nq, BLOCK_M):
            rows = indices(start, BLOCK_M, S)
            q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
            do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
            top, share = load_softmax(P, b, h, rows)
            delta = load_statistic(delta_ptr, P, b, h, rows, 0.0)[None, :]
            top, share = top[None, :], share[None, :]
            p = probabilities(k, q, top, share, P, b, h, rows[None, :], cols[:, None], scale, S)
            ds = p * (product(v, do, S.VALUE_WIDTH, S) - delta)
            dv_sums = add_dot(dv_sums, p, do.tile, S.PRECISION)
            dk_sums = add_dot(dk_sums, ds, q.tile, S.PRECISION)
    dk_tile = scale_split(dk_sums, scale)
    store_rows(dk, b, key_head, cols, P.Nk, dk_tile, S.WIDTH, S.WIDTHS)
    store_rows(dv, b, key_head, cols, P.Nk, dv_sums, S.VALUE_WIDTH, S.VALUE_WIDTHS)


@triton.jit
def _few_kernel(
    P,  # Problem, Nq at most BLOCK_M, GROUP 1
    dq,  # Operand like q
    dk,  # Operand like k
    dv,  # Operand like v
    delta_ptr,  # [B, H, Nq], dense: D, written
    scale: tl.float64,
    S: tl.constexpr,  # Static
    WHOLE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(3)-(5). One program owns one head whose queries all fit BLOCK_M rows, and walks its keys once."""
    b, h, _ = program_tile(1, P.H)
    scale = as_number(scale, S.ACC)
    rows = indices(0, BLOCK_M, S)
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    top, share = load_softmax(P, b, h, rows)
    if not WHOLE:
        delta = few_delta(P, delta_ptr, do, b, h, rows, S)[:, None]
    sums = zeros_split(BLOCK_M, S.WIDTHS, S.ACC)
    for start in range(0, P.Nk, BLOCK_N):
        cols = indices(start, BLOCK_N, S)
        k = load_rows(P.k, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
        v = load_rows(P.v, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        i, j = rows[:, None], cols[None, :]
        if WHOLE:
            p = whole_probabilities(q, k, top[:, None], P, b, h, i, j, scale, S)
        else:
            p = probabilities(q, k, top[:, None], share[:, None], P, b, h, i, j, scale, S)
        dp = product(do, v, S.VALUE_WIDTH, S)
        if WHOLE:
            total = tl.sum(p * dp, 1)
            store_statistic(delta_ptr, P, b, h, rows, total)
            ds = p * (dp - total[:, None])
        else:
            ds = p * (dp - delta)
        sums = add_dot(sums, ds, k.tile, S.PRECISION)
        dk_tile = add_dot(zeros_split(BLOCK_N, S.WIDTHS, S.ACC), tl.trans(ds), q.tile, S.PRECISION)
        dk_tile = scale_split(dk_tile, scale)
        dv_tile = zeros_split(BLOCK_N, S.VALUE_WIDTHS, S.ACC)
        dv_tile = add_dot(dv_tile, tl.trans(p), do.tile, S.PRECISION)
        store_rows(dk, b, h, cols, P.Nk, dk_tile, S.WIDTH, S.WIDTHS)
        store_rows(dv, b, h, cols, P.Nk, dv_tile, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    store_rows(dq, b, h, rows, P.Nq, scale_split(sums, scale), S.WIDTH, S.WIDTHS)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(3)-(5): ``dq``, ``dk``, ``dv`` like q, k, v, and ``dmask`` like the mask if ``mask_grad``.

    ``softmax`` is (1a). ``into``: where to write the first three.
    """
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    reads, static = problem(q, k, v, mask, is_causal, softmax, o=o, do=do)
    width = max(static.WIDTH, static.VALUE_WIDTH)
    dq, dk, dv = into or map(empty_heads, (q, k, v))
    delta = empty_statistic(q)
    if Nq <= FEW_QUERIES and static.GROUP == 1:
        results = operand(dq), operand(dk), operand(dv), delta
        heads = B * H
        name = "attention_backward_few"
        whole = fits(name, q, width, "BLOCK_N", Nk)
        common = (q, width, reads, *results, scale)
        launch(name, _few_kernel, lambda _: heads, *common, S=static, WHOLE=whole)
    else:
        name = "attention_backward_rows_whole"
        whole = fits(name, q, width, "BLOCK_N", Nk)
        launch(
            name if whole else "attention_backward_rows",
            _rows_kernel,
            lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
            q,
            width,
            reads,
            operand(dq),
            delta,
            scale,
            S=static,
            WHOLE=whole,
        )
        launch(
            "attention_backward_columns",
            _columns_kernel,
            lambda c: B * k.shape[1] * cdiv(Nk, c["BLOCK_N"]),
            q,
            width,
            reads,
            operand(dk),
            operand(dv),
            delta,
            scale,
            S=static,
        )
    dmask = None
    if mask_grad and mask is not None:
        dmask = mask_gradient(reads, static, mask, delta, None, None, scale, q)
    return dq, dk, dv, dmask
