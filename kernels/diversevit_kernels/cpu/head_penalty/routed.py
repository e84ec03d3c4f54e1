"""The penalty of routed input gradients ``u_h = r_h W_h`` on a CPU: (40)-(45) of kernels/README.md.

One tile owns some tokens of one sample, or all tokens of some samples. Its ``u`` [H, tokens, D] is
one batched product over heads, used and forgotten: backward passes make it again, so nothing of
B H N D elements exists. The H x H algebra is ``cosine.py``'s. Weight gradients are summed over
tiles in order: same bits on every run.

Shapes   grad_qkv and all that is like it [B, N, 3, H, d]; weight and all that is like it
         [3, H, d, D]; cosines, norms as in ``cosine.py``.
Dtypes   any floating; statistics, products and sums in float32 (float64 for float64).
Traffic  every rung reads grad_qkv once (the double backward by sample: at most twice) and writes as
         much, the forward excepted. Products of B N x 3d x D per head: forward 1, backward 3,
         double backward 7.
Native   Where there is a compiler and both operands have one dtype, forward and backward are C++ kernels
         (``routed_head_penalty_native``) but for the H x H algebra; bfloat16 is then multiplied as such.
"""

import torch
from torch import Tensor

from ...common.contracts import RoutedHeadPenaltyBackward, RoutedHeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics, Tile
from ..runtime.scratch import Scratch
from . import routed_native as native
from .cosine import curvatures, penalty_forward, penalty_of, slope_of, slopes


class _Router:
    """Tile-shaped operands and results: by head [H, tokens, 3d or D], by group [groups, H, K]."""

    def __init__(
        self, grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
    ):
        dtype = accumulation_dtype(torch.promote_types(grad_qkv.dtype, weight.dtype))
        self.grouping = _grouping(grad_qkv, granularity, reduction, eps)
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
        """[H, tokens, D] -> [groups, H, K], a view."""
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


def _grouping(grad_qkv: Tensor, granularity: str, reduction: str, eps: float) -> Grouping:
    B, N, _, H, _ = grad_qkv.shape
    return Grouping(B, H, N, granularity, reduction, eps)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41): penalty, cosines, norms."""
    if native.runs(grad_qkv, weight):
        g = _grouping(grad_qkv, granularity, reduction, eps)
        return penalty_of(g, native.gram(g, grad_qkv, weight))
    router = _Router(grad_qkv, weight, granularity, reduction, eps)
    w = router.weight("w", weight)

    def heads(t: Tile) -> Tensor:
        return router.by_group(router.product("u", router.tokens("r", grad_qkv, t), w), t)

    return penalty_forward(router.grouping, router.like, router.width, heads)


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> tuple[Tensor, Tensor]:
    """(42): ``dgrad_qkv`` and ``dweight``."""
    grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    given = Statistics(cosines, norms, dpenalty, dcosines)
    if native.runs(grad_qkv, weight):
        g = _grouping(grad_qkv, granularity, reduction, eps)
        dr, dw = native.backward(g, grad_qkv, weight, slope_of(g, given))
        return dr, dw.to(weight.dtype)
    router = _Router(grad_qkv, weight, granularity, reduction, eps)
    w = router.weight("w", weight)
    dr, dw = grad_qkv.new_empty(grad_qkv.shape), torch.zeros_like(w)
    for t, m in slopes(router.grouping, given, router.width):
        r = router.tokens("r", grad_qkv, t)
        u = router.by_group(router.product("u", r, w), t)
        du = router.by_head(router.mixed("du", m, u), w.shape[-1])
        router.store(router.product("dr", du, w.mT), dr, t)
        dw.baddbmm_(r.mT, du)
    return dr, _like_weight(dw, weight)


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
    router = _Router(grad_qkv, weight, granularity, reduction, eps)
    given = Statistics(cosines, norms, dpenalty, dcosines)
    w = router.weight("w", weight)
    aw = None if ddweight is None else router.weight("aw", ddweight)
    gr, gw = grad_qkv.new_empty(grad_qkv.shape), torch.zeros_like(w)
    gdpenalty = None if dpenalty is None else cosines.new_zeros(())
    gdcosines = None if dcosines is None else cosines.new_empty(cosines.shape)

    def operands(t: Tile) -> tuple[Tensor, Tensor]:
        """u and its tangent, (43)."""
        r = router.tokens("r", grad_qkv, t)
        u = router.product("u", r, w)
        if ddgrad_qkv is None:
            a = router.product("a", r, aw)  # pyright: ignore[reportArgumentType] (one is given)
        else:
            a = router.product("a", router.tokens("ar", ddgrad_qkv, t), w)
            if aw is not None:
                a.baddbmm_(r, aw)
        return router.by_group(u, t), router.by_group(a, t)

    for t, u, a, at in curvatures(
        router.grouping, given, router.width, operands, gdpenalty, gdcosines
    ):
        r = router.tokens("r", grad_qkv, t)
        du = router.by_head(router.mixed("du", at.m, u), w.shape[-1])
        u_dot = router.mixed("u_dot", at.m, a).baddbmm_(at.m_dot, u)
        u_dot = router.by_head(u_dot, w.shape[-1])
        back = router.product("gr", u_dot, w.mT)
        gw.baddbmm_(r.mT, u_dot)
        if aw is not None:
            back.baddbmm_(du, aw.mT)
        if ddgrad_qkv is not None:
            gw.baddbmm_(router.tokens("ar", ddgrad_qkv, t).mT, du)
        router.store(back, gr, t)
    return gr, _like_weight(gw, weight), gdpenalty, gdcosines


def _like_weight(x: Tensor, weight: Tensor) -> Tensor:
    """[H, 3d, D] -> ``[3, H, d, D]``, dense, in the weight's dtype."""
    _, H, d, D = weight.shape
    return torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(
        x.view(H, 3, d, D).transpose(0, 1)
    )
