"""Attention in PyTorch, tile by tile: forward, backward and double backward, (1)-(9) of kernels/README.md.

A tile holds the scores of some (sample, key head) pairs and some query rows with *all* their keys, so that softmax and
the row sums need one pass, and no matrix of N x N scores outlives a tile. The query heads of a key head are stacked
along the rows. Key-side gradients are summed over the row tiles of a pair in order: same bits on every run.

Shapes   as in ``dispatch``; the results are allocated there.
Dtypes   any floating; scores, statistics, sums and products in float32 (float64 for float64).
Traffic  each input is read once per row tile, each output written once.
P        is exp(S - top) over its own row sum (1a), since the tile holds the whole row; of the statistics only ``top``,
         the largest score, is read.
delta    is the row sum of P o dP, not of do o o: where softmax saturates, delta has to cancel against dP, which it
         does only if both were computed from the same P. ``o`` is not read.
Dropout  (53)-(57): the weights that are kept are found again in every tile.
Empty    rows, which attend to nothing, have ``top`` = +inf: exp(S - top) is then 0, and so is their output.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.dropout import kept, row_words
from ...common.dtypes import accumulation_dtype
from ..runtime.scratch import Scratch
from . import formulas
from .inputs import Inputs

TILE_BYTES = 1 << 20
"""Bytes of a tile of scores: the few buffers of this size stay in the L2 and L3 caches."""


class _Tile(NamedTuple):
    """Indices of one tile."""

    b: slice  # samples
    hk: slice  # key heads
    h: slice  # query heads
    rows: slice  # query rows
    keys: slice  # the keys that the rows may attend to
    pairs: int  # (sample, key head) pairs in the tile
    stacked: int  # query rows per pair: group * rows
    first: bool  # first row tile of these pairs
    last: bool


def _tiles(q: Tensor, k: Tensor, is_causal: bool) -> Iterator[_Tile]:
    """Yield all tiles, row tiles innermost: a pair's key-side sums run from its ``first`` tile to its ``last``."""
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
    """Contiguous tiles of the operands, ``[pairs, stacked rows or keys, width]``, in the accumulation dtype."""

    def __init__(self, like: Tensor):
        self.scratch = Scratch(accumulation_dtype(like.dtype), like.device)
        self._kept: dict[str, Tensor] = {}

    def queries(self, name: str, x: Tensor, t: _Tile) -> Tensor:
        return self.scratch.load(name, x[t.b, t.h, t.rows]).view(t.pairs, t.stacked, x.shape[-1])

    def keys(self, name: str, x: Tensor, t: _Tile) -> Tensor:
        """The keys that the tile may attend to; all keys of its pairs are loaded at their first row tile."""
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
    """The tile's part of a broadcastable ``mask``; broadcast axes keep size 1."""
    where = (t.b, t.h, t.rows, t.keys)
    return mask[tuple(s if n > 1 else slice(0, 1) for s, n in zip(where, mask.shape, strict=True))]


def _scores(out: Tensor, q: Tensor, k: Tensor, inputs: Inputs, t: _Tile) -> Tensor:
    """(1): S = scale Q K^T + mask into ``out``, minus infinity where a query may not attend."""
    torch.baddbmm(out, q, k.mT, beta=0, alpha=inputs.scale, out=out)
    view, mask = _by_head(out, t), inputs.mask
    if mask is not None:
        tile = _mask_tile(mask, t)
        view.masked_fill_(~tile, -torch.inf) if mask.dtype == torch.bool else view.add_(tile)
    if inputs.is_causal:
        rows = torch.arange(t.rows.start, t.rows.stop, device=out.device)
        cols = torch.arange(t.keys.stop, device=out.device)
        view.masked_fill_(cols > rows[:, None], -torch.inf)
    return out


class _Dropout:
    """(53): Z of a tile, [pairs, stacked, keys]; nothing without a seed."""

    def __init__(self, inputs: Inputs):
        self.seed, self.p, self.words = inputs.seed, inputs.dropout_p, None
        if self.seed is not None:
            B, H, Nq, _ = inputs.q.shape
            rows = torch.arange(B * H * Nq, device=self.seed.device)
            self.words = tuple(x.view(B, H, Nq, 1) for x in row_words(self.seed, rows))

    def factors(self, load: _Loader, t: _Tile) -> Tensor | None:
        if self.words is None:
            return None
        a, c = (x[t.b, t.h, t.rows] for x in self.words)
        keys = torch.arange(t.keys.stop, device=a.device)
        z = load.scores("z", t)
        _by_head(z, t).copy_(kept((a, c), keys, self.p))
        return z.mul_(1 / (1 - self.p))


def _drop(z: Tensor | None, *tiles: Tensor | None) -> None:
    """Multiply tiles by Z in place."""
    for x in tiles:
        if x is not None and z is not None:
            x.mul_(z)


def _add_to_mask(total: Tensor, ds: Tensor, t: _Tile) -> None:
    """Add a tile of score gradients to the mask's gradient, summed over the mask's broadcast axes."""
    target = _mask_tile(total, t)
    target += _by_head(ds, t).sum_to_size(target.shape)


def forward(inputs: Inputs, softmax: Tensor, o: Tensor) -> None:
    """(1)-(2): write the output ``o`` [B, H, Nq, dv] and its statistics (1a) ``softmax`` [B, H, 2, Nq]."""
    q, k, v, *_ = inputs
    run, load = formulas.fused(formulas.FORWARD, q, k), _Loader(q)
    dropout = _Dropout(inputs)
    for t in _tiles(q, k, inputs.is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        s = _scores(load.scores("s", t), load.queries("q", q, t), kt, inputs, t)
        p, statistics = formulas.forward(run, s)
        _drop(dropout.factors(load, t), p)
        ot = torch.bmm(p, vt, out=load.scratch.get("o", t.pairs, t.stacked, v.shape[-1]))
        o[t.b, t.h, t.rows] = _by_head(ot, t)
        softmax[t.b, t.h, :, t.rows] = _by_head(statistics, t).mT


def backward(
    inputs: Inputs, softmax: Tensor, do: Tensor, results: tuple[Tensor, ...], mask_grad: bool
) -> Tensor | None:
    """(3)-(5): write ``results``, dq, dk, dv; return ``dmask`` if ``mask_grad``."""
    q, k, v, mask, _, is_causal, scale, _ = inputs
    dq, dk, dv = results
    run, load = formulas.fused(formulas.BACKWARD, q, k), _Loader(q)
    dropout = _Dropout(inputs)
    dmask = _zero_mask(mask, softmax) if mask_grad else None
    for t in _tiles(q, k, is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        qt, dot = load.queries("q", q, t), load.queries("do", do, t)
        s = _scores(load.scores("p", t), qt, kt, inputs, t)
        dp, z = torch.bmm(dot, vt.mT, out=load.scores("ds", t)), dropout.factors(load, t)
        _drop(z, dp)
        p, ds = formulas.backward(run, s, load.largest(softmax, t), dp, partial(load.scores, t=t))
        _drop(z, p)

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
    return _like_mask(dmask, mask)


def double_backward(
    inputs: Inputs,
    softmax: Tensor,
    do: Tensor,
    cotangents: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    mask_grad: bool,
) -> Tensor | None:
    """(6)-(9) for ``cotangents``, ddq, ddk, ddv, ddmask: write ``results``, gq, gk, gv, gdo; return ``gmask``."""
    q, k, v, mask, _, is_causal, scale, _ = inputs
    ddq, ddk, ddv, ddmask = cotangents
    gq, gk, gv, gdo = results
    run, load, dropout = None, _Loader(q), _Dropout(inputs)
    if not (ddq is None and ddk is None and ddmask is None) and ddv is not None:
        run = formulas.fused(formulas.DOUBLE_BACKWARD, q, k)
    gmask = _zero_mask(mask, softmax) if mask_grad else None
    for t in _tiles(q, k, is_causal):
        kt, vt = load.keys("k", k, t), load.keys("v", v, t)
        ddqt = None if ddq is None else load.queries("ddq", ddq, t)
        ddkt = None if ddk is None else load.keys("ddk", ddk, t)
        ddvt = None if ddv is None else load.keys("ddv", ddv, t)
        qt, dot = load.queries("q", q, t), load.queries("do", do, t)
        s = _scores(load.scores("p", t), qt, kt, inputs, t)
        dp = torch.bmm(dot, vt.mT, out=load.scores("ds", t))
        dds = _score_cotangent(load, t, (qt, kt), (ddqt, ddkt, ddmask), scale)
        y = None if ddvt is None else torch.bmm(dot, ddvt.mT, out=load.scores("y", t))
        largest, buffer = load.largest(softmax, t), partial(load.scores, t=t)
        z = dropout.factors(load, t)
        _drop(z, dp, y)
        p, ds, ddp, gs = formulas.double_backward(run, s, largest, dp, dds, y, buffer)
        _drop(z, p, ddp)

        gkt, gvt = load.accumulator("gk", k, t), load.accumulator("gv", v, t)
        load.add(gkt, gs, qt, t, alpha=scale)
        gqt = load.scratch.get("gq", *qt.shape)
        torch.baddbmm(gqt, gs, kt, beta=0, alpha=scale, out=gqt)
        gdot = load.scratch.get("gdo", *dot.shape).zero_()
        if ddqt is not None:
            load.add(gkt, ds, ddqt, t, alpha=scale)
        if ddkt is not None:
            gqt.baddbmm_(ds, ddkt, alpha=scale)
        if ddp is not None:
            load.add(gvt, ddp, dot, t)
            gdot.baddbmm_(ddp, vt)
        if ddvt is not None:
            gdot.baddbmm_(p, ddvt)
        gq[t.b, t.h, t.rows] = _by_head(gqt, t)
        gdo[t.b, t.h, t.rows] = _by_head(gdot, t)
        if gmask is not None:
            _add_to_mask(gmask, gs, t)
        if t.last:
            gk[t.b, t.hk] = gkt.view_as(gk[t.b, t.hk])
            gv[t.b, t.hk] = gvt.view_as(gv[t.b, t.hk])
    return _like_mask(gmask, mask)


def _score_cotangent(
    load: _Loader,
    t: _Tile,
    operands: tuple[Tensor, Tensor],
    cotangents: tuple[Tensor | None, ...],
    scale: float,
) -> Tensor | None:
    """(6): ddS [pairs, stacked, keys], or None if all cotangents that it depends on are absent."""
    (q, k), (ddq, ddk, ddmask) = operands, cotangents
    if ddq is None and ddk is None and ddmask is None:
        return None
    dds = load.scores("dds", t)
    if ddq is not None:
        torch.baddbmm(dds, ddq, k.mT, beta=0, alpha=scale, out=dds)
    else:
        dds.zero_()
    if ddk is not None:
        dds.baddbmm_(q, ddk.mT, alpha=scale)
    if ddmask is not None:
        _by_head(dds, t).add_(_mask_tile(ddmask, t))
    return dds


def _zero_mask(mask: Tensor | None, softmax: Tensor) -> Tensor | None:
    """Return zeros like the mask, in the accumulation dtype."""
    return None if mask is None else mask.new_zeros(mask.shape, dtype=softmax.dtype)


def _like_mask(total: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return the mask's gradient in the mask's dtype."""
    return None if total is None or mask is None else total.to(mask.dtype)
