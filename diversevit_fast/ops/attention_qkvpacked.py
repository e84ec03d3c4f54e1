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
from ..errors import usage_error
from . import reference
from .attention import attention, cast_for_autocast, check_dropout, check_scale, drawn_seed
from .autograd import Operator, Orders, batch_by_loop, uses_formula
from .backends import kernels
from .checks import check_tensor, shape_error
from .library import operator
from .onnx import exporting_to_onnx
from .third_order import Derivatives, Places, formula_along_two, gradients


def attention_qkvpacked(
    qkv: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    queries: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of queries, keys and values in one tensor, twice differentiable in O(N) memory.

    The numbers are those of ``dvf.attention(*split_qkv(qkv)).transpose(1, 2)``. There the gradients of q, k and v are
    three tensors, which autograd joins into the gradient of ``qkv``, to first and to second order; here the kernels
    write that gradient in one piece. There is no mask: for one split ``qkv`` and call
    ``dvf.attention``. Under torch.compile and ``torch.func``, in forward mode, for ONNX, and on the backend
    ``"reference"`` this is ``dvf.attention``.

    Args:
        qkv: ``[B, N, 3, H, d]``, any strides: what a projection to queries, keys and values returns, viewed.
        is_causal: query i sees keys 0..i.
        scale: softmax scale; ``d ** -0.5`` if None.
        queries: only the first so many tokens attend, to all N; None: every token. 1 is attention of a class
            token alone.
        dropout_p: probability, below 1, that an attention weight is set to zero, as in ``dvf.attention``.

    Returns:
        ``[B, N, H, d]``, contiguous: tokens first, as in ``qkv``, where ``dvf.attention`` has heads first. With
        ``queries`` it is ``[B, queries, H, d]``.

    Raises:
        UsageError: wrong shape, dtype or argument.
        UnsupportedError: a third derivative.

    Source: the layouts are those of ``flash_attn_qkvpacked_func``.
    """
    if has_torch_function((qkv,)):
        return handle_torch_function(
            attention_qkvpacked,
            (qkv,),
            qkv,
            is_causal=is_causal,
            scale=scale,
            queries=queries,
            dropout_p=dropout_p,
        )
    check_tensor("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[1:]:
        raise shape_error("qkv", "[B, N, 3, H, d], none of N, H, d zero", qkv, "check its axes")
    tokens = qkv.shape[1]
    if queries is None:
        queries = tokens
    elif isinstance(queries, bool) or not isinstance(queries, int) or not 0 < queries <= tokens:
        wanted = f"a whole number from 1 to {tokens}, the tokens of qkv"
        raise usage_error("queries", wanted, repr(queries), "leave it out for all")
    if not autograd_alone():
        q, k, v = split_qkv(qkv, queries)
        o = attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
        return o.transpose(1, 2).contiguous()
    check_scale(scale)
    check_dropout(dropout_p)
    (qkv,) = cast_for_autocast(qkv)
    scale = float(qkv.shape[-1] ** -0.5 if scale is None else scale)
    seed = drawn_seed(qkv, dropout_p)
    return _forward(qkv, seed, is_causal, scale, float(dropout_p), queries)[0]


def split_qkv(qkv: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, N, d]``, views of ``[B, N, 3, H, d]``; q of the first ``queries`` tokens alone."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q if queries in (None, q.shape[2]) else q[:, :, :queries], k, v


def autograd_alone() -> bool:
    """Whether nobody but autograd looks on; else three tensors are right, for which ``attention`` has rules."""
    transformed = functorch_active() or uses_formula()
    return not transformed and not torch.compiler.is_compiling() and not exporting_to_onnx()


@operator("attention_qkvpacked")
def attention_qkvpacked_operator(
    qkv: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    queries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(1)-(2): ``o`` [B, queries, H, d] and ``softmax`` [B, H, 2, queries], (1a)."""
    run = kernels(AttentionKernels, qkv).attention_forward
    o, softmax = run(*split_qkv(qkv, queries), None, seed, is_causal, scale, dropout_p)
    return o.transpose(1, 2).contiguous(), softmax


@operator("attention_qkvpacked_backward")
def attention_qkvpacked_backward_operator(
    qkv: Tensor,
    seed: Tensor | None,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """(3)-(5): ``dqkv`` like qkv, dense."""
    chosen, queries = kernels(AttentionKernels, qkv), do.shape[1]
    dqkv = chosen.attention_empty_qkv(qkv, queries)
    tensors = (*split_qkv(qkv, queries), None, seed, *_heads_first(o, softmax, do))
    inputs = AttentionBackward(*tensors, is_causal, scale, dropout_p, mask_grad=False)
    chosen.attention_backward(inputs, into=split_qkv(dqkv, queries))
    return dqkv


@operator("attention_qkvpacked_double_backward")
def attention_qkvpacked_double_backward_operator(
    qkv: Tensor,
    seed: Tensor | None,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    dqkv: Tensor | None,
    ddqkv: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(6)-(9): ``gqkv`` like qkv, dense, and ``gdo``. ``dqkv`` is the backward's, or None."""
    chosen, queries = kernels(AttentionKernels, qkv), do.shape[1]
    gqkv = chosen.attention_empty_qkv(qkv, queries)
    dq = None if dqkv is None else split_qkv(dqkv, queries)[0]
    tensors = (*split_qkv(qkv, queries), None, seed, *_heads_first(o, softmax, do))
    options = (*split_qkv(ddqkv, queries), None, is_causal, scale, dropout_p)
    inputs = AttentionDoubleBackward(*tensors, dq, *options, mask_grad=False)
    *_, gdo, _ = chosen.attention_double_backward(inputs, into=split_qkv(gqkv, queries))
    return gqkv, gdo.transpose(1, 2).contiguous()


def _heads_first(o: Tensor, softmax: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return o.transpose(1, 2), softmax, do.transpose(1, 2)


@attention_qkvpacked_operator.register_fake
def _(qkv, seed, is_causal, scale, dropout_p, queries=None):
    B, N, _, H, d = qkv.shape
    n = N if queries is None else queries
    statistics = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, n, H, d), qkv.new_empty(B, H, 2, n, dtype=statistics)


@attention_qkvpacked_backward_operator.register_fake
def _(qkv, *_):
    return qkv.new_empty(qkv.shape)


@attention_qkvpacked_double_backward_operator.register_fake
def _(qkv, seed, o, softmax, do, *_):
    return qkv.new_empty(qkv.shape), do.new_empty(do.shape)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, seed, *ctx.options, _ = inputs
    ctx.save_for_backward(qkv, seed, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_derivative(ctx: Any, do: Tensor | None, *_: None) -> tuple[Any, ...]:
    if do is None:
        return (None,) * 6
    return _backward(*ctx.saved_tensors, do, *ctx.options), *(None,) * 5


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, is_causal, scale, dropout_p = inputs
    ctx.options = (is_causal, scale, dropout_p)
    dqkv = None if output.device.type == "cpu" else output  # no kernel of a CPU reads it
    ctx.save_for_backward(*tensors, dqkv)
    ctx.set_materialize_grads(False)


def _backward_derivative(ctx: Any, ddqkv: Tensor | None) -> tuple[Any, ...]:
    if ddqkv is None:
        return (None,) * 8
    gqkv, gdo = _double_backward(*ctx.saved_tensors, ddqkv, *ctx.options)
    return gqkv, None, None, None, gdo, None, None, None


def _double_backward_derivative(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    *given, do, dqkv, _ = ctx.saved_tensors

    def first(dy: Tensor) -> tuple[Tensor]:
        return (_backward(*given, dy, *ctx.options),)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        saved = dqkv if dy[0] is do else None
        return _double_backward(*given, *dy, saved, *dd, *ctx.options)[:1]

    def along_two(a: Any, u: Any) -> Any:
        def formula(qkv: Tensor) -> Tensor:
            parts = split_qkv(qkv, do.shape[1])
            is_causal, scale, dropout_p = ctx.options
            o = reference.attention(*parts, None, is_causal, scale, given[1], dropout_p)
            return o.transpose(1, 2)

        return formula_along_two(formula, given[:1], a, u)

    return gradients("attention", ctx, _PLACES, Derivatives(first, second, along_two), (u,), (v,))


_PLACES = Places(slice(0, 1), slice(4, 5), slice(6, 7))

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
ORDERS = Orders(_forward, _backward, _double_backward)
