"""Gradients of LayerNorm's parameters: sums over rows in two stages, without atomics.

Each of a fixed number of programs walks its tiles of rows in order and writes its own sums; a second
kernel adds those in order. Same bits on every run.

Traffic  programs x WIDTH numbers of the accumulation dtype out and in again, for each gradient.
Source   Triton's layer-norm tutorial, with Liger's persistent programs in place of its locks.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.configurations import accumulator, configuration, multiprocessors
from ..runtime.launch import cdiv, launch, power_of_two
from .tiles import rows_per_tile


@triton.jit
def store_sums(ptr, program, tile, WIDTH: tl.constexpr):
    """A tile summed over its rows, as row ``program`` of [programs, WIDTH]; nothing of None."""
    if ptr is not None:
        col = tl.arange(0, tile.shape[1])
        tl.store(ptr + program * WIDTH + col, tl.sum(tile, 0), mask=col < WIDTH)


@triton.jit
def _sums_kernel(
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
    """The sums over rows in (14) and (19), from their parts. One program owns BLOCK_N features."""
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


def programs_of(name: str, x: Tensor, rows: int, width: int) -> int:
    """Programs that share the rows of a backward pass: a tile for each, up to two per multiprocessor.

    Kernels stride by the grid they find, so this is right for tiles of any size: autotuning tries several.
    """
    most = 2 * (multiprocessors(x) or 128)
    tile = configuration(name, x, width)["TILE"]
    return min(most, cdiv(rows, rows_per_tile(tile, power_of_two(width))))


def sum_over_programs(
    parts: list[Tensor | None], sums: list[Tensor | None], programs: int, width: int, x: Tensor
) -> None:
    """Add what the programs summed; starts nothing if no parameter wants a gradient."""
    if all(s is None for s in sums):
        return
    launch(
        "layer_norm_sums",
        _sums_kernel,
        lambda c: cdiv(width, c["BLOCK_N"]),
        x,
        width,
        *parts,
        *sums,
        programs,
        WIDTH=width,
        ACC=accumulator(x.dtype),
    )
