"""The penalty of routed input gradients ``u_h = r_h W_h`` on a GPU: (40)-(45) of kernels/README.md.

u [B, H, N, D] never exists: it is made, used and forgotten one tile of tokens at a time, in a scratch of at most
SCRATCH_BYTES. A tile is some tokens of one sample, or all tokens of some samples. Its products with r and W are matrix
products over tokens (``routed_products.py``), its Gram matrices those of any head gradients (``gram.py``). No atomics:
same bits on every run. Why a scratch, and why so large: docs/design/routed_penalty.md.

Shapes   grad_qkv, ddgrad_qkv [B, N, 3, H, d] and weight, ddweight [3, H, d, D] of any strides; their gradients
         have the same shapes, dense; cosines, norms as in ``cosine.py``; H up to 64.
Dtypes   float16, bfloat16, float32, float64, which may differ; u, ddu, statistics and sums are in float32 (float64 if
         one operand is); so are du and gu, but for operands that are all bfloat16: then they are that.
Traffic  every function reads r once (the double backward by sample reads twice what spans several tiles of tokens) and
         all but the forward write as much. Scratch, written and read: u in the forward, u and du in the
         backward, u, ddu, du and gu in the double backward, H D numbers of 4 bytes per token each (du and gu of
         bfloat16 operands 2).
Work     2 H 3d D flops per token and product; 1 product forward, 3 backward, 7 double backward.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...common.contracts import RoutedHeadPenaltyBackward, RoutedHeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Tile
from ..runtime.sums import total_of
from ..runtime.tensors import allocate
from . import gram, routed_products
from .cosine import given
from .plain import empty_cotangents, empty_parts, empty_statistics
from .routed_products import WeightSums

SCRATCH_BYTES = 256 << 20


class _Router:
    """One call: its tiles of tokens, and their u, ddu, du, gu in scratch memory."""

    def __init__(
        self,
        r: Tensor,
        w: Tensor,
        granularity: str,
        reduction: str,
        eps: float,
        *others: Tensor | None,
        made: int,
        returned: int,
    ):
        """``others`` are read too, like r or w.

        Args:
            made: scratches of a tile's [b, n, H, D] for what is routed into it, u and ddu.
            returned: scratches for what is routed back, du and gu.
        """
        B, N, _, H, _ = r.shape
        self.grouping = Grouping(B, H, N, granularity, reduction, eps)
        self.routing = routed_products.constants_of(r, w, *others)
        dtypes = [accumulation_dtype(r.dtype, w.dtype)] * made
        dtypes += [routed_products.dtype_of_returned(r, w)] * returned
        D, bytes_of_token = w.shape[3], sum(H * w.shape[3] * dtype.itemsize for dtype in dtypes)
        self.tokens = min(B * N, max(1, SCRATCH_BYTES // bytes_of_token))
        self._scratch = [allocate((self.tokens, H, D), dtype, r) for dtype in dtypes]
        self.like, self.like_returned = self._scratch[0], self._scratch[-1]
        self.const = gram.constants_of(self.grouping, self.like[None].transpose(1, 2))
        if r.dtype == w.dtype == torch.bfloat16:
            # all that is mixed ends in results of 8 bits, fewer than those of one TF32 product; float16 has as many
            mixing = self.const.MIXING.replace("tf32x3", "tf32")
            self.const = self.const._replace(MIXING=mixing)

    def blocks(self) -> Iterator[list[Tile]]:
        """Tiles that together hold whole groups."""
        return self.grouping.blocks(self.tokens)

    def scratch(self, i: int, t: Tile) -> Tensor:
        """Scratch ``i`` of a tile, [b, n, H, D]."""
        b, n = (s.stop - s.start for s in (t.samples, t.tokens))
        return self._scratch[i][: b * n].unflatten(0, (b, n))

    def routed(self, i: int, t: Tile, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Route a tile into scratch ``i``, (40) or (43): the sum of r W over those ``pairs`` that exist."""
        u = self.scratch(i, t)
        some = [(of_tile(r, t), w) for r, w in pairs if r is not None and w is not None]
        routed_products.route(self.routing, some, u)
        return heads_of(u)

    def products(
        self, block: list[Tile], operands: Callable[[Tile], tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """Parts of X Yᵀ of the samples of a block, [b, parts, H, H]; ``operands(tile)``: X, Y."""
        raw = empty_parts(self.const, *(heads_of(self.scratch(0, t)) for t in block))
        first = 0
        for t in block:
            x, y = operands(t)
            last = first + gram.programs_of(self.const, x)[2]
            gram.products(self.const, x, y, raw[:, first:last])
            first = last
        return raw


def of_tile(x: Tensor, t: Tile) -> Tensor:
    """The tile's part [b, n, ...] of ``[B, N, ...]``."""
    return x[t.samples, t.tokens]


def heads_of(u: Tensor) -> Tensor:
    """[b, n, H, D] as gradients [b, H, n, D]."""
    return u.transpose(1, 2)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty of routed gradients, (40)-(41): penalty, cosines, norms."""
    router = _Router(grad_qkv, weight, granularity, reduction, eps, made=1, returned=0)
    g, const = router.grouping, router.const
    out, penalties = empty_statistics(g, router.like)

    def routed(t: Tile) -> Tensor:
        return router.routed(0, t, (grad_qkv, weight))

    for block in router.blocks():
        t = block[0]
        raw = None if g.by_token else router.products(block, lambda t: (routed(t), None))
        u = routed(t) if g.by_token else None
        gram.statistics(g, const, u, raw, out.of(g, t), g.of(penalties, t))
    return total_of(penalties), out.cosines, out.norms


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> tuple[Tensor, Tensor]:
    """The gradients of the inputs, (42): ``dgrad_qkv`` and ``dweight``."""
    grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    router = _Router(grad_qkv, weight, granularity, reduction, eps, made=1, returned=1)
    g, here = router.grouping, given(cosines, norms, dpenalty, dcosines)
    dr = allocate(tuple(grad_qkv.shape), grad_qkv.dtype, grad_qkv)
    sums = WeightSums(router.routing, router.like_returned)
    for t in (t for block in router.blocks() for t in block):
        u, du = router.routed(0, t, (grad_qkv, weight)), router.scratch(1, t)
        gram.backward(g, router.const, u, heads_of(du), here.of(g, t))
        routed_products.route_back(router.routing, [(du, weight)], of_tile(dr, t))
        sums.add([(of_tile(grad_qkv, t), du)])
    return dr, sums.total(weight)


def routed_head_penalty_double_backward(
    inputs: RoutedHeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of the backward's inputs, (43)-(45): ``ggrad_qkv``, ``gweight``, ``gdpenalty``, ``gdcosines``.

    The latter two are None where there is no such cotangent. One of ``ddgrad_qkv`` and ``ddweight`` may be absent: its
    products are left out.
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
    router = _Router(grad_qkv, weight, granularity, reduction, eps, *others, made=2, returned=2)
    g, const = router.grouping, router.const
    given_here = given(cosines, norms, dpenalty, dcosines)
    gdpenalties, gdcosines = empty_cotangents(given_here)
    gr = allocate(tuple(grad_qkv.shape), grad_qkv.dtype, grad_qkv)
    sums = WeightSums(router.routing, router.like_returned)

    def operands(t: Tile) -> tuple[Tensor, Tensor]:
        """ddu and u of a tile."""
        u = router.routed(0, t, (grad_qkv, weight))
        return router.routed(1, t, (ddgrad_qkv, weight), (grad_qkv, ddweight)), u

    for block in router.blocks():
        here = given_here.of(g, block[0])
        gdp, gdc = (None if x is None else g.of(x, block[0]) for x in (gdpenalties, gdcosines))
        m_dot = None
        if not g.by_token:
            raw = router.products(block, operands)
            m_dot = gram.curvatures(g, const, raw, here, gdp, gdc)
        for t in block:
            if g.by_token or len(block) > 1:
                operands(t)
            u, ddu, du, gu = (router.scratch(i, t) for i in range(4))
            operands_here = (heads_of(x) for x in (u, ddu, gu, du))
            gram.double_backward(g, const, *operands_here, here, m_dot, gdp, gdc)
            back, rows = [(gu, weight)], [(of_tile(grad_qkv, t), gu)]
            if ddweight is not None:
                back.append((du, ddweight))
            if ddgrad_qkv is not None:
                rows.append((of_tile(ddgrad_qkv, t), du))
            routed_products.route_back(router.routing, back, of_tile(gr, t))
            sums.add(rows)
    gdpenalty = None if gdpenalties is None else total_of(gdpenalties)
    return gr, sums.total(weight), gdpenalty, gdcosines
