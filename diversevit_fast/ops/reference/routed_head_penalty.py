"""The penalty of routed input gradients by its definition: equations (40)-(45) of ``kernels/README.md``."""

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import (
    HeadPenaltyBackward,
    HeadPenaltyDoubleBackward,
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)

from .head_penalty import (
    head_penalty,
    head_penalty_backward,
    head_penalty_double_backward,
    head_penalty_forward,
)


def route(grad_qkv: Tensor, weight: Tensor) -> Tensor:
    """(40)  u_h = r_h W_h.   [B, N, 3, H, d] x [3, H, d, D] -> [B, H, N, D], float32 at least."""
    dtype = torch.promote_types(torch.promote_types(grad_qkv.dtype, weight.dtype), torch.float32)
    return torch.einsum("bnchd,chde->bhne", grad_qkv.to(dtype), weight.to(dtype))


def routed_head_penalty(
    grad_qkv: Tensor,
    weight: Tensor,
    granularity: str = "token",
    reduction: str = "all",
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """(41)  ``head_penalty`` of the heads' input gradients, made explicitly."""
    return head_penalty(route(grad_qkv, weight), granularity, reduction, eps)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41)  Penalty, cosines and norms."""
    return head_penalty_forward(route(grad_qkv, weight), granularity, reduction, eps)


def _route_backward(grad_qkv: Tensor, weight: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """(42)  dr = du W^T and dW = sum r^T du, in the dtype of ``du``."""
    dr = torch.einsum("bhne,chde->bnchd", du, weight.to(du.dtype))
    return dr, torch.einsum("bnchd,bhne->chde", grad_qkv.to(du.dtype), du)


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> tuple[Tensor, Tensor]:
    """(42)  Pull dp and dC back to r and W."""
    grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    given = (cosines, norms, dpenalty, dcosines, granularity, reduction, eps)
    du = head_penalty_backward(HeadPenaltyBackward(route(grad_qkv, weight), *given))
    dr, dw = _route_backward(grad_qkv, weight, du)
    return dr.to(grad_qkv.dtype), dw.to(weight.dtype)


def routed_head_penalty_double_backward(
    inputs: RoutedHeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(43)-(45)  Pull cotangents of dr and dW back to r, W, dp and dC."""
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
    given, kind = (cosines, norms, dpenalty, dcosines), (granularity, reduction, eps)
    ar = torch.zeros_like(grad_qkv) if ddgrad_qkv is None else ddgrad_qkv
    aw = torch.zeros_like(weight) if ddweight is None else ddweight
    u, a = route(grad_qkv, weight), route(ar, weight) + route(grad_qkv, aw)
    du = head_penalty_backward(HeadPenaltyBackward(u, *given, *kind))
    u_dot, gdp, gdc = head_penalty_double_backward(HeadPenaltyDoubleBackward(u, *given, a, *kind))
    gr, gw = _route_backward(grad_qkv, weight, u_dot)
    (gr2, _), (_, gw2) = _route_backward(grad_qkv, aw, du), _route_backward(ar, weight, du)
    return (gr + gr2).to(grad_qkv.dtype), (gw + gw2).to(weight.dtype), gdp, gdc
