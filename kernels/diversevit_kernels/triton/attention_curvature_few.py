"""The double backward of one head with few queries, (6)-(9), as a device function: no second launch.

Arguments  as in ``attention_curvature``.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    head_factor,
    indices,
    load_rows,
    load_statistic,
    probabilities,
    product,
    row_delta,
    score_cotangent,
    store_rows,
    store_statistic,
)
from .tiles import add_dot, scale_split, zeros_split


@triton.jit
def _score_tiles(
    q, do, ddq, lse, delta, factor, P, b, h, rows, start, scale, S: tl.constexpr, N: tl.constexpr
):
    """(3)-(8) for one key tile: its operands, and the tiles P, dS, X and P ∘ Y (zeros if absent)."""
    cols = indices(start, N, S)
    i, j = rows[:, None], cols[None, :]
    k = load_rows(P.k, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
    v = load_rows(P.v, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    ddk = load_rows(P.ddk, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
    ddv = load_rows(P.ddv, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    p = probabilities(q, k, lse, P, b, h, i, j, scale, S)
    ds = p * (product(do, v, S.VALUE_WIDTH, S) * factor - delta)
    x = tl.zeros_like(p)
    if S.HAS_X:
        x = score_cotangent(ddq, k, q, ddk, P, b, h, i, j, scale, S)
    py = tl.zeros_like(p)
    if ddv is not None:
        py = p * (product(do, ddv, S.VALUE_WIDTH, S) * factor)
    return cols, k, v, ddk, ddv, p, ds, x, py


@triton.jit
def few_queries(P, R, b, h, scale, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(6)-(9) for a head whose queries all fit M rows, N keys at a time, twice: first x and t, then all results.

    The second walk finds its keys in the L2 cache. Writes gq, gk, gv, gdo, D, x and t.
    """
    rows = indices(0, M, S)
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    lse = load_statistic(P.lse, P, b, h, rows, float("inf"))[:, None]
    delta = row_delta(P, R.delta, do, b, h, rows, S)[:, None]
    factor = head_factor(P, b, h, S)
    x = tl.zeros([M], S.ACC)
    t = tl.zeros([M], S.ACC)
    for start in range(0, P.Nk, N):
        _, _, _, _, _, p, ds, x_tile, py = _score_tiles(
            q, do, ddq, lse, delta, factor, P, b, h, rows, start, scale, S, N
        )
        x += tl.sum(p * x_tile, 1)
        t += tl.sum(ds * x_tile + py, 1)
    store_statistic(R.x, P, b, h, rows, x)
    store_statistic(R.t, P, b, h, rows, t)

    gq = zeros_split(M, S.WIDTHS, S.ACC)
    gdo = zeros_split(M, S.VALUE_WIDTHS, S.ACC)
    for start in range(0, P.Nk, N):
        cols, k, v, ddk, ddv, p, ds, x_tile, py = _score_tiles(
            q, do, ddq, lse, delta, factor, P, b, h, rows, start, scale, S, N
        )
        gk = zeros_split(N, S.WIDTHS, S.ACC)
        gv = zeros_split(N, S.VALUE_WIDTHS, S.ACC)
        r = py - p * t[:, None]
        if S.HAS_X:
            x_tile -= x[:, None]
            r += ds * x_tile
            gdo = add_dot(gdo, p * x_tile, v.tile, S.PRECISION)
            gv = add_dot(gv, tl.trans(p * factor * x_tile), do.tile, S.PRECISION)
        if ddk is not None:
            gq = add_dot(gq, ds, ddk.tile, S.PRECISION)
        if ddv is not None:
            gdo = add_dot(gdo, p, ddv.tile, S.PRECISION)
        if ddq is not None:
            gk = add_dot(gk, tl.trans(ds), ddq.tile, S.PRECISION)
        gk = add_dot(gk, tl.trans(r), q.tile, S.PRECISION)
        gq = add_dot(gq, r, k.tile, S.PRECISION)
        store_rows(R.gk, b, h, cols, P.Nk, scale_split(gk, scale), S.WIDTH, S.WIDTHS)
        store_rows(R.gv, b, h, cols, P.Nk, gv, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    store_rows(R.gq, b, h, rows, P.Nq, scale_split(gq, scale), S.WIDTH, S.WIDTHS)
    gdo = scale_split(gdo, factor)
    store_rows(R.gdo, b, h, rows, P.Nq, gdo, S.VALUE_WIDTH, S.VALUE_WIDTHS)
