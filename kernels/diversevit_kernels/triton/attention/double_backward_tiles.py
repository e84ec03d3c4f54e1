"""Device functions for the double backward of one row tile and of one column tile, (6)-(9).

Names    as in ``tiles``; ``out`` is a ``Gradients`` of ``double_backward``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime.tiles import add_dot, scale_split, subtract_split
from .dropout import dropped, factors, load_words, row_words
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


class KeyRows(NamedTuple):
    """In a kernel: rows of the tensors that have one for each key."""

    k: Any
    v: Any
    ddk: Any
    ddv: Any


@triton.jit
def load_keys(args, b, h, KEYS: tl.constexpr, const: tl.constexpr):
    """All keys of query head ``h``, at most KEYS."""
    cols, key_head = indices(0, KEYS, const), h // const.GROUP
    return KeyRows(
        load_qk(args.k, b, key_head, cols, args.Nk, const),
        load_v(args.v, b, key_head, cols, args.Nk, const),
        load_qk(args.ddk, b, key_head, cols, args.Nk, const),
        load_v(args.ddv, b, key_head, cols, args.Nk, const),
    )


@triton.jit
def rows_with_all_keys(
    args, keys, out, stats, b, h, tile, scale, const: tl.constexpr, ROWS: tl.constexpr
):
    """Double backward, (3)-(9), for ROWS query rows and all their ``keys``: gq, gdo and ``stats``.

    All row sums come from tiles: Δ from P ∘ dP, η from P ∘ ddS, t from A. Returns the rows and tiles from which the
    keys' gradients are made.
    """
    k, v, ddk, ddv = keys
    rows, cols = indices(tile * ROWS, ROWS, const), k.index
    i, j = rows[:, None], cols[None, :]
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    top, _ = load_softmax(args, b, h, rows, scale, const)
    p = probabilities_of_all_keys(q, k, top[:, None], args, b, h, i, j, scale, const)

    do = load_v(args.do, b, h, rows, args.Nq, const)
    words = row_words(args, stats.words, b, h, rows)
    z = factors(args, words, j, const)
    dp = dropped(value_product(do, v, const), z)
    delta = tl.sum(p * dp, 1)
    store_statistic(stats.delta, args, b, h, rows, delta)
    ds = p * (dp - delta[:, None])

    gq, gdo = zeros_qk(ROWS, const), zeros_v(ROWS, const)
    a = tl.zeros([ROWS, cols.shape[0]], const.ACC)
    ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
    if ddk is not None:
        gq = add_dot(gq, ds, ddk.tile, const.PRECISION)
    weighted_dds = a
    if const.HAS_DDS:
        dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
        eta = tl.sum(p * dds, 1)
        store_statistic(stats.eta, args, b, h, rows, eta)
        dds -= eta[:, None]
        weighted_dds = dropped(p * dds, z)
        gdo = add_dot(gdo, weighted_dds, v.tile, const.PRECISION)
        a = ds * dds
    if ddv is not None:
        a += p * dropped(value_product(do, ddv, const), z)
        gdo = add_dot(gdo, dropped(p, z), ddv.tile, const.PRECISION)
    t = tl.sum(a, 1)
    store_statistic(stats.t, args, b, h, rows, t)
    gs = a - p * t[:, None]
    gq = add_dot(gq, gs, k.tile, const.PRECISION)
    store_qk(out.gq, b, h, rows, args.Nq, scale_split(gq, scale), const)
    store_v(out.gdo, b, h, rows, args.Nq, gdo, const)
    return q, do, ddq, ds, weighted_dds, gs


@triton.jit
def head_with_all_keys(
    args, out, stats, b, h, scale, const: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Double backward, (3)-(9), of one head with at most KEYS keys, ROWS queries at a time: every tile is made once."""
    keys = load_keys(args, b, h, KEYS, const)
    gk, gv = zeros_qk(KEYS, const), zeros_v(KEYS, const)
    for tile in range(tl.cdiv(args.Nq, ROWS)):
        made = rows_with_all_keys(args, keys, out, stats, b, h, tile, scale, const, ROWS)
        q, do, ddq, ds, weighted_dds, gs = made
        if ddq is not None:
            gk = add_dot(gk, tl.trans(ds), ddq.tile, const.PRECISION)
        if const.HAS_DDS:
            gv = add_dot(gv, tl.trans(weighted_dds), do.tile, const.PRECISION)
        gk = add_dot(gk, tl.trans(gs), q.tile, const.PRECISION)
    cols = keys.k.index
    store_qk(out.gk, b, h, cols, args.Nk, scale_split(gk, scale), const)
    store_v(out.gv, b, h, cols, args.Nk, gv, const)


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
    words = row_words(args, stats.words, b, h, rows)
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
        z = factors(args, words, j, const)
        ds = p * (dropped(value_product(do, v, const), z) - delta)
        a = tl.zeros([ROWS, KEYS], const.ACC)
        ddk = load_qk(args.ddk, b, key_head, cols, args.Nk, const)
        if ddk is not None:
            gq = add_dot(gq, ds, ddk.tile, const.PRECISION)
        if const.HAS_DDS:
            dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
            a = ds * dds
            dds *= p
            eta += tl.sum(dds, 1)
            gdo = add_dot(gdo, dropped(dds, z), v.tile, const.PRECISION)
        if args.ddv is not None:
            ddv = load_v(args.ddv, b, key_head, cols, args.Nk, const)
            a += p * dropped(value_product(do, ddv, const), z)
            gdo = add_dot(gdo, dropped(p, z), ddv.tile, const.PRECISION)
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
            z = factors(args, load_words(stats.words, args, b, h, rows, 0), j, const)
            ds = p * (dropped(value_product(v, do, const), z) - delta)
            if ddq is not None:
                gk = add_dot(gk, ds, ddq.tile, const.PRECISION)
            gs = p * -load_statistic(stats.t, args, b, h, rows)[None, :]
            if ddv is not None:
                gs += p * dropped(value_product(ddv, do, const), z)
            if const.HAS_DDS:
                dds = score_cotangent(k, ddq, ddk, q, args, b, h, i, j, scale, const)
                dds -= load_statistic(stats.eta, args, b, h, rows)[None, :]
                gv = add_dot(gv, dropped(p * dds, z), do.tile, const.PRECISION)
                gs += ds * dds
            gk = add_dot(gk, gs, q.tile, const.PRECISION)
    store_qk(out.gk, b, hk, cols, args.Nk, scale_split(gk, scale), const)
    store_v(out.gv, b, hk, cols, args.Nk, gv, const)
