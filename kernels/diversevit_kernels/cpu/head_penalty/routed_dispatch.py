"""The routed penalty on a CPU, (40)-(45) of kernels/README.md: which path computes forward and backward passes.

C++       ``routed_native``: forward and backward, in float32, float64 and bfloat16, where both operands have one dtype
          and there is a C++ compiler. The H x H algebra between its kernels is ``cosine``'s.
PyTorch   ``routed_blocked``: everything else, and every double backward.

Shapes    grad_qkv, dgrad_qkv, ddgrad_qkv, ggrad_qkv [B, N, 3, H, d]; weight, dweight, ddweight, gweight [3, H, d, D];
          cosines, norms as in ``cosine``.
Dtypes    any floating; statistics, products and sums in float32 (float64 for float64).
"""

from torch import Tensor

from ...common.contracts import RoutedHeadPenaltyBackward, RoutedHeadPenaltyDoubleBackward
from ...common.grouping import Grouping, Statistics
from . import routed_blocked as blocked
from . import routed_native as native
from .cosine import penalty_of, slope_of


def _grouping(grad_qkv: Tensor, granularity: str, reduction: str, eps: float) -> Grouping:
    B, N, _, H, _ = grad_qkv.shape
    return Grouping(B, H, N, granularity, reduction, eps)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41): penalty, cosines, norms."""
    grouping = _grouping(grad_qkv, granularity, reduction, eps)
    if native.supports(grad_qkv, weight):
        return penalty_of(grouping, native.gram(grouping, grad_qkv, weight))
    return blocked.forward(grouping, grad_qkv, weight)


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> tuple[Tensor, Tensor]:
    """(42): ``dgrad_qkv`` and ``dweight``."""
    grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    grouping = _grouping(grad_qkv, granularity, reduction, eps)
    given = Statistics(cosines, norms, dpenalty, dcosines)
    if native.supports(grad_qkv, weight):
        m = slope_of(grouping, given)
        dr, dw = native.backward(grouping, grad_qkv, weight, m)
        return dr, dw.to(weight.dtype)
    return blocked.backward(grouping, grad_qkv, weight, given)


def routed_head_penalty_double_backward(
    inputs: RoutedHeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(43)-(45): ``ggrad_qkv``, ``gweight``, and ``gdpenalty``, ``gdcosines`` where their cotangents exist.

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
    grouping = _grouping(grad_qkv, granularity, reduction, eps)
    given = Statistics(cosines, norms, dpenalty, dcosines)
    return blocked.double_backward(grouping, grad_qkv, weight, given, ddgrad_qkv, ddweight)
