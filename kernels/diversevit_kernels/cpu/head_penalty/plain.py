"""The penalty on cosines between given head gradients, in PyTorch, tile by tile: (30)-(39) of kernels/README.md.

The only path of this operator on a CPU. A tile holds some tokens of one sample, or all tokens of some samples. The
forward keeps cosines and norms, so that the backward is one pass ``M G``, where ``M`` is H x H algebra per group
(``cosine``). By sample, the double backward first needs ``ddG G^T`` of a whole group: two passes unless a tile
holds it.

Shapes   grads, dgrads, ddgrads, ggrads [B, H, N, E]; cosines, norms as in ``cosine``.
Dtypes   any floating; statistics, products and sums in float32 (float64 for float64).
Traffic  forward reads grads once; backward reads it once and writes dgrads; double backward reads
         grads and ddgrads once (by sample: at most twice) and writes ggrads.
"""

import torch
from torch import Tensor

from ...common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics, Tile
from ..runtime.allocator import new_empty_heads
from ..runtime.scratch import Scratch
from .cosine import cotangent_gradients, curvatures, penalty_forward, slopes


class _Loader:
    """Tiles of operands and results, ``[groups, H, K]``, K = E by token and tokens * E by sample."""

    def __init__(self, grads: Tensor, granularity: str, reduction: str, eps: float):
        B, H, N, _ = grads.shape
        self.grouping = Grouping(B, H, N, granularity, reduction, eps)
        self.like = grads.new_empty(0, dtype=accumulation_dtype(grads.dtype))
        self.scratch = Scratch(self.like.dtype, grads.device)

    def heads(self, name: str, x: Tensor, t: Tile) -> Tensor:
        part = self.scratch.load(name, self._part(x, t))
        return part.flatten(0, 1) if self.grouping.by_token else part.flatten(2)

    def result(self, like: Tensor) -> Tensor:
        return self.scratch.get("result", *like.shape)

    def store(self, result: Tensor, x: Tensor, t: Tile) -> None:
        part = self._part(x, t)
        part.copy_(result.view(part.shape))

    def _part(self, x: Tensor, t: Tile) -> Tensor:
        """A tile of ``[B, H, N, E]``: [samples, N, H, E] by token, [samples, H, N, E] by sample."""
        part = x[t.samples, :, t.tokens]
        return part.transpose(1, 2) if self.grouping.by_token else part


def head_penalty_forward(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32): penalty, cosines, norms."""
    load = _Loader(grads, granularity, reduction, eps)
    width = grads.shape[-1]
    return penalty_forward(load.grouping, load.like, width, lambda t: load.heads("x", grads, t))


def head_penalty_backward(inputs: HeadPenaltyBackward) -> Tensor:
    """(33)-(35): ``dgrads``."""
    grads, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    load = _Loader(grads, granularity, reduction, eps)
    given = Statistics(cosines, norms, dpenalty, dcosines)
    dgrads = new_empty_heads(grads, grads.shape[-1])
    for t, m in slopes(load.grouping, given, grads.shape[-1]):
        x = load.heads("x", grads, t)
        load.store(torch.bmm(m, x, out=load.result(x)), dgrads, t)
    return dgrads


def head_penalty_double_backward(
    inputs: HeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(36)-(39): ``ggrads``, and ``gdpenalty``, ``gdcosines`` where their cotangents exist."""
    grads, cosines, norms, dpenalty, dcosines, ddgrads, granularity, reduction, eps = inputs
    load = _Loader(grads, granularity, reduction, eps)
    given = Statistics(cosines, norms, dpenalty, dcosines)
    ggrads = new_empty_heads(grads, grads.shape[-1])
    gdpenalty, gdcosines = cotangent_gradients(given)

    def operands(t: Tile) -> tuple[Tensor, Tensor]:
        return load.heads("x", grads, t), load.heads("ddx", ddgrads, t)

    for t, x, ddx, at in curvatures(
        load.grouping, given, grads.shape[-1], operands, gdpenalty, gdcosines
    ):
        result = torch.bmm(at.m, ddx, out=load.result(x)).baddbmm_(at.m_dot, x)
        load.store(result, ggrads, t)
    return ggrads, gdpenalty, gdcosines
