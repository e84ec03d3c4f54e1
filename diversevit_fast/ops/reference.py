"""Every stage in plain PyTorch: the definition that the kernels are measured against.

Readable first; slow is fine. Any device and dtype, differentiable to any order, so ``gradgradcheck``
vouches for it and it vouches for the rest. Numbers are the equations of ``kernels/README.md``.

``attention``, ``layer_norm`` ... are the definitions. ``X_forward``, ``X_backward`` and
``X_double_backward`` are the same stage's three rungs with the arguments that the kernels take.
"""

from typing import Any

import torch
from torch import Tensor


def attention_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """(1)  S = s Q K^T + M, minus infinity where a query may not look.   -> [B, H, Nq, Nk]."""
    s = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if is_causal:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~seen, -torch.inf)
    return s


def softmax_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    """(1a)  P = softmax(S), and [B, H, 2, Nq]: largest scores and shares; of an empty row P = 0, +inf and 1."""
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, torch.inf)
    weight = (s - top).exp()
    total = weight.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return weight / total, torch.cat((top.mT, 1 / total.mT), -2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(2)  O = P V.   [B, H, Nq, d] x [B, Hkv, Nk, d] x [B, Hkv, Nk, dv] -> [B, H, Nq, dv]."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_forward(q, k, v, mask, is_causal, s)[0]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(1)-(2)  ``o`` [B, H, Nq, dv] and (1a) [B, H, 2, Nq], the latter at least float32."""
    p, softmax = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))
    o = p.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return o, softmax.to(torch.promote_types(q.dtype, torch.float32))


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
    """(3)-(5)  Pull the cotangent ``do`` of the output back to q, k, v (``into``) and an additive mask."""
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    dp = do @ v.repeat_interleave(group, 1).mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dk, dv = (_sum_groups(x, group) for x in (scale * ds.mT @ q, p.mT @ do))
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * ds @ k.repeat_interleave(group, 1), dk, dv), dmask


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
    """(6)-(9)  Pull the cotangents of (5) back to q, k, v (``into``), do and an additive mask."""
    group = q.shape[1] // k.shape[1]
    p = softmax_statistics(attention_scores(q, k, mask, is_causal, scale))[0].to(q.dtype)
    a, b, c = (torch.zeros_like(x) if g is None else g for x, g in ((q, ddq), (k, ddk), (v, ddv)))
    k, v, b, c = (x.repeat_interleave(group, 1) for x in (k, v, b, c))
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    x = scale * (a @ k.mT + q @ b.mT) + (0.0 if ddmask is None else ddmask.to(q.dtype))
    mean = (p * x).sum(-1, keepdim=True)
    e = p * (x - mean)
    r = ds * (x - mean) + p * (do @ c.mT)
    r = r - p * r.sum(-1, keepdim=True)
    gk, gv = _sum_groups(scale * (r.mT @ q + ds.mT @ a), group), _sum_groups(e.mT @ do, group)
    gmask = r.sum_to_size(mask.shape).to(mask.dtype) if mask is not None and mask_grad else None
    return *_written(into, scale * (r @ k + ds @ b), gk, gv), e @ v + p @ c, gmask


def attention_packed(qkv: Tensor) -> Tensor:
    """Uninitialised, dense, like ``qkv`` [B, N, 3, H, d]: what ``into`` may be views of."""
    return qkv.new_empty(qkv.shape)


def _written(into: tuple[Tensor, ...] | None, *results: Tensor) -> Any:
    return results if into is None else tuple(map(Tensor.copy_, into, results))


def _sum_groups(x: Tensor, group: int) -> Tensor:
    """Sum query heads that share a key head.   [B, H, N, d] -> [B, H / group, N, d]."""
    return x.unflatten(1, (-1, group)).sum(2)


def _by_group(grads: Tensor, granularity: str) -> Tensor:
    """Heads as rows, in float32 at least: [B, H, N, E] -> [B, N, H, E] or, by sample, [B, H, N E]."""
    grads = grads.to(torch.promote_types(grads.dtype, torch.float32))
    return grads.transpose(1, 2) if granularity == "token" else grads.flatten(2)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_by_group``, in the dtype of ``like`` [B, H, N, E]."""
    return (x.transpose(1, 2) if x.ndim == 4 else x.view(like.shape)).to(like.dtype)


def _pair_weights(grads: Tensor, granularity: str, reduction: str) -> Tensor:
    """w (1 - I) of (32): [H, H], zero on the diagonal, what a squared cosine counts in the mean."""
    B, H, N, _ = grads.shape
    pairs = B * H * (H if reduction == "all" else H - 1) * (N if granularity == "token" else 1)
    return (1 - torch.eye(H, dtype=_wide(grads[:0]).dtype, device=grads.device)) / pairs


def head_penalty(
    grads: Tensor, granularity: str = "token", reduction: str = "all", eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """(30)-(32)  Cosines of the heads' gradients, and the mean square of those off the diagonal.

    [B, H, N, E] -> [] and [B, N, H, H] by token or [B, H, H] by sample. Directions first, then
    their products. The clamp is on the square, for the square root has no derivative at zero.
    """
    x = _by_group(grads, granularity)
    unit = x / x.square().sum(-1, keepdim=True).clamp_min(eps * eps).sqrt()
    cosines = unit @ unit.transpose(-2, -1)
    return (_pair_weights(grads, granularity, reduction) * cosines.square()).sum(), cosines


def head_penalty_forward(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32)  Penalty, cosines, and the clamped norms [B, N, H] or [B, H]."""
    penalty, cosines = head_penalty(grads, granularity, reduction, eps)
    norms = torch.linalg.vector_norm(_by_group(grads, granularity), dim=-1).clamp_min(eps)
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


def head_penalty_backward(
    grads: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dpenalty: Tensor | None,
    dcosines: Tensor | None,
    granularity: str,
    reduction: str,
    eps: float,
) -> Tensor:
    """(35)  dG = M G."""
    pairs = _pair_weights(grads, granularity, reduction)
    _, _, m = _cosine_slope(cosines, norms, pairs, dpenalty, dcosines, eps)
    return _by_head(m @ _by_group(grads, granularity), grads)


def _cosine_curvature(
    c: Tensor, n: Tensor, k: Tensor, pairs: Tensor, dp: Tensor | None, dc: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(36)-(38)  The derivatives of C and M along A, of which ``k`` = A G^T is given."""
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
    grads: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dpenalty: Tensor | None,
    dcosines: Tensor | None,
    ddgrads: Tensor,
    granularity: str,
    reduction: str,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(37), (39)  Pull the cotangent A of dG back to G, dp and dC."""
    pairs = _pair_weights(grads, granularity, reduction)
    x, a = (_by_group(y, granularity) for y in (grads, ddgrads))
    cotangents = (pairs, dpenalty, dcosines, eps)
    _, _, m = _cosine_slope(cosines, norms, *cotangents)
    c_dot, m_dot = _cosine_curvature(cosines, norms, a @ x.mT, *cotangents)
    gdp = None if dpenalty is None else 2 * (pairs * cosines * c_dot).sum()
    return _by_head(m @ a + m_dot @ x, grads), gdp, None if dcosines is None else c_dot


def _route(grad_qkv: Tensor, weight: Tensor) -> Tensor:
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
    return head_penalty(_route(grad_qkv, weight), granularity, reduction, eps)


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41)  Penalty, cosines and norms."""
    return head_penalty_forward(_route(grad_qkv, weight), granularity, reduction, eps)


def _route_backward(grad_qkv: Tensor, weight: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """(42)  dr = du W^T and dW = sum r^T du, in the dtype of ``du``."""
    dr = torch.einsum("bhne,chde->bnchd", du, weight.to(du.dtype))
    return dr, torch.einsum("bnchd,bhne->chde", grad_qkv.to(du.dtype), du)


def routed_head_penalty_backward(
    grad_qkv: Tensor,
    weight: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dpenalty: Tensor | None,
    dcosines: Tensor | None,
    granularity: str,
    reduction: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(42)  Pull dp and dC back to r and W."""
    given = (cosines, norms, dpenalty, dcosines)
    du = head_penalty_backward(_route(grad_qkv, weight), *given, granularity, reduction, eps)
    dr, dw = _route_backward(grad_qkv, weight, du)
    return dr.to(grad_qkv.dtype), dw.to(weight.dtype)


def routed_head_penalty_double_backward(
    grad_qkv: Tensor,
    weight: Tensor,
    cosines: Tensor,
    norms: Tensor,
    dpenalty: Tensor | None,
    dcosines: Tensor | None,
    ddgrad_qkv: Tensor | None,
    ddweight: Tensor | None,
    granularity: str,
    reduction: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(43)-(45)  Pull cotangents of dr and dW back to r, W, dp and dC."""
    given, kind = (cosines, norms, dpenalty, dcosines), (granularity, reduction, eps)
    ar = torch.zeros_like(grad_qkv) if ddgrad_qkv is None else ddgrad_qkv
    aw = torch.zeros_like(weight) if ddweight is None else ddweight
    u, a = _route(grad_qkv, weight), _route(ar, weight) + _route(grad_qkv, aw)
    du = head_penalty_backward(u, *given, *kind)
    u_dot, gdp, gdc = head_penalty_double_backward(u, *given, a, *kind)
    gr, gw = _route_backward(grad_qkv, weight, u_dot)
    (gr2, _), (_, gw2) = _route_backward(grad_qkv, aw, du), _route_backward(ar, weight, du)
    return (gr + gr2).to(grad_qkv.dtype), (gw + gw2).to(weight.dtype), gdp, gdc


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(12)  y = w xh + b over the last axes, of sizes ``normalized_shape``.   y is like x."""
    return layer_norm_forward(x, weight, bias, len(normalized_shape), eps)[0]


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12)  ``y`` like x, ``mean`` and ``rstd`` [*lead], the latter two at least float32."""
    over = tuple(range(-axes, 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(over, keepdim=True)
    rstd = ((wide - mean).square().mean(over, keepdim=True) + eps).rsqrt()
    y = (wide - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    lead = x.shape[: x.ndim - axes]
    return y.to(x.dtype), mean.reshape(lead), rstd.reshape(lead)


def layer_norm_backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    axes: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14)  Pull the cotangent ``dy`` of the output back to x, weight and bias."""
    xh, r, dy_wide = _normalized(x, mean, rstd, dy, axes)
    dx = _layer_norm_jacobian(dy_wide if weight is None else dy_wide * weight, xh, r, axes)
    dw = (dy_wide * xh).sum_to_size(x.shape[x.ndim - axes :]) if weight_grad else None
    db = dy_wide.sum_to_size(x.shape[x.ndim - axes :]) if bias_grad else None
    dtype = x.dtype if weight is None else weight.dtype
    dw, db = (None if g is None else g.to(dtype) for g in (dw, db))
    return dx.to(x.dtype), dw, db


def layer_norm_double_backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    axes: int,
    weight_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(15)-(19)  Pull the cotangents of (14) back to x, weight and dy; None if none can reach."""
    over = tuple(range(-axes, 0))
    xh, r, dy = _normalized(x, mean, rstd, dy, axes)
    a, wc, bc = (torch.zeros_like(x, dtype=r.dtype) if t is None else t for t in (ddx, ddw, ddb))
    w = torch.ones_like(xh) if weight is None else weight
    s = _layer_norm_jacobian(a, xh, r, axes)
    a2, c2, q = ((u * v).mean(over, keepdim=True) for u, v in ((a, xh), (w * dy, xh), (w * dy, s)))
    h = dy * wc - r * (c2 * a + a2 * w * dy)
    gx = (_layer_norm_jacobian(h, xh, r, axes) - r * q * xh).to(x.dtype)
    gdy = (w * s + xh * wc + bc).to(x.dtype)
    gw = None
    if weight is not None and weight_grad and ddx is not None:
        gw = (dy * s).sum_to_size(weight.shape).to(weight.dtype)
    return None if ddx is None and ddw is None else gx, gw, gdy


def _normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(11)  xh, r [*lead, 1, ...] and dy, all at least float32."""
    mean, rstd = (t.reshape(*t.shape, *[1] * axes) for t in (mean, rstd))
    return (x - mean) * rstd, rstd, dy.to(rstd.dtype)


def _layer_norm_jacobian(z: Tensor, xh: Tensor, r: Tensor, axes: int) -> Tensor:
    """(13)  J z = r (z - mean(z) - xh mean(xh z)), the derivative of xh, symmetric."""
    over = tuple(range(-axes, 0))
    return r * (z - z.mean(over, keepdim=True) - xh * (xh * z).mean(over, keepdim=True))


TANH_SCALE = (2 / torch.pi) ** 0.5
"""k of (23)."""
TANH_CUBIC = 0.044715
"""c of (23)."""


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """(20), (23)  y = x Phi(x), or x (1 + T) / 2 with ``approximate="tanh"``."""
    wide = _wide(x)
    inner = _tanh_argument(wide).tanh() if approximate == "tanh" else torch.erf(wide / 2**0.5)
    return (0.5 * wide * (1 + inner)).to(x.dtype)


def gelu_derivatives(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(21)-(22), (24)-(25)  y' and y''."""
    if approximate == "tanh":
        k, c = TANH_SCALE, TANH_CUBIC
        t, slope = _tanh_argument(x).tanh(), k * (1 + 3 * c * x**2)
        first = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
        return first, (1 - t**2) * (k * (1 + 6 * c * x**2) - x * t * slope**2)
    density = (-0.5 * x**2).exp() / (2 * torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(x / 2**0.5)) + x * density, density * (2 - x**2)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """(20), (23)  ``y`` like x."""
    return gelu(x, approximate)


def gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """(26)  ``dx`` = dy y'."""
    return (dy * gelu_derivatives(_wide(x), approximate)[0]).to(x.dtype)


def gelu_double_backward(
    x: Tensor, dy: Tensor, ddx: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """(26)  Pull the cotangent ``ddx`` of dx back: ``gx`` = ddx dy y'', ``gdy`` = ddx y'."""
    first, second = gelu_derivatives(_wide(x), approximate)
    return (_wide(ddx) * dy * second).to(x.dtype), (ddx * first).to(x.dtype)


def _tanh_argument(x: Tensor) -> Tensor:
    """(23)  u = k (x + c x^3)."""
    return TANH_SCALE * (x + TANH_CUBIC * x**3)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
