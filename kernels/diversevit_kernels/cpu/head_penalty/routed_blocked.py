"""The penalty of routed input gradients ``u_h = r_h W_h`` in PyTorch, tile by tile: (40)-(45) of kernels/README.md.

A tile holds some tokens of one sample, or all tokens of some samples. Its ``u`` [H, tokens, D] is one batched product
over heads and is not kept: the backward passes compute it again, so that no tensor of B H N D elements exists. The
H x H algebra is ``cosine``'s. The weight's gradients are summed over tiles in order: same bits on every run.

Shapes   as in ``routed_dispatch``.
Traffic  every pass reads grad_qkv once (the double backward by sample: at most twice), and the backward passes write
         as much. Products of B N x 3d x D per head: forward 1, backward 3, double backward 7.
"""

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics, Tile
from ..runtime.scratch import Scratch
from .cosine import cotangent_gradients, curvatures, penalty_forward, slopes


class _Router:
    """Tiles of operands and results: by head [H, tokens, 3d or D], by group [groups, H, D or tokens * D]."""

    def __init__(self, grouping: Grouping, grad_qkv: Tensor, weight: Tensor):
        dtype = accumulation_dtype(torch.promote_types(grad_qkv.dtype, weight.dtype))
        self.grouping = grouping
        self.like = grad_qkv.new_empty(0, dtype=dtype)
        self.scratch = Scratch(dtype, grad_qkv.device)
        self.width = max(3 * weight.shape[-2], weight.shape[-1])

    def weight(self, name: str, x: Tensor) -> Tensor:
        """``[3, H, d, D] -> [H, 3d, D]``."""
        return self.scratch.load(name, x.transpose(0, 1)).flatten(1, 2)

    def tokens(self, name: str, x: Tensor, t: Tile) -> Tensor:
        """The tile's part of ``[B, N, 3, H, d]`` as [H, tokens, 3d]."""
        return self.scratch.load(name, self._part(x, t)).flatten(3).flatten(1, 2)

    def store(self, result: Tensor, x: Tensor, t: Tile) -> None:
        """The inverse of ``tokens``."""
        part = self._part(x, t)
        part.copy_(result.view(part.shape))

    def product(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x, weight, out=self.scratch.get(name, *x.shape[:2], weight.shape[-1]))

    def mixed(self, name: str, m: Tensor, u: Tensor) -> Tensor:
        return torch.bmm(m, u, out=self.scratch.get(name, *u.shape))

    def by_group(self, u: Tensor, t: Tile) -> Tensor:
        """[H, tokens, D] -> by group, a view."""
        samples = t.samples.stop - t.samples.start
        groups = u.shape[1] if self.grouping.by_token else samples
        return u.view(u.shape[0], groups, -1).transpose(0, 1)

    def by_head(self, u: Tensor, width: int) -> Tensor:
        """The inverse of ``by_group``: a view unless several samples are groups."""
        groups, H, _ = u.shape
        return u.view(groups, H, -1, width).transpose(0, 1).reshape(H, -1, width)

    @staticmethod
    def _part(x: Tensor, t: Tile) -> Tensor:
        return x[t.samples, t.tokens].permute(3, 0, 1, 2, 4)


def forward(g: Grouping, grad_qkv: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41): penalty, cosines, norms."""
    router = _Router(g, grad_qkv, weight)
    w = router.weight("w", weight)

    def heads(t: Tile) -> Tensor:
        return router.by_group(router.product("u", router.tokens("r", grad_qkv, t), w), t)

    return penalty_forward(g, router.like, router.width, heads)


def backward(
    g: Grouping, grad_qkv: Tensor, weight: Tensor, given: Statistics
) -> tuple[Tensor, Tensor]:
    """(42): ``dgrad_qkv`` and ``dweight``."""
    router = _Router(g, grad_qkv, weight)
    w = router.weight("w", weight)
    dr, dw = grad_qkv.new_empty(grad_qkv.shape), torch.zeros_like(w)
    for t, m in slopes(g, given, router.width):
        r = router.tokens("r", grad_qkv, t)
        u = router.by_group(router.product("u", r, w), t)
        du = router.by_head(router.mixed("du", m, u), w.shape[-1])
        router.store(router.product("dr", du, w.mT), dr, t)
        dw.baddbmm_(r.mT, du)
    return dr, _like_weight(dw, weight)


def double_backward(
    g: Grouping,
    grad_qkv: Tensor,
    weight: Tensor,
    given: Statistics,
    ddgrad_qkv: Tensor | None,
    ddweight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(43)-(45): ``ggrad_qkv``, ``gweight``, ``gdpenalty``, ``gdcosines``; one of the cotangents may be absent."""
    router = _Router(g, grad_qkv, weight)
    w = router.weight("w", weight)
    ddw = None if ddweight is None else router.weight("ddw", ddweight)
    gr, gw = grad_qkv.new_empty(grad_qkv.shape), torch.zeros_like(w)

    def operands(t: Tile) -> tuple[Tensor, Tensor]:
        """u and ddu, (43)."""
        r = router.tokens("r", grad_qkv, t)
        u = router.product("u", r, w)
        if ddgrad_qkv is None:
            ddu = router.product("ddu", r, ddw)  # pyright: ignore[reportArgumentType] (one is given)
        else:
            ddu = router.product("ddu", router.tokens("ddr", ddgrad_qkv, t), w)
            if ddw is not None:
                ddu.baddbmm_(r, ddw)
        return router.by_group(u, t), router.by_group(ddu, t)

    gdpenalty, gdcosines = cotangent_gradients(given)
    for t, u, ddu, at in curvatures(g, given, router.width, operands, gdpenalty, gdcosines):
        r = router.tokens("r", grad_qkv, t)
        du = router.by_head(router.mixed("du", at.m, u), w.shape[-1])
        gu = router.mixed("gu", at.m, ddu).baddbmm_(at.m_dot, u)
        gu = router.by_head(gu, w.shape[-1])
        grt = router.product("gr", gu, w.mT)
        gw.baddbmm_(r.mT, gu)
        if ddw is not None:
            grt.baddbmm_(du, ddw.mT)
        if ddgrad_qkv is not None:
            gw.baddbmm_(router.tokens("ddr", ddgrad_qkv, t).mT, du)
        router.store(grt, gr, t)
    return gr, _like_weight(gw, weight), gdpenalty, gdcosines


def _like_weight(x: Tensor, weight: Tensor) -> Tensor:
    """[H, 3d, D] -> ``[3, H, d, D]``, contiguous, in the weight's dtype."""
    _, H, d, D = weight.shape
    return torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(
        x.view(H, 3, d, D).transpose(0, 1)
    )
