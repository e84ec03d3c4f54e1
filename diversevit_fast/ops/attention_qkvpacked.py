"""Attention of one tensor that holds queries, keys and values: the same kernels, gradients in one piece.

A projection makes q, k and v as one tensor. Autograd would compute their gradients apart and join them; these
operators write them into one tensor, in the backward and in the double backward. Equations (1)-(9) of
``kernels/README.md``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import (
    AttentionBackward,
    AttentionDoubleBackward,
    AttentionKernels,
)

from .._torch_internals import functorch_active
from . import reference
from .attention import attention, cast_for_autocast, check_scale
from .autograd import Operator, batch_by_loop, uses_formula
from .backends import kernels
from .checks import check_tensor, shape_error
from .library import operator
from .onnx import exporting_to_onnx
from .third_order import Derivatives, Places, formula_along_two, gradients


def attention_qkvpacked(
    qkv: Tensor, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention of queries, keys and values in one tensor, twice differentiable in O(N) memory.

    The numbers are those of ``dvf.attention(*split_qkv(qkv)).transpose(1, 2)``. There the gradients of q, k and v are
    three tensors, which autograd joins into the gradient of ``qkv``, to first and to second order; here the kernels
    write that gradient in one piece. There is neither a mask nor dropout: for a mask split ``qkv`` and call
    ``dvf.attention``. Under torch.compile and ``torch.func``, in forward mode, for ONNX, and on the backend
    ``"reference"`` this is ``dvf.attention``.

    Args:
        qkv: ``[B, N, 3, H, d]``, any strides: what a projection to queries, keys and values returns, viewed.
        is_causal: query i sees keys 0..i.
        scale: softmax scale; ``d ** -0.5`` if None.

    Returns:
        ``[B, N, H, d]``, contiguous: tokens first, as in ``qkv``, where ``dvf.attention`` has heads first.

    Raises:
        UsageError: wrong shape, dtype or argument.
        UnsupportedError: a third derivative.

    Source: the layouts are those of ``flash_attn_qkvpacked_func``.
    """
    if has_torch_function((qkv,)):
        return handle_torch_function(
            attention_qkvpacked, (qkv,), qkv, is_causal=is_causal, scale=scale
        )
    check_tensor("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[1:]:
        raise shape_error("qkv", "[B, N, 3, H, d], none of N, H, d zero", qkv, "check its axes")
    if not autograd_alone():
        o = attention(*split_qkv(qkv), is_causal=is_causal, scale=scale)
        return o.transpose(1, 2).contiguous()
    check_scale(scale)
    (qkv,) = cast_for_autocast(qkv)
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    return _forward(qkv, is_causal, scale)[0]


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, N, d]``, views of ``[B, N, 3, H, d]``."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def autograd_alone() -> bool:
    """Whether nobody but autograd looks on; else three tensors are right, for which ``attention`` has rules."""
    transformed = functorch_active() or uses_formula()
    return not transformed and not torch.compiler.is_compiling() and not exporting_to_onnx()


@operator("attention_qkvpacked")
def attention_qkvpacked_operator(
    qkv: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(1)-(2): ``o`` [B, N, H, d] and ``softmax`` [B, H, 2, N], (1a)."""
    run = kernels(AttentionKernels, qkv).attention_forward
    o, softmax = run(*split_qkv(qkv), None, is_causal, scale)
    return o.transpose(1, 2).contiguous(), softmax


@operator("attention_qkvpacked_backward")
def attention_qkvpacked_backward_operator(
    qkv: Tensor, o: Tensor, softmax: Tensor, do: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """(3)-(5): ``dqkv`` like qkv, dense."""
    chosen = kernels(AttentionKernels, qkv)
    dqkv = chosen.attention_empty_qkv(qkv)
    tensors = (*split_qkv(qkv), None, o.transpose(1, 2), softmax, do.transpose(1, 2))
    inputs = AttentionBackward(*tensors, is_causal, scale, mask_grad=False)
    chosen.attention_backward(inputs, into=split_qkv(dqkv))
    return dqkv


@operator("attention_qkvpacked_double_backward")
def attention_qkvpacked_double_backward_operator(
    qkv: Tensor,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    dqkv: Tensor | None,
    ddqkv: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(6)-(9): ``gqkv`` like qkv, dense, and ``gdo``. ``dqkv`` is the backward's, or None."""
    chosen = kernels(AttentionKernels, qkv)
    gqkv = chosen.attention_empty_qkv(qkv)
    dq = None if dqkv is None else split_qkv(dqkv)[0]
    tensors = (*split_qkv(qkv), None, o.transpose(1, 2), softmax, do.transpose(1, 2))
    cotangents = (*split_qkv(ddqkv), None)
    inputs = AttentionDoubleBackward(*tensors, dq, *cotangents, is_causal, scale, mask_grad=False)
    *_, gdo, _ = chosen.attention_double_backward(inputs, into=split_qkv(gqkv))
    return gqkv, gdo.transpose(1, 2).contiguous()


def _heads(qkv: Tensor) -> Tensor:
    """``[B, N, H, d]`` without contents."""
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d)


@attention_qkvpacked_operator.register_fake
def _(qkv, is_causal, scale):
    B, N, _, H, _ = qkv.shape
    statistics = torch.promote_types(qkv.dtype, torch.float32)
    return _heads(qkv), qkv.new_empty(B, H, 2, N, dtype=statistics)


@attention_qkvpacked_backward_operator.register_fake
def _(qkv, *_):
    return qkv.new_empty(qkv.shape)


@attention_qkvpacked_double_backward_operator.register_fake
def _(qkv, *_):
    return qkv.new_empty(qkv.shape), _heads(qkv)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_derivative(ctx: Any, do: Tensor | None, *_: None) -> tuple[Any, ...]:
    if do is None:
        return None, None, None
    return _backward(*ctx.saved_tensors, do, *ctx.options), None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, is_causal, scale = inputs
    ctx.options = (is_causal, scale)
    dqkv = None if output.device.type == "cpu" else output  # no kernel of a CPU reads it
    ctx.save_for_backward(*tensors, dqkv)
    ctx.set_materialize_grads(False)


def _backward_derivative(ctx: Any, ddqkv: Tensor | None) -> tuple[Any, ...]:
    if ddqkv is None:
        return (None,) * 6
    gqkv, gdo = _double_backward(*ctx.saved_tensors, ddqkv, *ctx.options)
    return gqkv, None, None, gdo, None, None


def _double_backward_derivative(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    *given, do, dqkv, _ = ctx.saved_tensors

    def first(dy: Tensor) -> tuple[Tensor]:
        return (_backward(*given, dy, *ctx.options),)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        saved = dqkv if dy[0] is do else None
        return _double_backward(*given, *dy, saved, *dd, *ctx.options)[:1]

    def along_two(a: Any, u: Any) -> Any:
        def formula(qkv: Tensor) -> Tensor:
            return reference.attention(*split_qkv(qkv), None, *ctx.options).transpose(1, 2)

        return formula_along_two(formula, given[:1], a, u)

    return gradients("attention", ctx, _PLACES, Derivatives(first, second, along_two), (u,), (v,))


_PLACES = Places(slice(0, 1), slice(3, 4), slice(5, 6))

_double_backward = Operator(
    attention_qkvpacked_double_backward_operator,
    derivative=_double_backward_derivative,
    batch=batch_by_loop,
)
_backward = Operator(
    attention_qkvpacked_backward_operator,
    derivative=_backward_derivative,
    batch=batch_by_loop,
    save=_save_backward,
)
_forward = Operator(
    attention_qkvpacked_operator,
    derivative=_forward_derivative,
    batch=batch_by_loop,
    save=_save_forward,
    results=1,
)
