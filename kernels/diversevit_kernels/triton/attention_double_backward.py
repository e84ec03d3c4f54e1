"""Attention double backward on a GPU, (6)-(9), without atomics: which programs do what.

Few queries       one program does a head (``_few_kernel``).
Keys fit a tile   (Nk up to 256) a row tile holds all its keys, so D, x and t cost no second pass. Enough heads: one
                  program does a head, row tiles, then column tiles (``_head_kernel``), and everything it reads stays
                  in the L2 cache. Few heads: rows and columns are two launches.
Otherwise         ``attention_delta``, a row program that walks its keys once, then the columns.

Row programs give gq and gdo, and x and t for the column programs, which give gk and gv.
Traffic  a row tile reads its rows of q, do, ddq (o, dq) once and all k, v, ddk, ddv; a column tile the reverse.
Source   derived in kernels/README.md, (6)-(9).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_curvature import columns_of_tile, rows_in_one_pass, rows_of_whole_tile
from .attention_curvature_few import few_queries
from .attention_delta import attention_delta
from .attention_mask_gradient import mask_gradient
from .attention_tiles import (
    FEW_QUERIES,
    Operand,
    as_number,
    empty_heads,
    empty_statistic,
    operand,
    problem,
    program_tile,
)
from .configurations import fills, fits
from .launch import cdiv, launch


class Results(NamedTuple):
    """What the kernels write; x only if S.HAS_X, delta unless it is given."""

    gq: Operand  # like q
    gk: Operand  # like k
    gv: Operand  # like v
    gdo: Operand  # like do
    delta: Tensor  # [B, H, Nq], dense: D of (3)
    x: Tensor  # [B, H, Nq], dense: x of (7)
    t: Tensor  # [B, H, Nq], dense: rowsum(R') of (8)


@triton.jit
def _rows_kernel(
    P,  # Problem
    R,  # Results: gq, gdo, x, t; delta if WHOLE
    scale: tl.float64,
    S: tl.constexpr,  # Static
    WHOLE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(6)-(9), gq and gdo. One program owns BLOCK_M query rows of one head."""
    b, h, tile = program_tile(tl.cdiv(P.Nq, BLOCK_M), P.H)
    if WHOLE:
        rows_of_whole_tile(P, R, b, h, tile, as_number(scale, S.ACC), S, BLOCK_M, BLOCK_N)
    else:
        rows_in_one_pass(P, R, b, h, tile, as_number(scale, S.ACC), S, BLOCK_M, BLOCK_N)


@triton.jit
def _columns_kernel(
    P,  # Problem
    R,  # Results: gk, gv; reads delta, x, t
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(6)-(9), gk and gv. One program owns BLOCK_N keys of one key head."""
    b, key_head, tile = program_tile(tl.cdiv(P.Nk, BLOCK_N), P.H // S.GROUP)
    columns_of_tile(P, R, b, key_head, tile, as_number(scale, S.ACC), S, BLOCK_M, BLOCK_N)


@triton.jit
def _head_kernel(
    P,  # Problem, Nk at most BLOCK_KEYS
    R,  # Results, all of them
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_ROWS: tl.constexpr,  # rows of a row tile
    BLOCK_KEYS: tl.constexpr,  # all keys
    BLOCK_M: tl.constexpr,  # rows of a column tile's step
    BLOCK_N: tl.constexpr,  # keys of a column tile
):
    """(6)-(9). One program owns one key head with its query heads: all row tiles, then all column tiles.

    The barrier between them makes D, x and t, written by other threads of the program, visible.
    """
    b, key_head, _ = program_tile(1, P.H // S.GROUP)
    scale = as_number(scale, S.ACC)
    for member in range(S.GROUP):
        for tile in range(tl.cdiv(P.Nq, BLOCK_ROWS)):
            h = key_head * S.GROUP + member
            rows_of_whole_tile(P, R, b, h, tile, scale, S, BLOCK_ROWS, BLOCK_KEYS)
    tl.debug_barrier()
    for tile in range(tl.cdiv(P.Nk, BLOCK_N)):
        columns_of_tile(P, R, b, key_head, tile, scale, S, BLOCK_M, BLOCK_N)


@triton.jit
def _few_kernel(
    P,  # Problem, Nq at most BLOCK_M, GROUP 1
    R,  # Results; reads delta
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(6)-(9). One program owns one head whose queries all fit BLOCK_M rows."""
    b, h, _ = program_tile(1, P.H)
    few_queries(P, R, b, h, as_number(scale, S.ACC), S, BLOCK_M, BLOCK_N)


def attention_double_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor,
    ddq: Tensor | None,
    ddk: Tensor | None,
    ddv: Tensor | None,
    ddmask: Tensor | None,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(6)-(9): ``gq``, ``gk``, ``gv``, ``gdo``, and ``gmask`` if ``mask_grad``.

    ``o`` includes ``head_scale``, ``do`` is its cotangent, ``dq`` the result of (5). An absent cotangent costs
    nothing: its products are not compiled.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    more = {"o": o, "do": do, "dq": dq, "ddq": ddq, "ddk": ddk, "ddv": ddv, "ddmask": ddmask}
    reads, static = problem(q, k, v, mask, is_causal, head_scale, lse, **more)
    width = max(static.WIDTH, static.VALUE_WIDTH)
    gq, gk, gv, gdo = map(empty_heads, (q, k, v, do))
    few = Nq <= FEW_QUERIES and static.GROUP == 1
    rows = "attention_double_backward_rows_whole"
    whole = not few and fits(rows, q, width, "BLOCK_N", Nk)
    delta = empty_statistic(q) if whole else attention_delta(o, do)[0]
    x, t = empty_statistic(q), empty_statistic(q)
    gradients = map(operand, (gq, gk, gv, gdo))
    common = (q, width, reads, Results(*gradients, delta, x, t), scale)  # pyright: ignore[reportArgumentType]
    by_head = "attention_double_backward_head"
    if few:
        name = "attention_double_backward_few"
        launch(name, _few_kernel, lambda _: B * H, *common, S=static)
    elif whole and fits(by_head, q, width, "BLOCK_KEYS", Nk) and fills(q, B * key_heads):
        launch(by_head, _head_kernel, lambda _: B * key_heads, *common, S=static)
    else:
        launch(
            rows if whole else "attention_double_backward_rows",
            _rows_kernel,
            lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
            *common,
            S=static,
            WHOLE=whole,
        )
        launch(
            "attention_double_backward_columns",
            _columns_kernel,
            lambda c: B * key_heads * cdiv(Nk, c["BLOCK_N"]),
            *common,
            S=static,
        )
    gmask = None
    if mask_grad and mask is not None:
        given = x if static.HAS_X else None
        gmask = mask_gradient(reads, static, mask, delta, given, t, scale, q)
    return gq, gk, gv, gdo, gmask
