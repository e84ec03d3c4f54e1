"""Device functions for a head with few queries: its double backward, (6)-(9), and Δ of its backward with dropout.

Names    as in ``double_backward_tiles``.
"""

import triton
import triton.language as tl

from ..runtime.tiles import add_dot, scale_split
from .dropout import dropped, factors, row_words
from .tiles import (
    indices,
    load_qk,
    load_softmax,
    load_v,
    probabilities,
    score_cotangent,
    share_of,
    store_qk,
    store_statistic,
    store_v,
    value_product,
    zeros_qk,
    zeros_v,
)


@triton.jit
def _score_tiles(
    q, do, ddq, ddk, ddv, top, share, z, args, b, h, rows, cols, scale, const: tl.constexpr
):
    """Load a key tile and compute (3)-(8): k and v, and the tiles P, dP, ddS and P ∘ Y (zeros if absent)."""
    i, j = rows[:, None], cols[None, :]
    k = load_qk(args.k, b, h, cols, args.Nk, const)
    v = load_v(args.v, b, h, cols, args.Nk, const)
    p = probabilities(q, k, top[:, None], share[:, None], args, b, h, i, j, scale, const)
    dp = dropped(value_product(do, v, const), z)
    dds = tl.zeros_like(p)
    if const.HAS_DDS:
        dds = score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const)
    py = tl.zeros_like(p)
    if ddv is not None:
        py = p * dropped(value_product(do, ddv, const), z)
    return k, v, p, dp, dds, py


@triton.jit
def delta_with_dropout(
    q,
    do,
    top,
    share,
    words,
    args,
    stats,
    b,
    h,
    rows,
    scale,
    const: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Δ of (3), the mean of dP under P, by a walk over the keys; also written to ``stats``.

    Where one key has all the weight, dP − Δ is exactly 0. It is not with rowsum(dO ∘ O), as o is v / (1 − p), rounded.
    """
    total, delta = tl.zeros([rows.shape[0]], const.ACC), tl.zeros([rows.shape[0]], const.ACC)
    for start in range(0, args.Nk, KEYS):
        cols = indices(start, KEYS, const)
        z = factors(args, words, cols[None, :], const)
        _, _, p, dp, _, _ = _score_tiles(
            q, do, None, None, None, top, share, z, args, b, h, rows, cols, scale, const
        )
        total += tl.sum(p, 1)
        delta += tl.sum(p * dp, 1)
    delta *= share_of(total)
    store_statistic(stats.delta, args, b, h, rows, delta)
    return delta


@triton.jit
def head_with_few_queries(
    args, out, stats, b, h, scale, const: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Double backward, (6)-(9), of a head whose queries all fit ROWS rows; walks its keys twice, KEYS at a time.

    The first walk gives ``stats``, the second the gradients; it finds the keys in the L2 cache. One walk gives all of
    ``stats`` because with Δ = rowsum(P ∘ dP), rowsum(dS ∘ ddS) is rowsum(P ∘ dP ∘ ddS) − Δ η. Where one key has all the
    weight, that difference is exactly zero; it must be taken before P ∘ Y is added. All are means under P.
    """
    rows = indices(0, ROWS, const)
    q = load_qk(args.q, b, h, rows, args.Nq, const)
    do = load_v(args.do, b, h, rows, args.Nq, const)
    ddq = load_qk(args.ddq, b, h, rows, args.Nq, const)
    top, share = load_softmax(args, b, h, rows, scale, const)
    words = row_words(args, stats.words, b, h, rows)
    total = tl.zeros([ROWS], const.ACC)
    delta = tl.zeros([ROWS], const.ACC)
    eta = tl.zeros([ROWS], const.ACC)
    dp_dds = tl.zeros([ROWS], const.ACC)
    t = tl.zeros([ROWS], const.ACC)
    for start in range(0, args.Nk, KEYS):
        cols = indices(start, KEYS, const)
        z = factors(args, words, cols[None, :], const)
        ddk = load_qk(args.ddk, b, h, cols, args.Nk, const)
        ddv = load_v(args.ddv, b, h, cols, args.Nk, const)
        _, _, p, dp, dds, py = _score_tiles(
            q, do, ddq, ddk, ddv, top, share, z, args, b, h, rows, cols, scale, const
        )
        total += tl.sum(p, 1)
        delta += tl.sum(p * dp, 1)
        eta += tl.sum(p * dds, 1)
        dp_dds += tl.sum(p * dp * dds, 1)
        t += tl.sum(py, 1)
    normalize = share_of(total)  # the sum of P is not quite 1
    delta *= normalize
    eta *= normalize
    t = (t + (dp_dds - delta * eta * total)) * normalize
    store_statistic(stats.delta, args, b, h, rows, delta)
    store_statistic(stats.eta, args, b, h, rows, eta)
    store_statistic(stats.t, args, b, h, rows, t)

    gq, gdo = zeros_qk(ROWS, const), zeros_v(ROWS, const)
    for start in range(0, args.Nk, KEYS):
        cols = indices(start, KEYS, const)
        z = factors(args, words, cols[None, :], const)
        ddk = load_qk(args.ddk, b, h, cols, args.Nk, const)
        ddv = load_v(args.ddv, b, h, cols, args.Nk, const)
        k, v, p, dp, dds, py = _score_tiles(
            q, do, ddq, ddk, ddv, top, share, z, args, b, h, rows, cols, scale, const
        )
        ds = p * (dp - delta[:, None])
        gk, gv = zeros_qk(KEYS, const), zeros_v(KEYS, const)
        gs = py - p * t[:, None]
        if const.HAS_DDS:
            dds -= eta[:, None]
            gs += ds * dds
            gdo = add_dot(gdo, dropped(p * dds, z), v.tile, const.PRECISION)
            gv = add_dot(gv, tl.trans(dropped(p * dds, z)), do.tile, const.PRECISION)
        if ddk is not None:
            gq = add_dot(gq, ds, ddk.tile, const.PRECISION)
        if ddv is not None:
            gdo = add_dot(gdo, dropped(p, z), ddv.tile, const.PRECISION)
        if ddq is not None:
            gk = add_dot(gk, tl.trans(ds), ddq.tile, const.PRECISION)
        gk = add_dot(gk, tl.trans(gs), q.tile, const.PRECISION)
        gq = add_dot(gq, gs, k.tile, const.PRECISION)
        store_qk(out.gk, b, h, cols, args.Nk, scale_split(gk, scale), const)
        store_v(out.gv, b, h, cols, args.Nk, gv, const)
    store_qk(out.gq, b, h, rows, args.Nq, scale_split(gq, scale), const)
    store_v(out.gdo, b, h, rows, args.Nq, gdo, const)
