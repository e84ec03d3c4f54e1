"""Attention forward on a GPU, (1)-(2): softmax over key tiles with running maxima.

Traffic  a row tile reads its q once and all k, v of its head; o and the softmax's statistics are written once.
Source   the running softmax is Milakov and Gimelshein's (arXiv 1805.02867), tiled as in FlashAttention-2
         (arXiv 2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import run_kernel
from ..runtime.plan import target_of
from ..runtime.sizes import cdiv
from ..runtime.tensors import allocate, operand
from ..runtime.tiles import add_dot, as_number, scale_split
from . import configs
from .dropout import dropped, factors, row_words
from .tiles import (
    FEW_QUERIES,
    arguments,
    empty_softmax,
    exp_of_scores,
    indices,
    last_key,
    load_qk,
    load_v,
    program_tile,
    scores,
    share_of,
    store_softmax,
    store_v,
    widest,
    zeros_v,
)


@triton.jit
def attention_forward_kernel(
    args,  # Arguments
    o,  # Operand [B, H, Nq, VALUE_WIDTH], written
    softmax_ptr,  # [B, H, 2, Nq], dense: (1a), written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Forward, (1)-(2). One program owns BLOCK_M query rows of one head and walks its keys BLOCK_N at a time.

    It carries the row maximum ``top``, the sum ``total`` of exp(S − top) and the matching sum of rows of v; a
    new maximum rescales both. Rows that attend to nothing have total 0: o = 0, and top = +inf is kept.
    """
    b, h, tile = program_tile(tl.cdiv(args.Nq, BLOCK_M), args.H)
    scale = as_number(scale, const.ACC)
    rows = indices(tile * BLOCK_M, BLOCK_M, const)
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    words = row_words(args, None, b, h, rows)

    top = tl.full([BLOCK_M], float("-inf"), const.ACC)
    total = tl.zeros([BLOCK_M], const.ACC)
    sums = zeros_v(BLOCK_M, const)
    for start in range(0, last_key(tile, args, BLOCK_M, const), BLOCK_N):
        cols = indices(start, BLOCK_N, const)
        k = load_qk(args.k, b, h // const.GROUP, cols, args.Nk, const)
        v = load_v(args.v, b, h // const.GROUP, cols, args.Nk, const)
        s = scores(q, k, args, b, h, rows[:, None], cols[None, :], scale, const)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = exp_of_scores(s - shift[:, None], scale, const)
        shrink = exp_of_scores(top - shift, scale, const)
        total = total * shrink + tl.sum(p, 1)
        p = dropped(p, factors(args, words, cols[None, :], const))
        sums = add_dot(scale_split(sums, shrink[:, None]), p, v.tile, const.PRECISION)
        top = new_top

    share = share_of(total)
    store_v(o, b, h, rows, args.Nq, scale_split(sums, share[:, None]), const)
    top = tl.where(total == 0.0, float("inf"), top)
    store_softmax(softmax_ptr, args, b, h, rows, top, share, scale, const)


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
    """Attention forward, (1)-(2): output ``[B, H, Nq, d_v]`` and the softmax's statistics (1a) ``[B, H, 2, Nq]``."""
    B, H, Nq, _ = q.shape
    args, const = arguments(q, k, v, mask, seed, is_causal, scale, dropout_p)
    o = allocate((B, Nq, H, v.shape[-1]), q.dtype, q).transpose(1, 2)
    softmax = empty_softmax(q)
    table = configs.FORWARD_FEW_QUERIES if Nq <= FEW_QUERIES else configs.FORWARD
    run_kernel(
        table.plan(target_of(q, widest(q, v))),
        attention_forward_kernel,
        lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
        args,
        operand(o),
        softmax,
        scale,
        const=const,
    )
    return o, softmax
