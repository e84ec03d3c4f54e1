"""Attention double backward on a GPU, (6)-(9), without atomics: which programs do what.

Few queries       one program does a head (``_few_kernel``).
Otherwise         row programs give gq and gdo, and D, x and t for the column programs, which give gk and gv. Where the
                  keys fit a tile, a row program holds all of them and its row sums are sums of tiles; else it walks
                  them once and corrects its sums at the end.
Enough heads      for the device, no mask and no groups (either costs registers), and so few keys that a head's
                  tensors stay in the L2 cache: one program does rows and columns of a head (``_head_kernel``).

Traffic  a row tile reads its rows of q, do, ddq (o, dq) once and all k, v, ddk, ddv; a column tile the reverse.
Source   derived in kernels/README.md, (6)-(9).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.configurations import fills, fits, has_configuration
from ..runtime.launch import cdiv, launch
from .backward import attention_backward
from .double_backward_tiles import columns_of_tile, rows_of_tile
from .few_queries import few_queries
from .mask_gradient import mask_gradient
from .tiles import (
    FEW_QUERIES,
    Operand,
    as_number,
    chunked,
    empty_heads,
    empty_statistic,
    operand,
    problem,
    program_tile,
)

FEW, HEAD, ROWS = (f"attention_double_backward_{name}" for name in ("few", "head", "rows"))
"""Launches, by their names in the table; HEAD and ROWS have a variant ``_whole``."""

HEAD_KEYS = 256
"""Up to so many keys, one program may do a whole head: its tensors stay in the L2 cache between the two phases."""


class Results(NamedTuple):
    """What the kernels write; x only if S.HAS_X."""

    gq: Operand  # like q
    gk: Operand  # like k
    gv: Operand  # like v
    gdo: Operand  # like do
    delta: Tensor  # [B, H, Nq], dense: D of (3)
    x: Tensor  # [B, H, Nq], dense: x of (7)
    t: Tensor  # [B, H, Nq], dense: rowsum(R') of (8)
    end: int = 1  # as in Problem


@triton.jit
def _rows_kernel(
    P,  # Problem
    R,  # Results: gq, gdo, delta, x, t
    scale: tl.float64,
    S: tl.constexpr,  # Static
    WHOLE: tl.constexpr,  # BLOCK_N holds all keys
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(6)-(9), gq and gdo. One program owns BLOCK_M query rows of one head."""
    b, h, tile = program_tile(tl.cdiv(P.Nq, BLOCK_M), P.H)
    rows_of_tile(P, R, b, h, tile, as_number(scale, S.ACC), S, WHOLE, BLOCK_M, BLOCK_N)


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
    P,  # Problem, GROUP 1
    R,  # Results
    scale: tl.float64,
    S: tl.constexpr,  # Static
    WHOLE: tl.constexpr,  # ROW_KEYS holds all keys
    ROW_TILE: tl.constexpr,  # rows of a row tile
    ROW_KEYS: tl.constexpr,  # keys of its step
    BLOCK_M: tl.constexpr,  # rows of a column tile's step
    BLOCK_N: tl.constexpr,  # keys of a column tile
):
    """(6)-(9). One program owns one head: all its row tiles, then all its column tiles.

    The barrier between them makes D, x and t, written by other threads of the program, visible.
    """
    b, h, _ = program_tile(1, P.H)
    scale = as_number(scale, S.ACC)
    for tile in range(tl.cdiv(P.Nq, ROW_TILE)):
        rows_of_tile(P, R, b, h, tile, scale, S, WHOLE, ROW_TILE, ROW_KEYS)
    tl.debug_barrier()
    for tile in range(tl.cdiv(P.Nk, BLOCK_N)):
        columns_of_tile(P, R, b, h, tile, scale, S, BLOCK_M, BLOCK_N)


@triton.jit
def _few_kernel(
    P,  # Problem, Nq at most BLOCK_M, GROUP 1
    R,  # Results
    scale: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(6)-(9). One program owns one head whose queries all fit BLOCK_M rows."""
    b, h, _ = program_tile(1, P.H)
    few_queries(P, R, b, h, as_number(scale, S.ACC), S, BLOCK_M, BLOCK_N)


def _plan(q: Tensor, k: Tensor, mask: Tensor | None, width: int) -> tuple[str, bool]:
    """The first launch by its name in the table, and whether a row tile holds all keys.

    HEAD and ROWS, which do not, read dq.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    grouped = key_heads != H
    if Nq <= FEW_QUERIES and not grouped:
        return FEW, False
    alone = mask is None and not grouped and Nk <= HEAD_KEYS
    by_head = alone and has_configuration(HEAD, q, width) and fills(q, B * H)
    name, block = (HEAD, "ROW_KEYS") if by_head else (ROWS, "BLOCK_N")
    whole = fits(f"{name}_whole", q, width, block, Nk)
    return f"{name}_whole" if whole else name, whole


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
    """(6)-(9): ``gq``, ``gk``, ``gv``, ``gdo``, and ``gmask`` if ``mask_grad``.

    ``softmax`` is (1a), ``dq`` the result of (5): where it is None and read, the backward runs again. An absent
    cotangent costs nothing: its products are not compiled.
    ``into``: where to write the first three.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    more = {"o": o, "do": do, "dq": dq, "ddq": ddq, "ddk": ddk, "ddv": ddv, "ddmask": ddmask}
    reads, static = problem(q, k, v, mask, is_causal, softmax, **more)
    width = max(static.WIDTH, static.VALUE_WIDTH)
    name, whole = _plan(q, k, mask, width)
    if dq is None and static.HAS_X and name in (HEAD, ROWS):
        given = (q, k, v, mask, o, softmax, do, is_causal, scale, False)
        more["dq"] = attention_backward(*given)[0]
        reads, static = problem(q, k, v, mask, is_causal, softmax, **more)
    gq, gk, gv = into or map(empty_heads, (q, k, v))
    gdo = empty_heads(do)
    delta, x, t = (empty_statistic(q) for _ in range(3))
    gradients = map(operand, (gq, gk, gv, gdo))
    common = (q, width, reads, Results(*gradients, delta, x, t), scale)  # pyright: ignore[reportArgumentType]
    if name == FEW:
        launch(name, _few_kernel, lambda _: B * H, *common, S=chunked(static))
    elif name.startswith(HEAD):
        launch(name, _head_kernel, lambda _: B * H, *common, S=static, WHOLE=whole)
    else:
        launch(
            name,
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
