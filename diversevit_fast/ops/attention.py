"""Attention, twice differentiable in O(N) memory: schemas, fakes, and the forward, backward and double backward.

Saved for the backward passes: q, k, v, mask, o, the softmax's row statistics and the cotangent; nothing of size
Nq x Nk unless the mask itself is. ``o`` and ``softmax`` are constants of the backward and of the double backward: the
formulas account for both, so their gradients are None. On other devices than the CPU the backward's ``dq`` is saved for
the double backward, a constant as well: with it a GPU's row program needs one loop over keys. Equations (1)-(9) of
``kernels/README.md``.

Dropout keeps a weight or not by its seed, row and key alone, (53)-(57): all orders draw the same bits again from the
seed, a tensor of one number that the device's generator made.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import (
    AttentionBackward,
    AttentionDoubleBackward,
    AttentionKernels,
)

from ..errors import usage_error
from . import reference
from .autograd import Operator, batch_by_loop, by_formula, runs_eagerly, uses_formula
from .backends import kernels
from .checks import (
    Passed,
    as_plain_mask,
    check_alike,
    check_tensor,
    is_causal_bias,
    shape_error,
)
from .library import operator
from .onnx import decomposes, exported_attention, exporting_to_onnx, refuse_dropout
from .third_order import Derivatives, Places, formula_along_two, gradients


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention, exactly ``F.scaled_dot_product_attention``, twice differentiable.

    Forward, backward and double backward keep O(N) memory. Inside a forward-mode level
    (``torch.func.jvp``, ``forward_ad``) and on the backend ``"reference"`` the plain formula is used:
    right to any order, N x N memory.

    Args:
        q: ``[..., H, Nq, d]``.
        k: ``[..., H, Nk, d]`` (``[..., Hkv, Nk, d]`` with ``enable_gqa``, H a multiple of Hkv).
        v: ``[..., H, Nk, dv]``; dv may differ from d.
        attn_mask: broadcastable to ``[..., H, Nq, Nk]``; bool (True: attend) or added to the scores.
            An additive mask that requires a gradient gets one, to second order.
        dropout_p: probability, below 1, that an attention weight is set to zero; the others grow by
            1 / (1 - dropout_p). Like ``F.scaled_dot_product_attention`` this drops whenever it is not 0:
            pass 0 in evaluation. PyTorch's generator of the device draws the seed.
        is_causal: query i sees keys 0..i; excludes ``attn_mask``.
        scale: softmax scale; ``d ** -0.5`` if None.
        enable_gqa: let groups of query heads share a key and value head.

    Returns:
        ``[..., H, Nq, dv]``; zeros in rows that attend to nothing.

    Raises:
        UsageError: wrong shapes, dtypes, devices or arguments.
        UnsupportedError: a third derivative; dropout in an ONNX export.
    """
    if has_torch_function((q, k, v, attn_mask)):
        if is_causal_bias(attn_mask):
            attn_mask, is_causal = as_plain_mask(attn_mask, is_causal, q.device)
            return attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return handle_torch_function(
            attention,
            (q, k, v, attn_mask),
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    eager, options = runs_eagerly(), (dropout_p, is_causal, scale, enable_gqa)
    if eager and attn_mask is None and (known := _passed.find(options, q, k, v)):
        return _forward.eagerly(q, k, v, None, drawn_seed(q, dropout_p), *known)[0]
    _check(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    given = q, k, v
    q, k, v = cast_for_autocast(q, k, v)
    check_alike(q=q, k=k, v=v)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    dropout_p = float(dropout_p)
    if exporting_to_onnx():
        refuse_dropout(dropout_p)
        return exported_attention(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    q4, k4, v4, lead = _as_samples(q, k, v, enable_gqa)
    mask = None if attn_mask is None else mask_as_samples(attn_mask, lead, q4, k4)
    if eager and mask is None and q4 is given[0] and k4 is given[1] and v4 is given[2]:
        _passed.add((is_causal, scale, dropout_p), options, q, k, v)
    seed = drawn_seed(q, dropout_p)
    if uses_formula():
        o = by_formula(reference.attention, q4, k4, v4, mask, is_causal, scale, seed, dropout_p)
    else:
        o = _forward(q4, k4, v4, mask, seed, is_causal, scale, dropout_p)[0]
    return o if o.shape[:2] == lead else o.reshape(*lead, *o.shape[2:])


_passed = Passed()


def drawn_seed(like: Tensor, dropout_p: float) -> Tensor | None:
    """Draw the seed of one call, int64 [1], from the generator of the tensor's device; None without dropout.

    On a GPU nobody waits for it, and a captured graph draws another at every replay.
    """
    return torch.randint(2**63 - 1, (1,), device=like.device) if dropout_p else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.ndim < 2 + enable_gqa or 0 in x.shape[-2:] or (x.ndim > 2 and x.shape[-3] == 0):
            raise shape_error(name, "[..., H, N, d], none of H, N, d zero", x, "check its axes")
    if k.shape[-1] != q.shape[-1]:
        raise shape_error(
            "k", f"[..., {q.shape[-1]}], q's head width", k, "project both to one width"
        )
    if v.shape[-2] != k.shape[-2]:
        raise shape_error(
            "v", f"[..., {k.shape[-2]}, dv], k's token count", v, "pass a value per key"
        )
    if enable_gqa and (k.shape[-3] != v.shape[-3] or q.shape[-3] % k.shape[-3]):
        hint = "k and v need one head count that divides q's"
        raise shape_error("k", f"a head count that divides {q.shape[-3]} and equals v's", k, hint)
    check_dropout(dropout_p)
    check_scale(scale)
    if is_causal and mask is not None:
        raise usage_error("attn_mask", "None with is_causal", "a mask", "put causality in the mask")
    if mask is not None and mask.dtype != torch.bool:
        if not mask.is_floating_point():
            hint = "attn_mask.bool() attends where it is not 0"
            raise usage_error("attn_mask", "torch.bool or a floating dtype", mask.dtype, hint)
        check_tensor("attn_mask", mask)
    if mask is not None and mask.device != q.device:
        raise usage_error("attn_mask", f"device {q.device} like q", mask.device, "move it")


def check_dropout(dropout_p: float) -> None:
    """Raise a UsageError unless ``dropout_p`` is a probability below 1."""
    if isinstance(dropout_p, Tensor) or not 0.0 <= dropout_p < 1.0:
        raise usage_error("dropout_p", "a probability in [0, 1)", dropout_p, "pass 0.0")


def check_scale(scale: float | None) -> None:
    """Raise a UsageError unless the softmax scale is a finite number or None."""
    if scale is not None and not math.isfinite(scale):
        raise usage_error("scale", "a finite number", scale, "leave it None for d ** -0.5")


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert tensors other than float64 to autocast's dtype where it is on, as PyTorch's attention does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _as_samples(
    q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Reshape q, k, v to ``[B, heads, N, .]``, views where possible; also return the output's leading shape."""
    axes = 1 if enable_gqa else 2
    if q.ndim == k.ndim == v.ndim == 4 and q.shape[:axes] == k.shape[:axes] == v.shape[:axes]:
        return q, k, v, tuple(q.shape[:2])
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        heads = () if enable_gqa else torch.broadcast_shapes(*(x.shape[-3:-2] for x in (q, k, v)))
    except RuntimeError:
        shapes = " and ".join(str(list(x.shape)) for x in (q, k, v))
        raise usage_error("q, k, v", "leading axes that broadcast", shapes, "match them") from None

    def view(x: Tensor) -> Tensor:
        count = x.shape[-3:-2] if enable_gqa else (heads or (1,))
        x = x.expand(*batch, *count, *x.shape[-2:])
        return x.reshape(math.prod(batch), *count, *x.shape[-2:])

    return view(q), view(k), view(v), (*batch, *(q.shape[-3:-2] if enable_gqa else heads))


def mask_as_samples(mask: Tensor, lead: tuple[int, ...], q: Tensor, k: Tensor) -> Tensor:
    """Reshape the mask to ``[B | 1, H | 1, Nq | 1, Nk | 1]``, broadcast axes kept at size 1."""
    full = (*lead, q.shape[2], k.shape[2])
    shape = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if mask.ndim > len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise shape_error("attn_mask", f"broadcastable to {list(full)}", mask, "check its axes")
    mask = mask.reshape(shape)
    if len(full) < 4:
        return mask.reshape((1,) * (4 - len(full)) + shape)
    batch = shape[:-3]
    if math.prod(batch) != 1:
        batch = lead[:-1]
    return mask.expand(*batch, *shape[-3:]).reshape(math.prod(batch), *shape[-3:])


@operator("attention")
def attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(1)-(2): ``o`` [B, H, Nq, dv] and ``softmax`` [B, H, 2, Nq], (1a)."""
    run = kernels(AttentionKernels, q).attention_forward
    return run(q, k, v, _narrow(mask, q), seed, is_causal, scale, dropout_p)


@operator("attention_backward")
def attention_backward_operator(inputs: AttentionBackward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(3)-(5): ``dq, dk, dv`` and ``dmask`` (no elements unless ``mask_grad``)."""
    inputs = _narrowed(inputs)
    dq, dk, dv, dmask = kernels(AttentionKernels, inputs.q).attention_backward(inputs)
    return dq, dk, dv, inputs.q.new_empty(0) if dmask is None else dmask


@operator("attention_double_backward")
def attention_double_backward_operator(
    inputs: AttentionDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(6)-(9): ``gq, gk, gv, gdo`` and ``gmask`` (no elements unless ``mask_grad``)."""
    inputs = _narrowed(inputs)
    gq, gk, gv, gdo, gmask = kernels(AttentionKernels, inputs.q).attention_double_backward(inputs)
    return gq, gk, gv, gdo, inputs.q.new_empty(0) if gmask is None else gmask


def _narrow(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Clamp a float64 mask so that its finite numbers stay finite in float32, the dtype of other queries' scores."""
    if mask is None or mask.dtype != torch.float64 or q.dtype == torch.float64:
        return mask
    largest = torch.finfo(torch.float32).max
    return torch.where(mask.isinf(), mask, mask.clamp(-largest, largest))


Inputs = TypeVar("Inputs", AttentionBackward, AttentionDoubleBackward)


def _narrowed(x: Inputs) -> Inputs:
    return x if x.mask is None else x._replace(mask=_narrow(x.mask, x.q))


def _heads_like(x: Tensor, width: int) -> Tensor:
    """``[B, H, N, width]`` stored as ``[B, N, H, width]``, the layout every backend returns."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)


@attention_operator.register_fake
def _(q, k, v, mask, *_):
    statistics = torch.promote_types(q.dtype, torch.float32)
    B, H, Nq, _ = q.shape
    return _heads_like(q, v.shape[-1]), q.new_empty(B, H, 2, Nq, dtype=statistics)


def _gradients_fake(x: Inputs, *of: Tensor) -> tuple[Tensor, ...]:
    dmask = x.mask.new_empty(x.mask.shape) if x.mask_grad and x.mask is not None else None
    return *(_heads_like(y, y.shape[-1]) for y in of), x.q.new_empty(0) if dmask is None else dmask


@attention_backward_operator.register_fake
def _(*inputs):
    x = AttentionBackward._make(inputs)
    return _gradients_fake(x, x.q, x.k, x.v)


@attention_double_backward_operator.register_fake
def _(*inputs):
    x = AttentionDoubleBackward._make(inputs)
    return _gradients_fake(x, x.q, x.k, x.v, x.do)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, is_causal, scale, dropout_p = inputs
    ctx.options = (is_causal, scale, dropout_p)
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_derivative(ctx: Any, do: Tensor | None, *_: None) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 8
    mask_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dmask = _backward(*ctx.saved_tensors, do, *ctx.options, mask_grad)
    return dq, dk, dv, dmask if mask_grad else None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, is_causal, scale, dropout_p, mask_grad = inputs
    ctx.options = (is_causal, scale, dropout_p, mask_grad)
    dq = None if output[0].device.type == "cpu" else output[0]  # no kernel of a CPU reads it
    ctx.save_for_backward(*tensors, dq)
    ctx.set_materialize_grads(False)


def _backward_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    if all(x is None for x in cotangents):
        return (None,) * 12
    *kind, mask_was_differentiated = ctx.options
    *dd, ddmask = cotangents
    ddmask = ddmask if mask_was_differentiated else None
    # dq may be differentiated in a mask whose gradient is not asked for
    mask_grad = ctx.needs_input_grad[3]
    gq, gk, gv, gdo, gmask = _double_backward(*ctx.saved_tensors, *dd, ddmask, *kind, mask_grad)
    gmask = gmask if mask_grad else None
    return gq, gk, gv, gmask, None, None, None, gdo, None, None, None, None


def _double_backward_derivative(
    ctx: Any,
    uq: Tensor | None,
    uk: Tensor | None,
    uv: Tensor | None,
    v: Tensor | None,
    umask: Tensor | None,
) -> tuple[Any, ...]:
    # given: q, k, v, mask, seed and what the forward saved
    *given, do, dq, _, _, _, ddmask = ctx.saved_tensors
    *kind, mask_was_differentiated = ctx.options

    def first(dy: Tensor) -> Any:
        return _backward(*given, dy, *kind, ddmask is not None)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        saved = dq if dy[0] is do else None
        mask_grad = ctx.needs_input_grad[3] or ddmask is not None
        gq, gk, gv, _, gmask = _double_backward(*given, *dy, saved, *dd, *kind, mask_grad)
        return gq, gk, gv, gmask

    def along_two(a: Any, u: Any) -> Any:
        def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            is_causal, scale, dropout_p = kind
            return reference.attention(q, k, v, mask, is_causal, scale, given[4], dropout_p)

        return formula_along_two(formula, given[:4], a, u)

    u = (uq, uk, uv, umask if mask_was_differentiated else None)
    return gradients("attention", ctx, _PLACES, Derivatives(first, second, along_two), u, (v,))


_PLACES = Places(slice(0, 4), slice(-6, -5), slice(-4, None))


def _fold_samples(
    call: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule: samples are independent, so the mapped axis joins the sample axis.

    Under dropout they are not: a sample's number is part of what decides on its weights.
    """
    if args[4] is not None:
        return batch_by_loop(call, size, in_dims, args)
    lifted = [
        x
        if not isinstance(x, Tensor)
        else x.expand(size, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims, strict=True)
    ]
    samples, mask = lifted[0].shape[1], lifted[3]

    def fold(x: Any) -> Any:
        return x.expand(size, samples, *x.shape[2:]).flatten(0, 1) if isinstance(x, Tensor) else x

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (size, samples)) if x.ndim > 1 else x.expand(size, *x.shape)

    results = [unfold(x) for x in call(*map(fold, lifted))]
    if mask is not None and results[-1].ndim == 5 and mask.shape[1] == 1:
        results[-1] = results[-1].sum(1, keepdim=True)  # the mask's gradient, over its samples
    return tuple(results), (0,) * len(results)


_double_backward = Operator(
    attention_double_backward_operator, derivative=_double_backward_derivative, batch=_fold_samples
)
_backward = Operator(
    attention_backward_operator,
    derivative=_backward_derivative,
    batch=_fold_samples,
    save=_save_backward,
)
_forward = Operator(
    attention_operator,
    derivative=_forward_derivative,
    batch=_fold_samples,
    save=_save_forward,
    results=1,
)


def _for_export(*args: Any) -> tuple[Tensor, Tensor]:
    if exporting_to_onnx():
        refuse_dropout(args[-1])
    return reference.attention_forward(*args)


decomposes(attention_operator, _for_export)
