"""Sums over what many programs made, without atomics: the same bits on every run.

Over rows, in two steps: each of a fixed number of programs walks its tiles of rows in order and writes its own sums; a
second kernel adds those in order. Of one number per program: one program adds them all, in order.

Traffic  programs x WIDTH numbers of the accumulation dtype out and in again, for each sum.
Source   Triton's layer-norm tutorial, with Liger's persistent programs in place of its locks.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import accumulator
from .launch import run_kernel
from .plan import ANY_SIZE, ANY_WIDTH, EVERY_CHIP, INTERPRETER, LaunchTable, row, target_of
from .sizes import cdiv
from .tensors import allocate

PARTIAL_SUMS = LaunchTable(
    "partial_sums",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_P=2, BLOCK_N=16),
    row(EVERY_CHIP, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_P=32, BLOCK_N=32),
)

TOTAL_SUM = LaunchTable(
    "total_sum",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK=16),
    row(EVERY_CHIP, ANY_SIZE, ANY_WIDTH, warps=16, stages=1, BLOCK=8192),
)


@triton.jit
def partial_sums_kernel(
    one_ptr,  # [parts, WIDTH], dense, or None
    two_ptr,  # [parts, WIDTH], dense, or None
    one_sum_ptr,  # [WIDTH], or None like one_ptr
    two_sum_ptr,  # [WIDTH], or None like two_ptr
    parts,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Two sums over rows from their parts. One program owns BLOCK_N columns."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _sum_parts(one_ptr, one_sum_ptr, col, parts, WIDTH, ACC, BLOCK_P)
    _sum_parts(two_ptr, two_sum_ptr, col, parts, WIDTH, ACC, BLOCK_P)


@triton.jit
def _sum_parts(
    ptr, sum_ptr, col, parts, WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The columns ``col`` of [parts, WIDTH] summed, and rounded; nothing of None."""
    if ptr is not None:
        total = tl.zeros([BLOCK_P, col.shape[0]], ACC)
        for first in range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)
            inside = (part < parts)[:, None] & (col < WIDTH)[None, :]
            total += tl.load(ptr + part[:, None] * WIDTH + col[None, :], mask=inside, other=0.0)
        value = tl.sum(total, 0).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + col, value, mask=col < WIDTH)


def sum_over_programs(
    parts: list[Tensor | None], sums: list[Tensor | None], programs: int, width: int, like: Tensor
) -> None:
    """Add what the programs summed; starts nothing if no sum is wanted.

    Args:
        parts: two of [programs, width], or None.
        sums: two of [width], written; None where ``parts`` is.
        like: a tensor in the dtype whose accumulator the parts are in.
    """
    if all(s is None for s in sums):
        return
    run_kernel(
        PARTIAL_SUMS.plan(target_of(like, width)),
        partial_sums_kernel,
        lambda c: cdiv(width, c["BLOCK_N"]),
        *parts,
        *sums,
        programs,
        WIDTH=width,
        ACC=accumulator(like.dtype),
    )


@triton.jit
def total_sum_kernel(
    x_ptr,  # [n], dense
    sum_ptr,  # []
    n,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of n numbers. One program owns them all."""
    total = tl.zeros([BLOCK], ACC)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(sum_ptr, tl.sum(total, 0))


def total_of(x: Tensor) -> Tensor:
    """The sum of a dense tensor in an accumulation dtype, ``[]``."""
    total = allocate((), x.dtype, x)
    given = x, total, x.numel()
    run_kernel(
        TOTAL_SUM.plan(target_of(x)),
        total_sum_kernel,
        lambda _: 1,
        *given,
        ACC=accumulator(x.dtype),
    )
    return total
