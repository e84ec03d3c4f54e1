"""Attention double backward on a GPU, (6)-(9), without atomics: which programs do what.

Few queries       one program does a head (``attention_double_backward_few_queries_kernel``).
Otherwise         row programs give gq and gdo, and Δ, η and t for the column programs, which give gk and gv. Where the
                  keys fit a tile, a row program holds all of them and its row sums are sums of tiles; else it walks
                  them once and corrects its sums at the end.
Enough heads      for the device, no mask and no groups (either costs registers), and so few keys that a head's
                  tensors stay in the L2 cache: one program does rows and columns of a head
                  (``attention_double_backward_head_kernel``).

Traffic  a row tile reads its rows of q, do, ddq (o, dq) once and all k, v, ddk, ddv; a column tile the reverse.
Source   derived in kernels/README.md, (6)-(9) and (46)-(49).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.configurations import fills, fits, has_configuration
from ..runtime.launch import cdiv, launch
from .backward import attention_backward
from .double_backward_tiles import columns, rows_in_one_pass, rows_with_all_keys
from .few_queries import head_with_few_queries
from .mask_gradient import mask_gradient
from .tiles import (
    FEW_QUERIES,
    Operand,
    RowStatistics,
    arguments,
    as_number,
    chunked,
    empty_heads,
    empty_statistic,
    operand,
    program_tile,
    widest,
)

FEW, HEAD, ROWS = (f"attention_double_backward_{name}" for name in ("few", "head", "rows"))
"""Launches, by their names in the table; HEAD and ROWS have a variant ``_whole``."""

HEAD_KEYS = 256
"""Up to so many keys, one program may do a whole head: its tensors stay in the L2 cache between the two phases."""


class Gradients(NamedTuple):
    """The results that the kernels write, besides the row statistics."""

    gq: Operand  # like q
    gk: Operand  # like k
    gv: Operand  # like v
    gdo: Operand  # like do
    end: int = 1  # as in Arguments


@triton.jit
def attention_double_backward_rows_kernel(
    args,  # Arguments
    out,  # Gradients: gq, gdo
    stats,  # RowStatistics, written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    ALL_KEYS_IN_TILE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Double backward, (6)-(9), gq and gdo. One program owns BLOCK_M query rows of one head."""
    b, h, tile = program_tile(tl.cdiv(args.Nq, BLOCK_M), args.H)
    scale = as_number(scale, const.ACC)
    if ALL_KEYS_IN_TILE:
        rows_with_all_keys(args, out, stats, b, h, tile, scale, const, BLOCK_M, BLOCK_N)
    else:
        rows_in_one_pass(args, out, stats, b, h, tile, scale, const, BLOCK_M, BLOCK_N)


@triton.jit
def attention_double_backward_columns_kernel(
    args,  # Arguments
    out,  # Gradients: gk, gv
    stats,  # RowStatistics
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Double backward, (6)-(9), gk and gv. One program owns BLOCK_N keys of one key head."""
    b, key_head, tile = program_tile(tl.cdiv(args.Nk, BLOCK_N), args.H // const.GROUP)
    scale = as_number(scale, const.ACC)
    columns(args, out, stats, b, key_head, tile, scale, const, BLOCK_M, BLOCK_N)


@triton.jit
def attention_double_backward_head_kernel(
    args,  # Arguments, GROUP 1
    out,  # Gradients
    stats,  # RowStatistics, written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    ALL_KEYS_IN_TILE: tl.constexpr,  # ROW_KEYS holds all keys
    ROW_TILE: tl.constexpr,  # rows of a row tile
    ROW_KEYS: tl.constexpr,  # keys of its step
    BLOCK_M: tl.constexpr,  # rows of a column tile's step
    BLOCK_N: tl.constexpr,  # keys of a column tile
):
    """Double backward, (6)-(9). One program owns one head: all its row tiles, then all its column tiles.

    The barrier between them makes ``stats``, written by other threads of the program, visible.
    """
    b, h, _ = program_tile(1, args.H)
    scale = as_number(scale, const.ACC)
    for tile in range(tl.cdiv(args.Nq, ROW_TILE)):
        if ALL_KEYS_IN_TILE:
            rows_with_all_keys(args, out, stats, b, h, tile, scale, const, ROW_TILE, ROW_KEYS)
        else:
            rows_in_one_pass(args, out, stats, b, h, tile, scale, const, ROW_TILE, ROW_KEYS)
    tl.debug_barrier()
    for tile in range(tl.cdiv(args.Nk, BLOCK_N)):
        columns(args, out, stats, b, h, tile, scale, const, BLOCK_M, BLOCK_N)


@triton.jit
def attention_double_backward_few_queries_kernel(
    args,  # Arguments, Nq at most BLOCK_M, GROUP 1
    out,  # Gradients
    stats,  # RowStatistics, written
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Double backward, (6)-(9). One program owns one head whose queries all fit BLOCK_M rows."""
    b, h, _ = program_tile(1, args.H)
    scale = as_number(scale, const.ACC)
    head_with_few_queries(args, out, stats, b, h, scale, const, BLOCK_M, BLOCK_N)


def _plan(q: Tensor, k: Tensor, mask: Tensor | None, width: int) -> tuple[str, bool]:
    """The first launch by its name in the table, and whether a row tile holds all keys.

    HEAD and ROWS, which do not, read dq.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    grouped = key_heads != H
    if Nq <= FEW_QUERIES and not grouped:
        return FEW, False
    may_do_a_head = mask is None and not grouped and Nk <= HEAD_KEYS
    by_head = may_do_a_head and has_configuration(HEAD, q, width) and fills(q, B * H)
    name, block = (HEAD, "ROW_KEYS") if by_head else (ROWS, "BLOCK_N")
    all_keys_in_tile = fits(f"{name}_whole", q, width, block, Nk)
    return f"{name}_whole" if all_keys_in_tile else name, all_keys_in_tile


def attention_double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    dq: Tensor | None,
    ddq: Tensor | None,
    ddk: Tensor | None,
    ddv: Tensor | None,
    ddmask: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Attention double backward, (6)-(9): ``gq``, ``gk``, ``gv``, ``gdo``, and ``gmask`` if ``mask_grad``.

    ``softmax`` is (1a), ``dq`` the result of (5): where it is None and read, the backward runs again. An absent
    cotangent costs nothing: its products are not compiled.
    ``into``: where to write the first three.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    width = widest(q, v)
    name, all_keys_in_tile = _plan(q, k, mask, width)
    has_dds = not (ddq is None and ddk is None and ddmask is None)
    if dq is None and has_dds and name in (HEAD, ROWS):
        dq = attention_backward(q, k, v, mask, o, softmax, do, is_causal, scale, False)[0]
    more = {"o": o, "do": do, "dq": dq, "ddq": ddq, "ddk": ddk, "ddv": ddv, "ddmask": ddmask}
    args, const = arguments(q, k, v, mask, is_causal, softmax, **more)
    gq, gk, gv = into or map(empty_heads, (q, k, v))
    gdo = empty_heads(do)
    out = Gradients(*map(operand, (gq, gk, gv, gdo)))  # pyright: ignore[reportArgumentType]
    stats = RowStatistics(*(empty_statistic(q) for _ in range(3)))
    common = (q, width, args, out, stats, scale)
    if name == FEW:
        few_queries = attention_double_backward_few_queries_kernel
        launch(name, few_queries, lambda _: B * H, *common, const=chunked(const))
    elif name.startswith(HEAD):
        launch(
            name,
            attention_double_backward_head_kernel,
            lambda _: B * H,
            *common,
            const=const,
            ALL_KEYS_IN_TILE=all_keys_in_tile,
        )
    else:
        launch(
            name,
            attention_double_backward_rows_kernel,
            lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
            *common,
            const=const,
            ALL_KEYS_IN_TILE=all_keys_in_tile,
        )
        launch(
            "attention_double_backward_columns",
            attention_double_backward_columns_kernel,
            lambda c: B * key_heads * cdiv(Nk, c["BLOCK_N"]),
            *common,
            const=const,
        )
    gmask = None
    if mask_grad and mask is not None:
        gmask = mask_gradient(args, const, mask, stats, scale, q)
    return gq, gk, gv, gdo, gmask
