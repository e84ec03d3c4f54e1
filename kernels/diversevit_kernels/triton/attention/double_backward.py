"""Attention double backward on a GPU, (6)-(9), without atomics: which programs do what.

Few queries       one program does a head (``attention_double_backward_few_queries_kernel``).
Otherwise         row programs give gq and gdo, and Δ, η and t for the column programs, which give gk and gv. Where the
                  keys fit a tile, a row program holds all of them and its row sums are sums of tiles; else it walks
                  them once and corrects its sums at the end.
Enough heads      for the device, no mask, no groups and no dropout (each costs registers): where the gradients of all
                  keys fit the registers, one program does a head and makes every tile once
                  (``attention_double_backward_head_all_keys_kernel``); where a head's tensors stay in the L2 cache,
                  one does its rows and then its columns (``attention_double_backward_head_kernel``).

Traffic  a row tile reads its rows of q, do, ddq (o, dq) once and all k, v, ddk, ddv; a column tile the reverse.
Source   derived in kernels/README.md, (6)-(9) and (46)-(49).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...common.contracts import QKV, AttentionBackward, AttentionDoubleBackward
from ..runtime.device import fills
from ..runtime.launch import run_kernel
from ..runtime.plan import Plan, Target, target_of
from ..runtime.sizes import cdiv
from ..runtime.tensors import Operand, empty_heads, operand
from ..runtime.tiles import as_number
from . import configs
from .backward import attention_backward
from .double_backward_tiles import (
    columns,
    head_with_all_keys,
    load_keys,
    rows_in_one_pass,
    rows_with_all_keys,
)
from .dropout import empty_words
from .few_queries import head_with_few_queries
from .mask_gradient import mask_gradient
from .tiles import (
    FEW_QUERIES,
    RowStatistics,
    arguments,
    chunked,
    empty_statistic,
    program_tile,
    widest,
)

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
        keys = load_keys(args, b, h, BLOCK_N, const)
        rows_with_all_keys(args, keys, out, stats, b, h, tile, scale, const, BLOCK_M)
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
        rows_in_one_pass(args, out, stats, b, h, tile, scale, const, ROW_TILE, ROW_KEYS)
    tl.debug_barrier()
    for tile in range(tl.cdiv(args.Nk, BLOCK_N)):
        columns(args, out, stats, b, h, tile, scale, const, BLOCK_M, BLOCK_N)


@triton.jit
def attention_double_backward_head_all_keys_kernel(
    args,  # Arguments, Nk at most BLOCK_N, GROUP 1
    out,  # Gradients
    stats,  # RowStatistics, of None: nothing else needs them
    scale: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Double backward, (3)-(9). One program owns one head, and holds all its keys and their gradients."""
    b, h, _ = program_tile(1, args.H)
    scale = as_number(scale, const.ACC)
    head_with_all_keys(args, out, stats, b, h, scale, const, BLOCK_M, BLOCK_N)


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


def _plan(target: Target, q: Tensor, k: Tensor, mask: Tensor | None, dropout: bool) -> Plan:
    """The plan of the first launch: of heads with few queries, of whole heads, or of row tiles.

    It is ``whole`` where a row tile holds all keys; row tiles that walk their keys read dq.
    """
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    grouped = key_heads != H
    if Nq <= FEW_QUERIES and not grouped:
        return configs.DOUBLE_BACKWARD_FEW_QUERIES.plan(target)
    if _plain(q, k, mask) and not dropout and Nk <= HEAD_KEYS and fills(q, B * H):
        all_keys = configs.DOUBLE_BACKWARD_HEAD_ALL_KEYS.holding(Nk, "BLOCK_N", target)
        by_head = configs.DOUBLE_BACKWARD_HEAD.find(target)
        if all_keys is not None:
            return all_keys
        if by_head is not None and Nk > by_head["ROW_KEYS"]:
            return by_head
    all_keys = configs.DOUBLE_BACKWARD_ROWS_ALL_KEYS.holding(Nk, "BLOCK_N", target)
    plain = configs.DOUBLE_BACKWARD_ROWS_PLAIN.find(target) if _plain(q, k, mask) else None
    by_rows = plain or configs.DOUBLE_BACKWARD_ROWS.plan(target)
    return all_keys or by_rows.holding(Nk, "BLOCK_N") or by_rows


def _columns_plan(target: Target, q: Tensor, k: Tensor, mask: Tensor | None) -> Plan:
    """The plan of the column programs after row programs."""
    plain = configs.DOUBLE_BACKWARD_COLUMNS_PLAIN.find(target) if _plain(q, k, mask) else None
    return plain or configs.DOUBLE_BACKWARD_COLUMNS.plan(target)


def _plain(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether there is no mask and no group of query heads to a key head."""
    return mask is None and q.shape[1] == k.shape[1]


def attention_double_backward(
    inputs: AttentionDoubleBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Attention double backward, (6)-(9): ``gq``, ``gk``, ``gv``, ``gdo``, and ``gmask`` if ``mask_grad``.

    ``softmax`` is (1a), ``dq`` the result of (5): where it is None and read, the backward runs again. An absent
    cotangent costs nothing: its products are not compiled.
    ``into``: where to write the first three.
    """
    q, k, v, mask, seed, o, softmax, do, dq, ddq, ddk, ddv, ddmask = inputs[:13]
    is_causal, scale, dropout_p, mask_grad = inputs[13:]
    options = is_causal, scale, dropout_p
    (B, H, Nq, _), (_, key_heads, Nk, _) = q.shape, k.shape
    target = target_of(q, widest(q, v))
    plan = _plan(target, q, k, mask, seed is not None)
    few_queries = plan.table is configs.DOUBLE_BACKWARD_FEW_QUERIES
    all_keys_in_tile = bool(plan.whole)
    has_dds = not (ddq is None and ddk is None and ddmask is None)
    if dq is None and has_dds and not (few_queries or all_keys_in_tile):
        given = AttentionBackward(q, k, v, mask, seed, o, softmax, do, *options, False)
        dq = attention_backward(given)[0]
    more = {"o": o, "do": do, "dq": dq, "ddq": ddq, "ddk": ddk, "ddv": ddv, "ddmask": ddmask}
    args, const = arguments(q, k, v, mask, seed, *options, softmax, **more)
    gq, gk, gv = into or map(empty_heads, (q, k, v))
    gdo = empty_heads(do)
    out = Gradients(*map(operand, (gq, gk, gv, gdo)))  # pyright: ignore[reportArgumentType]
    alone = plan.table is configs.DOUBLE_BACKWARD_HEAD_ALL_KEYS
    kept = (None if alone else empty_statistic(q) for _ in range(3))
    stats = RowStatistics(*kept, empty_words(q, seed))
    common = (args, out, stats, scale)
    if few_queries:
        kernel = attention_double_backward_few_queries_kernel
        run_kernel(plan, kernel, lambda _: B * H, *common, const=chunked(const))
    elif plan.table is configs.DOUBLE_BACKWARD_HEAD:
        kernel = attention_double_backward_head_kernel
        run_kernel(plan, kernel, lambda _: B * H, *common, const=const)
    elif alone:
        kernel = attention_double_backward_head_all_keys_kernel
        run_kernel(plan, kernel, lambda _: B * H, *common, const=const)
    else:
        run_kernel(
            plan,
            attention_double_backward_rows_kernel,
            lambda c: B * H * cdiv(Nq, c["BLOCK_M"]),
            *common,
            const=const,
            ALL_KEYS_IN_TILE=all_keys_in_tile,
        )
        run_kernel(
            _columns_plan(target, q, k, mask),
            attention_double_backward_columns_kernel,
            lambda c: B * key_heads * cdiv(Nk, c["BLOCK_N"]),
            *common,
            const=const,
        )
    gmask = None
    if mask_grad and mask is not None:
        gmask = mask_gradient(args, const, mask, stats, scale, q)
    return gq, gk, gv, gdo, gmask
