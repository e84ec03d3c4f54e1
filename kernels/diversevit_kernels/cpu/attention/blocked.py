"""Attention on a CPU: forward, backward and double backward, equations (1)-(9) of kernels/README.md.

One tile owns ``c`` (sample, key head) pairs and ``r`` query rows with *all* their keys, so softmax and
the row sums need one pass and nothing N x N outlives a tile. Grouped query heads are stacked along
the rows. Key-side results are summed over a pair's row tiles in order: same bits on every run.

Shapes   q, o, do [B, H, Nq, .]; k, v [B, Hkv, Nk, .], H a multiple of Hkv; mask [B|1, H|1, Nq|1, Nk|1],
         bool (True = attend) or additive; the softmax's statistics (1a) [B, H, 2, Nq].
Dtypes   any floating; scores, statistics and sums in float32 (float64 for float64), products of tiles too.
Traffic  each input is read once per row tile, each output written once.
P        is exp(S - top) over its own row sum (1a), which the tile holds; of the statistics only the largest score
         is read.
D        is summed from P o dP, which the tile holds, and not from do o o: where softmax saturates the
         two cancel, whatever o was rounded to. ``o`` is not read.
Empty    rows, that attend to nothing, have the largest score +inf: exp(S - top) is then 0, and so is their output.
Native   Where there is a compiler and the mask needs no gradient, a rung is one call of a C++ kernel
         (``attention_native``): the same tiles, with registers in place of library products. It multiplies bfloat16
         as such and sums in float32.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.allocator import new_empty, new_empty_heads
from ..runtime.scratch import Scratch
from . import formulas as rowwise
from . import native

TILE_BYTES = 1 << 20
"""Of a tile of scores: the few tile-shaped buffers of a rung stay in the L2 and L3 caches."""


class _Tile(NamedTuple):
    """Indices of one tile: samples, key heads, query heads, query rows, and the keys they may see."""

    b: slice
    hk: slice
    h: slice
    rows: slice
    keys: slice
    pairs: int  # (sample, key head) pairs in the tile
    stacked: int  # query rows per pair: group * rows
    first: bool  # first row tile of these pairs
    last: bool


def _tiles(q: Tensor, k: Tensor, is_causal: bool) -> Iterator[_Tile]:
    """Row tiles innermost, so that key-side accumulators live for one run of ``first`` to ``last``."""
    (B, H, Nq, _), (_, Hkv, Nk, _) = q.shape, k.shape
    group, elements = H // Hkv, TILE_BYTES // accumulation_dtype(q.dtype).itemsize
    rows = max(1, min(Nq, elements // (group * Nk)))
    pairs = max(1, elements // (group * rows * Nk))
    heads = min(Hkv, pairs)
    samples = max(1, pairs // heads) if heads == Hkv else 1
    for b in range(0, B, samples):
        b_end = min(B, b + samples)
        for h in range(0, Hkv, heads):
            h_end = min(Hkv, h + heads)
            for i in range(0, Nq, rows):
                end = min(Nq, i + rows)
                yield _Tile(
                    b=slice(b, b_end),
                    hk=slice(h, h_end),
                    h=slice(h * group, h_end * group),
                    rows=slice(i, end),
                    keys=slice(0, min(Nk, end) if is_causal else Nk),
                    pairs=(b_end - b) * (h_end - h),
                    stacked=group * (end - i),
                    first=i == 0,
                    last=end == Nq,
                )


class _Loader:
    """Tile-shaped dense views of the operands, ``[pairs, stacked rows or keys, width]``, in the accumulation dtype."""

    def __init__(self, like: Tensor):
        self.scratch = Scratch(accumulation_dtype(like.dtype), like.device)
        self._kept: dict[str, Tensor] = {}

    def queries(self, name: str, x: Tensor, t: _Tile) -> Tensor:
        return self.scratch.load(name, x[t.b, t.h, t.rows]).view(t.pairs, t.stacked, x.shape[-1])

    def keys(self, name: str, x: Tensor, t: _Tile) -> Tensor:
        """All keys of the tile's pairs, loaded at their first row tile, cut to those it may see."""
        shape = (t.pairs, x.shape[2], x.shape[-1])
        if t.first:
            self._kept[name] = self.scratch.load(name, x[t.b, t.hk])
        return self._kept[name].view(shape)[:, t.keys]

    def largest(self, softmax: Tensor, t: _Tile) -> Tensor:
        """The largest scores of (1a), [pairs, stacked rows, 1]."""
        return softmax[t.b, t.h, 0, t.rows].reshape(t.pairs, t.stacked, 1)

    def scores(self, name: str, t: _Tile) -> Tensor:
        return self.scratch.get(name, t.pairs, t.stacked, t.keys.stop)

    def accumulator(self, name: str, x: Tensor, t: _Tile) -> Tensor:
        """Running sum over row tiles for every key of the pairs, zeroed at the first."""
        total = self.scratch.get(name, t.pairs, x.shape[2], x.shape[-1])
        return total.zero_() if t.first else total

    def add(self, total: Tensor, x: Tensor, y: Tensor, t: _Tile, alpha: float = 1.0) -> None:
        """total += alpha x^T y over the keys of the tile: [pairs, stacked, keys] and [pairs, stacked, width]."""
        total[:, t.keys].baddbmm_(x.mT, y, alpha=alpha)


def _by_head(x: Tensor, t: _Tile) -> Tensor:
    """[pairs, stacked, n] -> [samples, query heads, rows, n], the layout of tensors outside."""
    samples, heads = t.b.stop - t.b.start, t.h.stop - t.h.start
    return x.view(samples, heads, t.rows.stop - t.rows.start, x.shape[-1])


def _mask_tile(mask: Tensor, t: _Tile) -> Tensor:
    """The part of a broadcastable ``mask`` that a tile meets; broadcast axes stay of size 1."""
    where = (t.b, t.h, t.rows, t.keys)
    return mask[tuple(s if n > 1 else slice(0, 1) for s, n in zip(where, mask.shape, strict=True))]


def _scores(
    out: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float, t: _Tile
) -> Tensor:
    """(1): S = s Q K^T + M into ``out``, minus infinity where a query may not look."""
    torch.baddbmm(out, q, k.mT, beta=0, alpha=scale, out=out)
    view = _by_head(out, t)
    if mask is not None:
        tile = _mask_tile(mask, t)
        view.masked_fill_(~tile, -torch.inf) if mask.dtype == torch.bool else view.add_(tile)
    if is_causal:
        rows = torch.arange(t.rows.start, t.rows.stop, device=out.device)
        cols = torch.arange(t.keys.stop, device=out.device)
        view.masked_fill_(cols > rows[:, None], -torch.inf)
    return out


def _add_to_mask(total: Tensor, ds: Tensor, t: _Tile) -> None:
    """Add a tile of score gradients to the mask's, summed over the axes the mask broadcasts."""
    target = _mask_tile(total, t)
    target += _by_head(ds, t).sum_to_size(target.shape)


def attention_packed(qkv: Tensor) -> Tensor:
    """Uninitialised, dense, like ``qkv`` [B, N, 3, H, d]: what ``into`` may be views of."""
    return new_empty(qkv, *qkv.shape)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(1)-(2): output ``[B, H, Nq, dv]`` and (1a) ``[B, H, 2, Nq]``, the largest score and the share."""
    o = new_empty_heads(q, v.shape[-1])
    B, H, Nq, _ = q.shape
    softmax = q.new_empty(B, H, 2, Nq, dtype=accumulation_dtype(q.dtype))
    if native.runs(q):
        native.call("forward", q, k, v, mask, softmax, is_causal, scale, o=o)
        return o, softmax
    run, load = rowwise.fused(rowwise.FORWARD, q, k), _Loader(q)
    for t in _tiles(q, k, is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        s = _scores(load.scores("s", t), load.queries("q", q, t), kt, mask, is_causal, scale, t)
        p, statistics = rowwise.forward(run, s)
        ot = torch.bmm(p, vt, out=load.scratch.get("o", t.pairs, t.stacked, v.shape[-1]))
        o[t.b, t.h, t.rows] = _by_head(ot, t)
        softmax[t.b, t.h, :, t.rows] = _by_head(statistics, t).mT
    return o, softmax


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(3)-(5): ``dq``, ``dk``, ``dv`` like q, k, v, and ``dmask`` like the mask if ``mask_grad``.

    ``into``: where to write the first three.
    """
    dq, dk, dv = into or (new_empty_heads(x, x.shape[-1]) for x in (q, k, v))
    if native.runs(q, mask_gradient=mask_grad):
        grads = {"gq": dq, "gk": dk, "gv": dv}
        native.call("backward", q, k, v, mask, softmax, is_causal, scale, do=do, **grads)
        return dq, dk, dv, None
    run, load = rowwise.fused(rowwise.BACKWARD, q, k), _Loader(q)
    dmask = (
        mask.new_zeros(mask.shape, dtype=softmax.dtype) if mask_grad and mask is not None else None
    )
    for t in _tiles(q, k, is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        qt, dot = load.queries("q", q, t), load.queries("do", do, t)
        s = _scores(load.scores("p", t), qt, kt, mask, is_causal, scale, t)
        dp = torch.bmm(dot, vt.mT, out=load.scores("ds", t))
        p, ds = rowwise.backward(run, s, load.largest(softmax, t), dp, partial(load.scores, t=t))

        dvt, dkt = load.accumulator("dv", v, t), load.accumulator("dk", k, t)
        load.add(dvt, p, dot, t)
        load.add(dkt, ds, qt, t, alpha=scale)
        dqt = load.scratch.get("dq", *qt.shape)
        torch.baddbmm(dqt, ds, kt, beta=0, alpha=scale, out=dqt)
        dq[t.b, t.h, t.rows] = _by_head(dqt, t)
        if dmask is not None:
            _add_to_mask(dmask, ds, t)
        if t.last:
            dk[t.b, t.hk] = dkt.view_as(dk[t.b, t.hk])
            dv[t.b, t.hk] = dvt.view_as(dv[t.b, t.hk])
    return dq, dk, dv, dmask if dmask is None or mask is None else dmask.to(mask.dtype)


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

    An absent cotangent costs nothing: its products and their buffers are left out. ``dq`` is not read.
    ``into``: where to write the first three.
    """
    gq, gk, gv = into or (new_empty_heads(x, x.shape[-1]) for x in (q, k, v))
    gdo = new_empty_heads(do, do.shape[-1])
    if native.runs(q, mask_gradient=mask_grad or ddmask is not None):
        given = {"do": do, "ddq": ddq, "ddk": ddk, "ddv": ddv}
        grads = {"gq": gq, "gk": gk, "gv": gv, "gdo": gdo}
        native.call("double_backward", q, k, v, mask, softmax, is_causal, scale, **given, **grads)
        return gq, gk, gv, gdo, None
    run, load = None, _Loader(q)
    if not (ddq is None and ddk is None and ddmask is None) and ddv is not None:
        run = rowwise.fused(rowwise.DOUBLE_BACKWARD, q, k)
    gmask = (
        mask.new_zeros(mask.shape, dtype=softmax.dtype) if mask_grad and mask is not None else None
    )
    for t in _tiles(q, k, is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        a = None if ddq is None else load.queries("ddq", ddq, t)
        b = None if ddk is None else load.keys("ddk", ddk, t)
        c = None if ddv is None else load.keys("ddv", ddv, t)
        qt, dot = load.queries("q", q, t), load.queries("do", do, t)
        s = _scores(load.scores("p", t), qt, kt, mask, is_causal, scale, t)
        dp = torch.bmm(dot, vt.mT, out=load.scores("ds", t))
        x = _score_cotangent(load, t, qt, kt, a, b, ddmask, scale)
        y = None if c is None else torch.bmm(dot, c.mT, out=load.scores("y", t))
        buffer = partial(load.scores, t=t)
        p, ds, e, r = rowwise.double_backward(run, s, load.largest(softmax, t), dp, x, y, buffer)

        gkt, gvt = load.accumulator("gk", k, t), load.accumulator("gv", v, t)
        load.add(gkt, r, qt, t, alpha=scale)
        gqt = load.scratch.get("gq", *qt.shape)
        torch.baddbmm(gqt, r, kt, beta=0, alpha=scale, out=gqt)
        gdot = load.scratch.get("gdo", *dot.shape).zero_()
        if a is not None:
            load.add(gkt, ds, a, t, alpha=scale)
        if b is not None:
            gqt.baddbmm_(ds, b, alpha=scale)
        if e is not None:
            load.add(gvt, e, dot, t)
            gdot.baddbmm_(e, vt)
        if c is not None:
            gdot.baddbmm_(p, c)
        gq[t.b, t.h, t.rows] = _by_head(gqt, t)
        gdo[t.b, t.h, t.rows] = _by_head(gdot, t)
        if gmask is not None:
            _add_to_mask(gmask, r, t)
        if t.last:
            gk[t.b, t.hk] = gkt.view_as(gk[t.b, t.hk])
            gv[t.b, t.hk] = gvt.view_as(gv[t.b, t.hk])
    return gq, gk, gv, gdo, gmask if gmask is None or mask is None else gmask.to(mask.dtype)


def _score_cotangent(
    load: _Loader,
    t: _Tile,
    q: Tensor,
    k: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    ddmask: Tensor | None,
    scale: float,
) -> Tensor | None:
    """(6): ``X`` [pairs, stacked, keys], or None if no cotangent feeds it."""
    if a is None and b is None and ddmask is None:
        return None
    x = load.scores("x", t)
    if a is not None:
        torch.baddbmm(x, a, k.mT, beta=0, alpha=scale, out=x)
    else:
        x.zero_()
    if b is not None:
        x.baddbmm_(q, b.mT, alpha=scale)
    if ddmask is not None:
        _by_head(x, t).add_(_mask_tile(ddmask, t))
    return x
