"""The penalty of routed input gradients ``u_h = r_h W_h`` on a GPU: (40)-(45) of kernels/README.md.

u [B, H, N, D] never exists: it is made, used and forgotten one tile of tokens at a time, in a scratch of at most
SCRATCH_BYTES. That is more than an L2 cache holds: with 32 MiB an H200 spent 69 ms on a ViT-B in bfloat16, 25 of
them in kernels, the others on launching them. A tile is some tokens of one sample, or all tokens of some samples.
Its products with r and W are matrix products over tokens (``routed_products.py``), its Gram matrices those of any
head gradients (``head_products.py``). No atomics: same bits on every run.

Shapes   grad_qkv, ddgrad_qkv [B, N, 3, H, d] and weight, ddweight [3, H, d, D] of any strides; their gradients
         have the same shapes, dense; cosines, norms as in ``cosine.py``; H up to 64.
Dtypes   float16, bfloat16, float32, float64, which may differ; u and all that is made of it, statistics and sums
         are in float32 (float64 if one operand is).
Traffic  every rung reads r once (the double backward by sample reads twice what spans several tiles of tokens) and
         writes as much, the forward excepted. Scratch, written and read: u forward, u and du
         backward, u, a, du and u̇ double backward, H D numbers of 4 bytes per token each.
Work     2 H 3d D flops per token and product; 1 product forward, 3 backward, 7 double backward.

Why a scratch: with K_hk = W_h W_kᵀ made once, R_hk = r_h K_hk r_kᵀ needs no u, at (3 H d)² flops per token (K is
symmetric). That is 3 H d / (2 D) times as much: for ViT-B (H 12, d 64, D 768) 5.3 against 3.5 Mflop, for the
paper's model (H 4, d 64, D 64) 0.59 against 0.10. A program that kept u on chip would hold all heads of a few
tokens (16 tokens x 16 heads x 32 channels are a quarter of the registers of 4 warps), read all of W for
them (3.5 MB in ViT-B: 16 flops per byte from the cache, where the scratch costs 8 bytes per 384 flops), and could
not sum dr_h = du_h W_hᵀ without making u once for every head.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...common.contracts import RoutedHeadPenaltyBackward, RoutedHeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Tile
from ..runtime.launch import allocate
from . import gram as head_products
from . import routed_products
from .cosine import given
from .plain import empty_cotangents, empty_parts, empty_statistics
from .routed_products import WeightSums

SCRATCH_BYTES = 256 << 20


class _Router:
    """One call: its tiles of tokens, and their u, a, du, u̇ in scratch memory."""

    def __init__(
        self,
        r: Tensor,
        w: Tensor,
        granularity: str,
        reduction: str,
        eps: float,
        *others: Tensor | None,
        buffers: int,
    ):
        """``others`` are read too, like r or w; ``buffers``: scratches of a tile's [b, n, H, D]."""
        B, N, _, H, _ = r.shape
        self.grouping = Grouping(B, H, N, granularity, reduction, eps)
        self.routing = routed_products.static_of(r, w, *others)
        dtype, D = accumulation_dtype(r.dtype, w.dtype), w.shape[3]
        self.tokens = min(B * N, max(1, SCRATCH_BYTES // (buffers * H * D * dtype.itemsize)))
        self._scratch = [allocate((self.tokens, H, D), dtype, r) for _ in range(buffers)]
        self.like = self._scratch[0]
        self.static = head_products.static_of(self.grouping, self.like[None].transpose(1, 2))
        if max(r.dtype.itemsize, w.dtype.itemsize) < dtype.itemsize and dtype == torch.float32:
            # all that is mixed ends in half results, of fewer bits than one TF32 product
            mixing = self.static.MIXING.replace("tf32x3", "tf32")
            self.static = self.static._replace(MIXING=mixing)

    def blocks(self) -> Iterator[list[Tile]]:
        """Tiles that together hold whole groups."""
        return self.grouping.blocks(self.tokens)

    def scratch(self, i: int, t: Tile) -> Tensor:
        """Scratch ``i`` of a tile, [b, n, H, D]."""
        b, n = (s.stop - s.start for s in (t.samples, t.tokens))
        return self._scratch[i][: b * n].unflatten(0, (b, n))

    def routed(self, i: int, t: Tile, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """(40) or (43) of a tile into scratch ``i``: the sum of r W over those ``pairs`` that exist."""
        u = self.scratch(i, t)
        some = [(of_tile(r, t), w) for r, w in pairs if r is not None and w is not None]
        routed_products.route(self.routing, some, u)
        return heads_of(u)

    def products(
        self, block: list[Tile], operands: Callable[[Tile], tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """Parts of X Yᵀ of the samples of a block, [b, parts, H, H]; ``operands(tile)``: X, Y."""
        raw = empty_parts(self.static, *(heads_of(self.scratch(0, t)) for t in block))
        first = 0
        for t in block:
            x, y = operands(t)
            last = first + head_products.programs_of(self.static, x)[2]
            head_products.products(self.static, x, y, raw[:, first:last])
            first = last
        return raw


def of_tile(x: Tensor, t: Tile) -> Tensor:
    """Of ``[B, N, ...]`` the tile's [b, n, ...]."""
    return x[t.samples, t.tokens]


def heads_of(u: Tensor) -> Tensor:
    """[b, n, H, D] as gradients [b, H, n, D]."""
    return u.transpose(1, 2)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41): penalty, cosines, norms."""
    router = _Router(grad_qkv, weight, granularity, reduction, eps, buffers=1)
    g, static = router.grouping, router.static
    out, penalties = empty_statistics(g, router.like)

    def routed(t: Tile) -> Tensor:
        return router.routed(0, t, (grad_qkv, weight))

    for block in router.blocks():
        t = block[0]
        raw = None if g.by_token else router.products(block, lambda t: (routed(t), None))
        u = routed(t) if g.by_token else None
        head_products.statistics(g, static, u, raw, out.of(g, t), g.of(penalties, t))
    return penalties.sum(), out.cosines, out.norms


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> tuple[Tensor, Tensor]:
    """(42): ``dgrad_qkv`` and ``dweight``."""
    grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    router = _Router(grad_qkv, weight, granularity, reduction, eps, buffers=2)
    g, here = router.grouping, given(cosines, norms, dpenalty, dcosines)
    dr = allocate(tuple(grad_qkv.shape), grad_qkv.dtype, grad_qkv)
    sums = WeightSums(router.routing, router.like)
    for t in (t for block in router.blocks() for t in block):
        u, du = router.routed(0, t, (grad_qkv, weight)), router.scratch(1, t)
        head_products.backward(g, router.static, u, heads_of(du), here.of(g, t))
        routed_products.route_back(router.routing, [(du, weight)], of_tile(dr, t))
        sums.add([(of_tile(grad_qkv, t), du)])
    return dr, sums.total(weight)


def routed_head_penalty_double_backward(
    inputs: RoutedHeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(43)-(45): ``ggrad_qkv``, ``gweight``, and ``gdpenalty``, ``gdcosines`` where cotangents exist.

    One of ``ddgrad_qkv`` and ``ddweight`` may be absent: its products are left out.
    """
    (
        grad_qkv,
        weight,
        cosines,
        norms,
        dpenalty,
        dcosines,
        ddgrad_qkv,
        ddweight,
        granularity,
        reduction,
        eps,
    ) = inputs
    others = ddgrad_qkv, ddweight
    router = _Router(grad_qkv, weight, granularity, reduction, eps, *others, buffers=4)
    g, static = router.grouping, router.static
    given_here = given(cosines, norms, dpenalty, dcosines)
    gdpenalties, gdcosines = empty_cotangents(given_here)
    gr = allocate(tuple(grad_qkv.shape), grad_qkv.dtype, grad_qkv)
    sums = WeightSums(router.routing, router.like)

    def operands(t: Tile) -> tuple[Tensor, Tensor]:
        """a and u of a tile."""
        u = router.routed(0, t, (grad_qkv, weight))
        return router.routed(1, t, (ddgrad_qkv, weight), (grad_qkv, ddweight)), u

    for block in router.blocks():
        here = given_here.of(g, block[0])
        gdp, gdc = (None if x is None else g.of(x, block[0]) for x in (gdpenalties, gdcosines))
        m_dot = None
        if not g.by_token:
            raw = router.products(block, operands)
            m_dot = head_products.curvatures(g, static, raw, here, gdp, gdc)
        for t in block:
            if g.by_token or len(block) > 1:
                operands(t)
            u, a, du, u_dot = (router.scratch(i, t) for i in range(4))
            x, a, gx, dx = (heads_of(y) for y in (u, a, u_dot, du))
            head_products.double_backward(g, static, x, a, gx, dx, here, m_dot, gdp, gdc)
            back, rows = [(u_dot, weight)], [(of_tile(grad_qkv, t), u_dot)]
            if ddweight is not None:
                back.append((du, ddweight))
            if ddgrad_qkv is not None:
                rows.append((of_tile(ddgrad_qkv, t), du))
            routed_products.route_back(router.routing, back, of_tile(gr, t))
            sums.add(rows)
    gdpenalty = None if gdpenalties is None else gdpenalties.sum()
    return gr, sums.total(weight), gdpenalty, gdcosines
