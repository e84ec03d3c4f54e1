"""Attention forward on a GPU, (1)-(2): softmax over key tiles with running maxima.

Traffic  a row tile reads its q once and all k, v of its head; o and the softmax's statistics are written once.
Source   the running softmax is Milakov and Gimelshein's (arXiv 1805.02867), tiled as in FlashAttention-2
         (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import allocate, cdiv, launch
from ..runtime.tiles import add_dot, scale_split, zeros_split
from .tiles import (
    FEW_QUERIES,
    as_number,
    empty_softmax,
    indices,
    last_key,
    load_rows,
    operand,
    problem,
    program_tile,
    scores,
    share_of,
    store_rows,
    store_softmax,
)


@triton.jit
def _forward_kernel(
    P,  # Problem
    o,  # Operand [B, H, Nq, VALUE_WIDTH]
    softmax_ptr,  # [B, H, 2, Nq], dense: (1a), written
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(1)-(2). One program owns BLOCK_M query rows of one head and walks its keys BLOCK_N at a time.

    It carries the row maximum ``top``, the sum ``total`` of exp(S − top) and the matching sum of rows of v; a
    new maximum rescales both. Rows that attend to nothing have total 0: o = 0, and top = +inf is kept.
    """
    b, h, tile = program_tile(tl.cdiv(P.Nq, BLOCK_M), P.H)
    scale = as_number(scale, S.ACC)
    rows = indices(tile * BLOCK_M, BLOCK_M, S)
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)

    top = tl.full([BLOCK_M], float("-inf"), S.ACC)
    total = tl.zeros([BLOCK_M], S.ACC)
    sums = zeros_split(BLOCK_M, S.VALUE_WIDTHS, S.ACC)
    for start in range(0, last_key(tile, P, BLOCK_M, S), BLOCK_N):
        cols = indices(start, BLOCK_N, S)
        k = load_rows(P.k, b, h // S.GROUP, cols, P.Nk, S.WIDTH, S.WIDTHS)
        v = load_rows(P.v, b, h // S.GROUP, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        s = scores(q, k, P, b, h, rows[:, None], cols[None, :], scale, S)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        sums = add_dot(scale_split(sums, shrink[:, None]), p, v.tile, S.PRECISION)
        top = new_top

    share = share_of(total)
    o_tile = scale_split(sums, share[:, None])
    store_rows(o, b, h, rows, P.Nq, o_tile, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    top = tl.where(total == 0.0, float("inf"), top)
    store_softmax(softmax_ptr, P, b, h, rows, top, share)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(1)-(2): output ``[B, H, Nq, dv]`` and (1a) ``[B, H, 2, Nq]``."""
    B, H, Nq, _ = q.shape
    reads, static = problem(q, k, v, mask, is_causal)
    o = allocate((B, Nq, H, v.shape[-1]), q.dtype, q).transpose(1, 2)
    softmax = empty_softmax(q)
    launch(
        "attention_forward_few" if Nq <= FEW_QUERIES else "attention_forward",
        _forward_kernel,
        lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
        q,
        max(static.WIDTH, static.VALUE_WIDTH),
        reads,
        operand(o),
        softmax,
        scale,
        S=static,
    )
    return o, softmax
