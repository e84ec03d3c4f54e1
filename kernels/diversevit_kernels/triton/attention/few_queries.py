"""The double backward of one head with few queries, (6)-(9), as a device function: no second launch.

Arguments  as in ``attention_curvature``.
"""

import triton
import triton.language as tl

from ..runtime.tiles import add_dot, scale_split, zeros_split
from .tiles import (
    indices,
    load_rows,
    load_softmax,
    probabilities,
    product,
    score_cotangent,
    share_of,
    store_rows,
    store_statistic,
)


@triton.jit
def _score_tiles(q, do, ddq, ddk, ddv, top, share, P, b, h, rows, cols, scale, S: tl.constexpr):
    """(3)-(8) for one key tile: keys and values, and the tiles P, dP, X and P ∘ Y (zeros if absent)."""
    i, j = rows[:, None], cols[None, :]
    k = load_rows(P.k, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
    v = load_rows(P.v, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    p = probabilities(q, k, top[:, None], share[:, None], P, b, h, i, j, scale, S)
    dp = product(do, v, S.VALUE_WIDTH, S)
    x = tl.zeros_like(p)
    if S.HAS_X:
        x = score_cotangent(ddq, k, q, ddk, P, b, h, i, j, scale, S)
    py = tl.zeros_like(p)
    if ddv is not None:
        py = p * product(do, ddv, S.VALUE_WIDTH, S)
    return k, v, p, dp, x, py


@triton.jit
def few_queries(P, R, b, h, scale, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(6)-(9) for a head whose queries all fit M rows, N keys at a time, twice: first D, x and t, then all results.

    With D = rowsum(P ∘ dP), rowsum(dS ∘ X) is rowsum(P ∘ dP ∘ X) − D x, so that one walk gives all three; where one key
    takes all, that difference is exactly zero, and must be before P ∘ Y is added. All are means under P, over its
    own sum. The second walk finds its keys in the L2 cache. Writes gq, gk, gv, gdo, D, x and t.
    """
    rows = indices(0, M, S)
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    top, share = load_softmax(P, b, h, rows)
    total = tl.zeros([M], S.ACC)
    delta = tl.zeros([M], S.ACC)
    x = tl.zeros([M], S.ACC)
    weighted = tl.zeros([M], S.ACC)
    t = tl.zeros([M], S.ACC)
    for start in range(0, P.Nk, N):
        cols = indices(start, N, S)
        ddk = load_rows(P.ddk, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
        ddv = load_rows(P.ddv, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        _, _, p, dp, x_tile, py = _score_tiles(
            q, do, ddq, ddk, ddv, top, share, P, b, h, rows, cols, scale, S
        )
        total += tl.sum(p, 1)
        delta += tl.sum(p * dp, 1)
        x += tl.sum(p * x_tile, 1)
        weighted += tl.sum(p * dp * x_tile, 1)
        t += tl.sum(py, 1)
    whole = share_of(total)
    delta *= whole
    x *= whole
    t = (t + (weighted - delta * x * total)) * whole
    store_statistic(R.delta, P, b, h, rows, delta)
    store_statistic(R.x, P, b, h, rows, x)
    store_statistic(R.t, P, b, h, rows, t)

    gq = zeros_split(M, S.WIDTHS, S.ACC)
    gdo = zeros_split(M, S.VALUE_WIDTHS, S.ACC)
    for start in range(0, P.Nk, N):
        cols = indices(start, N, S)
        ddk = load_rows(P.ddk, b, h, cols, P.Nk, S.WIDTH, S.WIDTHS)
        ddv = load_rows(P.ddv, b, h, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        k, v, p, dp, x_tile, py = _score_tiles(
            q, do, ddq, ddk, ddv, top, share, P, b, h, rows, cols, scale, S
        )
        ds = p * (dp - delta[:, None])
        gk = zeros_split(N, S.WIDTHS, S.ACC)
        gv = zeros_split(N, S.VALUE_WIDTHS, S.ACC)
        r = py - p * t[:, None]
        if S.HAS_X:
            x_tile -= x[:, None]
            r += ds * x_tile
            gdo = add_dot(gdo, p * x_tile, v.tile, S.PRECISION)
            gv = add_dot(gv, tl.trans(p * x_tile), do.tile, S.PRECISION)
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
    store_rows(R.gdo, b, h, rows, P.Nq, gdo, S.VALUE_WIDTH, S.VALUE_WIDTHS)
