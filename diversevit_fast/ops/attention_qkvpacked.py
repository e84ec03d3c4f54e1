"""Attention of one tensor that holds queries, keys and values: the same kernels, gradients in one piece.

A projection makes q, k and v as one tensor. Taken apart and differentiated, their gradients are three
tensors, which autograd stacks, permutes and copies back into the shape of the one, to first and to
second order. Here the kernels write them where they belong. ``taken_apart`` marks the three; ``attention``
sees the marks, so that what stands between the two (a head filter, a context) need know nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_internals import functorch_active, in_forward_mode
from . import reference
from .autograd import Rung, batch_by_loop
from .backends import launch
from .third_order import Places, Stage, differentiated, plain_curvature


class _Part(NamedTuple):
    """What a tensor is marked with: it is q (0), k (1) or v (2) of ``whole``."""

    whole: Tensor  # [B, N, 3, H, d]
    place: int


def taken_apart(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, N, d]``, views of ``[B, N, 3, H, d]``.

    For callers that hand them to nobody but ``attention``: it then records a gradient with respect to
    ``qkv``, and none with respect to one of them.
    """
    q, k, v = _apart(qkv)
    if _wanted(qkv):
        _mark(qkv, q, k, v)
    return q, k, v


def recognise(q: Tensor, k: Tensor, v: Tensor, made: Tensor) -> None:
    """Mark the three as ``taken_apart`` if a model did that to a projection's output ``made`` [B, N, 3 H d].

    That is if they lie where they would, and autograd recorded nothing between but views.
    """
    B, H, N, d = q.shape
    if made.shape != (B, N, 3 * H * d) or not k.shape == v.shape == q.shape or not _wanted(made):
        return
    samples, tokens, step = made.stride()
    strides, size = (samples, d * step, tokens, step), H * d * step * made.itemsize
    for place, x in enumerate((q, k, v)):
        lies = x.stride() == strides and x.data_ptr() == made.data_ptr() + place * size
        if not lies or not _only_views(x, made):
            return
    _mark(made.unflatten(-1, (3, H, d)), q, k, v)


def whole_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """``[B, N, 3, H, d]`` if the three are ``taken_apart`` from it, and as they were."""
    first: _Part | None = getattr(q, "_diversevit_part", None)
    if first is None or not _wanted(first.whole):
        return None
    for place, part in enumerate((q, k, v)):
        mark: _Part | None = getattr(part, "_diversevit_part", None)
        if mark is None or mark.place != place or mark.whole is not first.whole:
            return None
    return first.whole


def packed_attention(qkv: Tensor, is_causal: bool, scale: float) -> Tensor:
    """``[B, H, N, d]`` of ``[B, N, 3, H, d]``, (1)."""
    return _d0(qkv, is_causal, scale)[0]


def _mark(whole: Tensor, *parts: Tensor) -> None:
    for place, part in enumerate(parts):
        part._diversevit_part = _Part(whole, place)  # pyright: ignore[reportAttributeAccessIssue]


_VIEWS = {
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Permute", "Transpose", "Unbind", "Select", "Split")
}


def _only_views(x: Tensor, made: Tensor) -> bool:
    node, end = x.grad_fn, made.grad_fn
    while node is not None and node is not end:
        if type(node).__name__ not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return node is not None


def _apart(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _wanted(qkv: Tensor) -> bool:
    """Whether autograd alone is going to differentiate, for which this is made."""
    transformed = functorch_active() or in_forward_mode()
    plain = not transformed and not torch.compiler.is_compiling()
    return plain and torch.is_grad_enabled() and qkv.requires_grad


@torch.library.custom_op("diversevit::packed_attention", mutates_args=())
def packed_attention_operator(qkv: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """d0, (1)-(2): ``o`` [B, H, N, d] and ``softmax`` [B, H, 2, N], (1a)."""
    return launch("attention", "forward", *_apart(qkv), None, is_causal, scale)


@torch.library.custom_op("diversevit::packed_attention_backward", mutates_args=())
def packed_attention_backward_operator(
    qkv: Tensor, o: Tensor, softmax: Tensor, do: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """d1, (3)-(5): ``dqkv`` like qkv, dense."""
    dqkv = launch("attention", "packed", qkv)
    operands = (*_apart(qkv), None, o, softmax, do, is_causal, scale, False)
    launch("attention", "backward", *operands, into=_apart(dqkv))
    return dqkv


@torch.library.custom_op("diversevit::packed_attention_double_backward", mutates_args=())
def packed_attention_double_backward_operator(
    qkv: Tensor,
    o: Tensor,
    softmax: Tensor,
    do: Tensor,
    dqkv: Tensor | None,
    ddqkv: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """d2, (6)-(9): ``gqkv`` like qkv, dense, and ``gdo``. ``dqkv`` is d1's, or None."""
    dq = None if dqkv is None else _apart(dqkv)[0]
    gqkv = launch("attention", "packed", qkv)
    given = (*_apart(qkv), None, o, softmax, do, dq, *_apart(ddqkv), None, is_causal, scale, False)
    *_, gdo, _ = launch("attention", "double_backward", *given, into=_apart(gqkv))
    return gqkv, gdo


def _heads(qkv: Tensor) -> Tensor:
    """``[B, H, N, d]`` stored as ``[B, N, H, d]``, the layout every backend returns."""
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d).transpose(1, 2)


@packed_attention_operator.register_fake
def _(qkv, is_causal, scale):
    B, N, _, H, _ = qkv.shape
    statistics = torch.promote_types(qkv.dtype, torch.float32)
    return _heads(qkv), qkv.new_empty(B, H, 2, N, dtype=statistics)


@packed_attention_backward_operator.register_fake
def _(qkv, o, softmax, do, is_causal, scale):
    return qkv.new_empty(qkv.shape)


@packed_attention_double_backward_operator.register_fake
def _(qkv, o, softmax, do, dqkv, ddqkv, is_causal, scale):
    return qkv.new_empty(qkv.shape), _heads(qkv)


def _save_d0(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _d0_derivative(ctx: Any, do: Tensor | None, _: None) -> tuple[Any, ...]:
    if do is None:
        return None, None, None
    return _d1(*ctx.saved_tensors, do, ctx.is_causal, ctx.scale), None, None


def _save_d1(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    kept = None if output.device.type == "cpu" else output  # no kernel of a CPU reads it
    ctx.save_for_backward(*tensors, kept)
    ctx.set_materialize_grads(False)


def _d1_derivative(ctx: Any, ddqkv: Tensor | None) -> tuple[Any, ...]:
    if ddqkv is None:
        return (None,) * 6
    gqkv, gdo = _d2(*ctx.saved_tensors, ddqkv, ctx.is_causal, ctx.scale)
    return gqkv, None, None, gdo, None, None


def _save_d2(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _d2_derivative(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    qkv, o, softmax, do, dqkv, _ = tensors
    kind, given = (ctx.is_causal, ctx.scale), (qkv, o, softmax)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        kept = dqkv if dy[0] is do else None
        return _d2(*given, *dy, kept, *dd, *kind)[:1]

    def curvature(a: Any, u: Any) -> Any:
        def formula(qkv: Tensor) -> Tensor:
            q, k, v = _apart(qkv)
            return reference.attention(q, k, v, None, ctx.is_causal, ctx.scale)

        return plain_curvature(formula, (qkv,), a, u)

    stage = Stage(lambda dy: (_d1(*given, dy, *kind),), second, curvature)
    return *differentiated("attention", ctx, tensors, _PLACES, stage, (u,), (v,)), None, None


_PLACES = Places(slice(0, 1), slice(3, 4), slice(5, 6))

_d2 = Rung(
    packed_attention_double_backward_operator,
    save=_save_d2,
    derivative=_d2_derivative,
    batch=batch_by_loop,
)
_d1 = Rung(
    packed_attention_backward_operator,
    save=_save_d1,
    derivative=_d1_derivative,
    batch=batch_by_loop,
)
_d0 = Rung(packed_attention_operator, save=_save_d0, derivative=_d0_derivative, batch=batch_by_loop)
