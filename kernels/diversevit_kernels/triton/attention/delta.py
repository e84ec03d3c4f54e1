"""D of (3) from the saved output, and on request the raw Gram matrix of the heads' output gradients.

Traffic  o and do are read once; D, H numbers a token, and the Gram matrix, H² numbers, are written once.
Source   D = rowsum(do ∘ o) is FlashAttention-2's preprocess; the Gram matrix is (30) for g_h = do.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.configurations import accumulator, precision
from ..runtime.launch import allocate, launch, power_of_two, split_width
from ..runtime.tiles import dot_nt, load_split
from .tiles import empty_statistic, operand


@triton.jit
def _delta_kernel(
    o,  # Operand [B, H, N, WIDTH]
    do,  # Operand [B, H, N, WIDTH]
    delta_ptr,  # [B, H, N], dense: D
    gram_ptr,  # [B, N, H, H], dense: R of (30); or None
    H,
    N,
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(3), (30). One program owns one token of one sample, with all its heads as rows."""
    program = tl.program_id(0).to(tl.int64)
    b, n = program // N, program % N
    heads = tl.arange(0, BLOCK_H).to(tl.int64)
    o_at, do_at = o.ptr + b * o.sample + n * o.row, do.ptr + b * do.sample + n * do.row
    o_tile = load_split(o_at, o.head, o.col, heads, heads < H, WIDTH, WIDTHS)
    do_tile = load_split(do_at, do.head, do.col, heads, heads < H, WIDTH, WIDTHS)
    delta = tl.zeros([BLOCK_H], ACC)
    for i in tl.static_range(len(WIDTHS)):
        delta += tl.sum(o_tile[i].to(ACC) * do_tile[i].to(ACC), 1)
    tl.store(delta_ptr + (b * H + heads) * N + n, delta, mask=heads < H)
    if gram_ptr is not None:
        gram = dot_nt(do_tile, do_tile, tl.zeros([BLOCK_H, BLOCK_H], ACC), PRECISION)
        at = program * H * H + heads[:, None] * H + heads[None, :]
        tl.store(gram_ptr + at, gram, mask=(heads[:, None] < H) & (heads[None, :] < H))


def attention_delta(o: Tensor, do: Tensor, gram: bool = False) -> tuple[Tensor, Tensor | None]:
    """D ``[B, H, N]`` and, if asked, the raw Gram matrix ``[B, N, H, H]`` of do's heads."""
    B, H, N, width = o.shape
    delta = empty_statistic(o)
    raw = allocate((B, N, H, H), delta.dtype, o) if gram else None
    launch(
        "attention_delta",
        _delta_kernel,
        lambda _: B * N,
        o,
        width,
        operand(o),
        operand(do),
        delta,
        raw,
        H,
        N,
        WIDTH=width,
        WIDTHS=split_width(width),
        ACC=accumulator(o.dtype),
        PRECISION=precision(o),
        BLOCK_H=max(16, power_of_two(H)),
    )
    return delta, raw
