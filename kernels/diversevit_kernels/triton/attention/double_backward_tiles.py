"""The double backward of one row tile and of one column tile, (6)-(9), as device functions.

Arguments  P a Problem, R the Results, b and h sample and head, S a Static (see ``attention_tiles``).
"""

import triton
import triton.language as tl

from ..runtime.tiles import add_dot, scale_split, subtract_split, zeros_split
from .tiles import (
    first_row_tile,
    indices,
    last_key,
    load_rows,
    load_softmax,
    load_statistic,
    probabilities,
    product,
    row_delta,
    score_cotangent,
    store_rows,
    store_statistic,
    whole_probabilities,
)


@triton.jit
def rows_of_tile(
    P, R, b, h, tile, scale, S: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """gq, gdo, D, x and t of M query rows: with all keys at once if WHOLE, else N at a time."""
    if WHOLE:
        rows_of_whole_tile(P, R, b, h, tile, scale, S, M, N)
    else:
        rows_in_one_pass(P, R, b, h, tile, scale, S, M, N)


@triton.jit
def rows_of_whole_tile(P, R, b, h, tile, scale, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(3)-(9) for M query rows and all their keys, at most N: gq, gdo; D, x, t for the column tiles.

    All row sums come from tiles: D from P ∘ dP, x from P ∘ X, t from R'.
    """
    rows, cols = indices(tile * M, M, S), indices(0, N, S)
    i, j, key_head = rows[:, None], cols[None, :], h // S.GROUP
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    k = load_rows(P.k, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
    top, _ = load_softmax(P, b, h, rows)
    p = whole_probabilities(q, k, top[:, None], P, b, h, i, j, scale, S)

    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    v = load_rows(P.v, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    dp = product(do, v, S.VALUE_WIDTH, S)
    delta = tl.sum(p * dp, 1)
    store_statistic(R.delta, P, b, h, rows, delta)
    ds = p * (dp - delta[:, None])

    gq = zeros_split(M, S.WIDTHS, S.ACC)
    gdo = zeros_split(M, S.VALUE_WIDTHS, S.ACC)
    r = tl.zeros([M, N], S.ACC)
    ddk = load_rows(P.ddk, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
    if ddk is not None:
        gq = add_dot(gq, ds, ddk.tile, S.PRECISION)
    if S.HAS_X:
        ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
        x_tile = score_cotangent(ddq, k, q, ddk, P, b, h, i, j, scale, S)
        x = tl.sum(p * x_tile, 1)
        store_statistic(R.x, P, b, h, rows, x)
        x_tile -= x[:, None]
        gdo = add_dot(gdo, p * x_tile, v.tile, S.PRECISION)
        r = ds * x_tile
    if P.ddv is not None:
        ddv = load_rows(P.ddv, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        r += p * product(do, ddv, S.VALUE_WIDTH, S)
        gdo = add_dot(gdo, p, ddv.tile, S.PRECISION)
    t = tl.sum(r, 1)
    store_statistic(R.t, P, b, h, rows, t)
    gq = add_dot(gq, r - p * t[:, None], k.tile, S.PRECISION)
    store_rows(R.gq, b, h, rows, P.Nq, scale_split(gq, scale), S.WIDTH, S.WIDTHS)
    store_rows(R.gdo, b, h, rows, P.Nq, gdo, S.VALUE_WIDTH, S.VALUE_WIDTHS)


@triton.jit
def rows_in_one_pass(P, R, b, h, tile, scale, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(46)-(48) for M query rows, N keys at a time: gq, gdo; D, x and t for the column tiles.

    x and t are known only after the last key, so the sums are taken without them and corrected at the end
    with rows that are already there: o, dq and P K.
    """
    rows = indices(tile * M, M, S)
    i, key_head = rows[:, None], h // S.GROUP
    q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
    top, share = load_softmax(P, b, h, rows)
    delta = row_delta(P, R.delta, do, b, h, rows, S)[:, None]
    gq = zeros_split(M, S.WIDTHS, S.ACC)
    gdo = zeros_split(M, S.VALUE_WIDTHS, S.ACC)
    pk = zeros_split(M, S.WIDTHS, S.ACC)
    x = tl.zeros([M], S.ACC)
    t = tl.zeros([M], S.ACC)
    for start in range(0, last_key(tile, P, M, S), N):
        cols = indices(start, N, S)
        j = cols[None, :]
        k = load_rows(P.k, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
        v = load_rows(P.v, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        p = probabilities(q, k, top[:, None], share[:, None], P, b, h, i, j, scale, S)
        ds = p * (product(do, v, S.VALUE_WIDTH, S) - delta)
        r = tl.zeros([M, N], S.ACC)
        ddk = load_rows(P.ddk, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
        if ddk is not None:
            gq = add_dot(gq, ds, ddk.tile, S.PRECISION)
        if S.HAS_X:
            x_tile = score_cotangent(ddq, k, q, ddk, P, b, h, i, j, scale, S)
            r = ds * x_tile
            x_tile *= p
            x += tl.sum(x_tile, 1)
            gdo = add_dot(gdo, x_tile, v.tile, S.PRECISION)
        if P.ddv is not None:
            ddv = load_rows(P.ddv, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
            r += p * product(do, ddv, S.VALUE_WIDTH, S)
            gdo = add_dot(gdo, p, ddv.tile, S.PRECISION)
        t += tl.sum(r, 1)
        gq = add_dot(gq, r, k.tile, S.PRECISION)
        pk = add_dot(pk, p, k.tile, S.PRECISION)
    store_statistic(R.t, P, b, h, rows, t)
    gq = scale_split(subtract_split(gq, pk, t[:, None]), scale)
    if S.HAS_X:
        store_statistic(R.x, P, b, h, rows, x)
        dq = load_rows(P.dq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
        gq = subtract_split(gq, dq.tile, x[:, None])
        o = load_rows(P.o, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
        gdo = subtract_split(gdo, o.tile, x[:, None])
    store_rows(R.gq, b, h, rows, P.Nq, gq, S.WIDTH, S.WIDTHS)
    store_rows(R.gdo, b, h, rows, P.Nq, gdo, S.VALUE_WIDTH, S.VALUE_WIDTHS)


@triton.jit
def columns_of_tile(
    P, R, b, key_head, tile, scale, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """(49) for N keys, M query rows at a time in transposed tiles: gk, gv. Reads D, x and t."""
    cols = indices(tile * N, N, S)
    j = cols[:, None]
    k = load_rows(P.k, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
    v = load_rows(P.v, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    ddk = load_rows(P.ddk, b, key_head, cols, P.Nk, S.WIDTH, S.WIDTHS)
    ddv = load_rows(P.ddv, b, key_head, cols, P.Nk, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    gk = zeros_split(N, S.WIDTHS, S.ACC)
    gv = zeros_split(N, S.VALUE_WIDTHS, S.ACC)
    first = first_row_tile(tile, M, N, S)
    for member in range(S.GROUP):
        h = key_head * S.GROUP + member
        for start in range(first * M, P.Nq, M):
            rows = indices(start, M, S)
            i = rows[None, :]
            q = load_rows(P.q, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
            do = load_rows(P.do, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
            ddq = load_rows(P.ddq, b, h, rows, P.Nq, S.WIDTH, S.WIDTHS)
            top, share = load_softmax(P, b, h, rows)
            delta = load_statistic(R.delta, P, b, h, rows, 0.0)[None, :]
            p = probabilities(k, q, top[None, :], share[None, :], P, b, h, i, j, scale, S)
            ds = p * (product(v, do, S.VALUE_WIDTH, S) - delta)
            if ddq is not None:
                gk = add_dot(gk, ds, ddq.tile, S.PRECISION)
            r = p * -load_statistic(R.t, P, b, h, rows, 0.0)[None, :]
            if ddv is not None:
                r += p * product(ddv, do, S.VALUE_WIDTH, S)
            if S.HAS_X:
                x_tile = score_cotangent(k, ddq, ddk, q, P, b, h, i, j, scale, S)
                x_tile -= load_statistic(R.x, P, b, h, rows, 0.0)[None, :]
                gv = add_dot(gv, p * x_tile, do.tile, S.PRECISION)
                r += ds * x_tile
            gk = add_dot(gk, r, q.tile, S.PRECISION)
    store_rows(R.gk, b, key_head, cols, P.Nk, scale_split(gk, scale), S.WIDTH, S.WIDTHS)
    store_rows(R.gv, b, key_head, cols, P.Nk, gv, S.VALUE_WIDTH, S.VALUE_WIDTHS)
