"""Device functions for the double backward of one row tile and of one column tile, (6)-(9).

Names    as in ``tiles``; ``out`` is a ``Gradients`` of ``double_backward``.
"""

import triton
import triton.language as tl

from ..runtime.tiles import add_dot, scale_split, subtract_split
from .tiles import (
    first_row_tile,
    indices,
    last_key,
    load_qk,
    load_softmax,
    load_statistic,
    load_v,
    probabilities,
    probabilities_of_all_keys,
    row_delta,
    score_cotangent,
    store_qk,
    store_statistic,
    store_v,
    value_product,
    zeros_qk,
    zeros_v,
)


@triton.jit
def rows_with_all_keys(
    args, out, stats, b, h, tile, scale, const: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Double backward, (3)-(9), for ROWS query rows and all their keys, at most KEYS: gq, gdo and ``stats``.

    All row sums come from tiles: Δ from P ∘ dP, η from P ∘ ddS, t from A.
    """
    rows, cols = indices(tile * ROWS, ROWS, const), indices(0, KEYS, const)
    i, j, key_head = rows[:, None], cols[None, :], h // const.GROUP
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    k = load_qk(args.k, b, key_head, cols, args.Nk, const)
    top, _ = load_softmax(args, b, h, rows, scale, const)
    p = probabilities_of_all_keys(q, k, top[:, None], args, b, h, i, j, scale, const)

    do = load_v(args.do, b, h, rows, args.Nq, const)
    v = load_v(args.v, b, key_head, cols, args.Nk, const)
    dp = value_product(do, v, const)
    delta = tl.sum(p * dp, 1)
    store_statistic(stats.delta, args, b, h, rows, delta)
    ds = p * (dp - delta[:, None])

    gq, gdo = zeros_qk(ROWS, const), zeros_v(ROWS, const)
    a = tl.zeros([ROWS, KEYS], const.ACC)
    ddk = load_qk(args.ddk, b, key_head, cols, args.Nk, const)
    if ddk is not None:
        gq = add_dot(gq, ds, ddk.tile, const.PRECISION)
    if const.HAS_DDS:
        ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
        dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
        eta = tl.sum(p * dds, 1)
        store_statistic(stats.eta, args, b, h, rows, eta)
        dds -= eta[:, None]
        gdo = add_dot(gdo, p * dds, v.tile, const.PRECISION)
        a = ds * dds
    if args.ddv is not None:
        ddv = load_v(args.ddv, b, key_head, cols, args.Nk, const)
        a += p * value_product(do, ddv, const)
        gdo = add_dot(gdo, p, ddv.tile, const.PRECISION)
    t = tl.sum(a, 1)
    store_statistic(stats.t, args, b, h, rows, t)
    gq = add_dot(gq, a - p * t[:, None], k.tile, const.PRECISION)
    store_qk(out.gq, b, h, rows, args.Nq, scale_split(gq, scale), const)
    store_v(out.gdo, b, h, rows, args.Nq, gdo, const)


@triton.jit
def rows_in_one_pass(
    args, out, stats, b, h, tile, scale, const: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Double backward, (46)-(48), for ROWS query rows, KEYS keys at a time: gq, gdo and ``stats``.

    η and t are known only after the last key, so the sums are taken without them and corrected at the end
    with rows that are already there: o, dq and P K.
    """
    rows = indices(tile * ROWS, ROWS, const)
    i, key_head = rows[:, None], h // const.GROUP
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    do = load_v(args.do, b, h, rows, args.Nq, const)
    ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
    top, share = load_softmax(args, b, h, rows, scale, const)
    top, share = top[:, None], share[:, None]
    delta = row_delta(args, stats, do, b, h, rows, const)[:, None]
    gq, gdo = zeros_qk(ROWS, const), zeros_v(ROWS, const)
    mean_key = zeros_qk(ROWS, const)
    eta, t = tl.zeros([ROWS], const.ACC), tl.zeros([ROWS], const.ACC)
    for start in range(0, last_key(tile, args, ROWS, const), KEYS):
        cols = indices(start, KEYS, const)
        j = cols[None, :]
        k = load_qk(args.k, b, key_head, cols, args.Nk, const)
        v = load_v(args.v, b, key_head, cols, args.Nk, const)
        p = probabilities(q, k, top, share, args, b, h, i, j, scale, const)
        ds = p * (value_product(do, v, const) - delta)
        a = tl.zeros([ROWS, KEYS], const.ACC)
        ddk = load_qk(args.ddk, b, key_head, cols, args.Nk, const)
        if ddk is not None:
            gq = add_dot(gq, ds, ddk.tile, const.PRECISION)
        if const.HAS_DDS:
            dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
            a = ds * dds
            dds *= p
            eta += tl.sum(dds, 1)
            gdo = add_dot(gdo, dds, v.tile, const.PRECISION)
        if args.ddv is not None:
            ddv = load_v(args.ddv, b, key_head, cols, args.Nk, const)
            a += p * value_product(do, ddv, const)
            gdo = add_dot(gdo, p, ddv.tile, const.PRECISION)
        t += tl.sum(a, 1)
        gq = add_dot(gq, a, k.tile, const.PRECISION)
        mean_key = add_dot(mean_key, p, k.tile, const.PRECISION)
    store_statistic(stats.t, args, b, h, rows, t)
    gq = scale_split(subtract_split(gq, mean_key, t[:, None]), scale)
    if const.HAS_DDS:
        store_statistic(stats.eta, args, b, h, rows, eta)
        dq = load_qk(args.dq, b, h, rows, args.Nq, const)
        gq = subtract_split(gq, dq.tile, eta[:, None])
        o = load_v(args.o, b, h, rows, args.Nq, const)
        gdo = subtract_split(gdo, o.tile, eta[:, None])
    store_qk(out.gq, b, h, rows, args.Nq, gq, const)
    store_v(out.gdo, b, h, rows, args.Nq, gdo, const)


@triton.jit
def columns(
    args,
    out,
    stats,
    b,
    hk,
    tile,
    scale,
    const: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Double backward, (49), for KEYS keys of key head ``hk``, ROWS queries at a time: gk, gv. Reads ``stats``.

    Its tiles are transposed, [KEYS, ROWS].
    """
    cols = indices(tile * KEYS, KEYS, const)
    j = cols[:, None]
    k = load_qk(args.k, b, hk, cols, args.Nk, const)
    v = load_v(args.v, b, hk, cols, args.Nk, const)
    ddk = load_qk(args.ddk, b, hk, cols, args.Nk, const)
    ddv = load_v(args.ddv, b, hk, cols, args.Nk, const)
    gk, gv = zeros_qk(KEYS, const), zeros_v(KEYS, const)
    first = first_row_tile(tile, ROWS, KEYS, const)
    for member in range(const.GROUP):
        h = hk * const.GROUP + member
        for start in range(first * ROWS, args.Nq, ROWS):
            rows = indices(start, ROWS, const)
            i = rows[None, :]
            q = load_qk(args.q, b, h, rows, args.Nq, const)
            do = load_v(args.do, b, h, rows, args.Nq, const)
            ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
            top, share = load_softmax(args, b, h, rows, scale, const)
            top, share = top[None, :], share[None, :]
            delta = load_statistic(stats.delta, args, b, h, rows)[None, :]
            p = probabilities(k, q, top, share, args, b, h, i, j, scale, const, True)
            ds = p * (value_product(v, do, const) - delta)
            if ddq is not None:
                gk = add_dot(gk, ds, ddq.tile, const.PRECISION)
            gs = p * -load_statistic(stats.t, args, b, h, rows)[None, :]
            if ddv is not None:
                gs += p * value_product(ddv, do, const)
            if const.HAS_DDS:
                dds = score_cotangent(k, ddq, ddk, q, args, b, h, i, j, scale, const)
                dds -= load_statistic(stats.eta, args, b, h, rows)[None, :]
                gv = add_dot(gv, p * dds, do.tile, const.PRECISION)
                gs += ds * dds
            gk = add_dot(gk, gs, q.tile, const.PRECISION)
    store_qk(out.gk, b, hk, cols, args.Nk, scale_split(gk, scale), const)
    store_v(out.gv, b, hk, cols, args.Nk, gv, const)
