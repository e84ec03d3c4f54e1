"""A ViT from the queries, keys and values of its last block on, for the class token: one node of autograd's graph.

    r = x + attention(qkv) Wp + bp
    y = r + gelu(LayerNorm(r) W1 + b1) W2 + b2
    logits = LayerNorm(y) Wh + bh

On a GPU the host's time is that of nodes more than of the operators below them. Here the forward is one node, the
gradient of x and qkv is another, and the derivative of that calls the double backwards of the operators. ``r``, ``y``
and u, the argument of GELU, are results too, which no caller is given: what the derivative of the second node adds to
their gradients meets that of the logits in the first, and is carried back to the weights once.

Any other derivative of a derivative is that of the operators, called one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_internals import functorch_active
from .attention_qkvpacked import ORDERS as ATTENTION
from .attention_qkvpacked import attention_qkvpacked
from .autograd import runs_eagerly
from .gelu import ORDERS as GELU
from .gelu import gelu
from .layer_norm import ORDERS as NORM
from .layer_norm import layer_norm
from .third_order import added, wanted


class Weights(NamedTuple):
    """The parameters, in the order of their use."""

    proj: Tensor
    proj_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    last_norm: Tensor
    last_norm_bias: Tensor
    head: Tensor
    head_bias: Tensor


class Options(NamedTuple):
    """What else the operators take: GELU's ``approximate``, and the eps of each norm."""

    approximate: str
    eps: float
    last_eps: float


def may_end(x: Tensor) -> bool:
    """Whether ``vit_end`` may be called for a token like ``x``: each operator is then what it is by itself."""
    return runs_eagerly() and (
        x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type)
    )


def vit_end(x: Tensor, qkv: Tensor, weights: Weights, options: Options) -> Tensor:
    """The logits ``[B, classes]``, where it ``may_end``; under autocast the products are in its dtype.

    Args:
        x: the class token as it enters the block, ``[B, D]``.
        qkv: the projection of the block's normalized tokens, ``[B, N, 3, H, d]``.

    Returns:
        Twice differentiable; what needs a third derivative of an operator is refused as by the operator.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _End.apply(x, qkv, *weights, options)[0]
    narrow = torch.get_autocast_dtype(device)
    dtypes = (x.dtype if "norm" in name else narrow for name in Weights._fields)
    cast = (p.to(dtype) for p, dtype in zip(weights, dtypes, strict=True))
    with torch.autocast(device, enabled=False):
        return _End.apply(x, qkv, *cast, options)[0]


def by_operators(x: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits, r, u and y, with a node for each operator."""
    *weights, options = rest
    w = Weights(*weights)
    heads = attention_qkvpacked(qkv, queries=1)
    r = x + F.linear(heads.flatten(1), w.proj, w.proj_bias)
    n = layer_norm(r, r.shape[-1], w.norm, w.norm_bias, options.eps)
    u = F.linear(n.to(w.fc1.dtype), w.fc1, w.fc1_bias)
    y = r + F.linear(gelu(u, options.approximate), w.fc2, w.fc2_bias)
    z = layer_norm(y, y.shape[-1], w.last_norm, w.last_norm_bias, options.last_eps)
    return F.linear(z.to(w.head.dtype), w.head, w.head_bias), r, u, y


def _plain(qkv: Tensor) -> tuple[bool, float, float]:
    """Attention's options: not causal, its usual scale, no dropout."""
    return False, qkv.shape[-1] ** -0.5, 0.0


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward``, whose products are in the dtypes of the forward, wherever the gradient is taken."""

    def run(ctx: Any, *cotangents: Tensor | None) -> Any:
        if not torch.is_autocast_enabled(ctx.device):
            return backward(ctx, *cotangents)
        with torch.autocast(ctx.device, enabled=False):
            return backward(ctx, *cotangents)

    return run


class _End(torch.autograd.Function):
    """x, qkv, weights, options -> the logits, r, u and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, options = rest
        w = Weights(*weights)
        o, softmax = ATTENTION.forward.eagerly(qkv, None, *_plain(qkv), 1)
        r = x + F.linear(o.view(len(x), -1), w.proj, w.proj_bias)
        n, *of_r = NORM.forward.eagerly(r, w.norm, w.norm_bias, 1, options.eps)
        n = n.to(w.fc1.dtype)
        u = F.linear(n, w.fc1, w.fc1_bias)
        v = GELU.forward.eagerly(u, options.approximate)
        y = r + F.linear(v, w.fc2, w.fc2_bias)
        z, *of_y = NORM.forward.eagerly(y, w.last_norm, w.last_norm_bias, 1, options.last_eps)
        z = z.to(w.head.dtype)
        ctx.save_for_backward(x, qkv, *weights, r, u, y, o, softmax, *of_r, *of_y, n, v, z)
        ctx.options, ctx.device = options, x.device.type
        ctx.set_materialize_grads(False)
        return F.linear(z, w.head, w.head_bias), r, u, y

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options = ctx.saved_tensors, ctx.options
        inputs, made = saved[:14], saved[14:]
        asked = wanted(ctx, inputs)
        dlogits, *others = cotangents
        again = torch.is_grad_enabled()
        if again and not functorch_active():
            if dlogits is not None and not any(asked[2:]) and others == [None, None, None]:
                _, qkv, *weights = inputs
                w = Weights(*weights)
                read = w.proj, w.norm, w.fc1, w.fc2, w.last_norm, w.head
                dx, dqkv = _Gradient.apply(dlogits, qkv, *made[:3], *read, *made[3:9], options)
                return dx if asked[0] else None, dqkv, *(None,) * 13
        elif not again and not (dlogits is None and others[2] is None):
            return *_gradients(inputs, made, options, cotangents, asked), None
        return *_differentiate(by_operators, (*inputs, options), cotangents, asked), None


def _gradients(
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    options: Options,
    cotangents: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, given that of the logits or of y, without a graph."""
    _, qkv, *weights = inputs
    w = Weights(*weights)
    of: Any = Weights._make(asked[2:])  # whether that of each weight is
    r, u, y, o, softmax, mean, rstd, last_mean, last_rstd, n, v, z = made
    dlogits, dr, du, dy = cotangents
    dlast = dlast_bias = dhead = dhead_bias = dqkv = None
    if dlogits is not None:
        dz, chosen = dlogits.mm(w.head).to(y.dtype), (of.last_norm, of.last_norm_bias)
        mine, dlast, dlast_bias = NORM.backward(
            y, w.last_norm, last_mean, last_rstd, dz, 1, *chosen
        )
        dy = added(mine, dy)
        dhead, dhead_bias = _linear_gradients(z, dlogits, of.head, of.head_bias)
    assert dy is not None
    narrow = w.fc2.dtype
    dout = dy.to(narrow)
    du = added(GELU.backward(u, dout.mm(w.fc2), options.approximate), du)
    dn, chosen = du.mm(w.fc1).to(r.dtype), (of.norm, of.norm_bias)
    mine, dnorm, dnorm_bias = NORM.backward(r, w.norm, mean, rstd, dn, 1, *chosen)
    dr = added(dy + mine, dr)
    dattended = dr.to(narrow)
    if asked[1]:
        do = dattended.mm(w.proj).view(o.shape)
        dqkv = ATTENTION.backward(qkv, None, o, softmax, do, *_plain(qkv))
    return (
        dr if asked[0] else None,
        dqkv,
        *_linear_gradients(o.view(len(dr), -1), dattended, of.proj, of.proj_bias),
        dnorm if of.norm else None,
        dnorm_bias if of.norm_bias else None,
        *_linear_gradients(n, du, of.fc1, of.fc1_bias),
        *_linear_gradients(v, dout, of.fc2, of.fc2_bias),
        dlast if of.last_norm else None,
        dlast_bias if of.last_norm_bias else None,
        dhead,
        dhead_bias,
    )


def _linear_gradients(
    x: Tensor, dy: Tensor, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    return dy.t().mm(x) if of_weight else None, dy.sum(0) if of_bias else None


class _Gradient(torch.autograd.Function):
    """The gradients of x and qkv, given that of the logits; what ``_gradient`` takes."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        dx, dqkv, *made = _gradient(*args)
        ctx.save_for_backward(*args[:-1], dx, dqkv, *made)
        ctx.options, ctx.device = args[-1], dx.device.type
        ctx.set_materialize_grads(False)
        return dx, dqkv

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, ddx: Tensor | None, ddqkv: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options, asked = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        if torch.is_grad_enabled() or functorch_active() or ddqkv is None:
            inputs = (*saved[:17], options)
            found = _differentiate(_gradient, inputs, (ddx, ddqkv), wanted(ctx, saved[:17]))
            return *found, None
        dlogits, qkv, r, u, y, proj, norm, fc1, fc2, last_norm, head = saved[:11]
        o, softmax, mean, rstd, last_mean, last_rstd = saved[11:17]
        _, dqkv, dz, dout, dv, du, dn, dattended, do = saved[17:]
        gqkv, gdo = ATTENTION.double_backward(qkv, None, o, softmax, do, dqkv, ddqkv, *_plain(qkv))
        gdo = gdo.view(len(r), -1)
        gdr = added(F.linear(gdo, proj).to(r.dtype), ddx)
        gr, gnorm, gdn = NORM.double_backward(r, norm, mean, rstd, dn, gdr, None, None, 1, asked[6])
        gdn = gdn.to(fc1.dtype)
        gu, gdv = GELU.double_backward(u, dv, F.linear(gdn, fc1), options.approximate)
        gdy = gdr + F.linear(gdv, fc2)
        given = y, last_norm, last_mean, last_rstd, dz, gdy, None, None, 1, asked[9]
        gy, glast, gdz = NORM.double_backward(*given)
        gdz = gdz.to(head.dtype)
        return (
            F.linear(gdz, head) if asked[0] else None,
            gqkv,
            gr,
            gu,
            gy,
            dattended.t().mm(gdo) if asked[5] else None,
            gnorm if asked[6] else None,
            du.t().mm(gdn) if asked[7] else None,
            dout.t().mm(gdv) if asked[8] else None,
            glast if asked[9] else None,
            dlogits.t().mm(gdz) if asked[10] else None,
            *(None,) * 7,
        )


def _gradient(
    dlogits: Tensor,
    qkv: Tensor,
    r: Tensor,
    u: Tensor,
    y: Tensor,
    proj: Tensor,
    norm: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    last_norm: Tensor,
    head: Tensor,
    o: Tensor,
    softmax: Tensor,
    mean: Tensor,
    rstd: Tensor,
    last_mean: Tensor,
    last_rstd: Tensor,
    options: Options,
) -> tuple[Tensor, ...]:
    """The gradients of x and qkv; and on the way those of z, fc2's output, v, u, n, the projection's output and o."""
    dz = dlogits.mm(head).to(y.dtype)
    dy, *_ = NORM.backward(y, last_norm, last_mean, last_rstd, dz, 1, False, False)
    dout = dy.to(fc2.dtype)
    dv = dout.mm(fc2)
    du = GELU.backward(u, dv, options.approximate)
    dn = du.mm(fc1).to(r.dtype)
    dr = dy + NORM.backward(r, norm, mean, rstd, dn, 1, False, False)[0]
    dattended = dr.to(proj.dtype)
    do = dattended.mm(proj).view(o.shape)
    dqkv = ATTENTION.backward(qkv, None, o, softmax, do, *_plain(qkv))
    return dr, dqkv, dz, dout, dv, du, dn, dattended, do


def _differentiate(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` that are asked for, with a graph where one is recorded."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # one of them may be made of another, and its gradient is not that of both
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        results = function(*inputs)
    pairs = [(x, dx) for x, dx in zip(results, cotangents, strict=False) if dx is not None]
    chosen = [x for x, is_asked in zip(inputs, asked, strict=False) if is_asked]
    if not pairs or not chosen:
        return [None] * len(asked)
    results, cotangents = zip(*pairs, strict=True)
    grads = iter(
        torch.autograd.grad(results, chosen, cotangents, create_graph=again, allow_unused=True)
    )
    return [next(grads) if is_asked else None for is_asked in asked]
