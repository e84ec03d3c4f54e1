"""The head penalty by its definition: equations (30)-(39) of ``kernels/README.md``."""

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward


def by_group(grads: Tensor, granularity: str) -> Tensor:
    """Heads as rows, in float32 at least: [B, H, N, E] -> [B, N, H, E] or, by sample, [B, H, N E]."""
    grads = grads.to(torch.promote_types(grads.dtype, torch.float32))
    return grads.transpose(1, 2) if granularity == "token" else grads.flatten(2)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``by_group``, in the dtype of ``like`` [B, H, N, E]."""
    return (x.transpose(1, 2) if x.ndim == 4 else x.view(like.shape)).to(like.dtype)


def pair_weights(grads: Tensor, granularity: str, reduction: str) -> Tensor:
    """omega (1 - I) of (32): [H, H], zero on the diagonal, what a squared cosine counts in the mean."""
    B, H, N, _ = grads.shape
    dtype = torch.promote_types(grads.dtype, torch.float32)
    pairs = B * H * (H if reduction == "all" else H - 1) * (N if granularity == "token" else 1)
    return (1 - torch.eye(H, dtype=dtype, device=grads.device)) / pairs


def head_penalty(
    grads: Tensor, granularity: str = "token", reduction: str = "all", eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """(30)-(32)  Cosines of the heads' gradients, and the mean square of those off the diagonal.

    [B, H, N, E] -> [] and [B, N, H, H] by token or [B, H, H] by sample. Directions first, then
    their products. The clamp is on the square, for the square root has no derivative at zero.
    """
    x = by_group(grads, granularity)
    unit = x / x.square().sum(-1, keepdim=True).clamp_min(eps * eps).sqrt()
    cosines = unit @ unit.transpose(-2, -1)
    return (pair_weights(grads, granularity, reduction) * cosines.square()).sum(), cosines


def head_penalty_forward(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32)  Penalty, cosines, and the clamped norms [B, N, H] or [B, H]."""
    penalty, cosines = head_penalty(grads, granularity, reduction, eps)
    norms = torch.linalg.vector_norm(by_group(grads, granularity), dim=-1).clamp_min(eps)
    return penalty, cosines, norms


def _cosine_slope(
    c: Tensor, n: Tensor, pairs: Tensor, dp: Tensor | None, dc: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(33)-(34)  Lambda, s and M from cosines ``c``, norms ``n``, and the cotangents of p and C."""
    lam = torch.zeros_like(c) if dp is None else 4 * dp * pairs * c
    lam = lam if dc is None else lam + dc + dc.mT
    s = (lam * c).sum(-1)
    free = (n > eps) / n.square()
    return lam, s, lam / (n[..., None] * n[..., None, :]) - torch.diag_embed(free * s)


def head_penalty_backward(inputs: HeadPenaltyBackward) -> Tensor:
    """(35)  dG = M G."""
    grads, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    pairs = pair_weights(grads, granularity, reduction)
    _, _, m = _cosine_slope(cosines, norms, pairs, dpenalty, dcosines, eps)
    return _by_head(m @ by_group(grads, granularity), grads)


def _cosine_curvature(
    c: Tensor, n: Tensor, k: Tensor, pairs: Tensor, dp: Tensor | None, dc: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(36)-(38)  The derivatives of C and M along ddG, of which ``k`` = ddG G^T is given."""
    lam, s, _ = _cosine_slope(c, n, pairs, dp, dc, eps)
    over_norms, free = 1 / (n[..., None] * n[..., None, :]), (n > eps) / n.square()
    r_dot = k + k.mT
    delta = -free * r_dot.diagonal(dim1=-2, dim2=-1) / 2
    deltas = delta[..., None] + delta[..., None, :]
    c_dot = over_norms * r_dot + c * deltas
    lam_dot = torch.zeros_like(c) if dp is None else 4 * dp * pairs * c_dot
    s_dot = (lam * c_dot + lam_dot * c).sum(-1)
    return c_dot, over_norms * (lam * deltas + lam_dot) - torch.diag_embed(
        free * (2 * delta * s + s_dot)
    )


def head_penalty_double_backward(
    inputs: HeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(37), (39)  Pull the cotangent A of dG back to G, dp and dC."""
    grads, cosines, norms, dpenalty, dcosines, ddgrads, granularity, reduction, eps = inputs
    pairs = pair_weights(grads, granularity, reduction)
    x, a = (by_group(y, granularity) for y in (grads, ddgrads))
    cotangents = (pairs, dpenalty, dcosines, eps)
    _, _, m = _cosine_slope(cosines, norms, *cotangents)
    c_dot, m_dot = _cosine_curvature(cosines, norms, a @ x.mT, *cotangents)
    gdp = None if dpenalty is None else 2 * (pairs * cosines * c_dot).sum()
    return _by_head(m @ a + m_dot @ x, grads), gdp, None if dcosines is None else c_dot
