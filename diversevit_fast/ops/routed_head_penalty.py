"""The penalty of routed input gradients u_h = r_h W_h: schemas, fakes, and the forward, backward and double backward.

Saved for the backward passes: grad_qkv, weight, cosines, norms and the cotangents; nothing of B H N D elements.
``cosines`` and ``norms`` are constants of the backward and of the double backward: the formulas account for both, so
their gradients are None. Equations (40)-(45) of ``kernels/README.md``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import (
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
    RoutedHeadPenaltyKernels,
)

from ..errors import usage_error
from . import reference
from .autograd import Operator, batch_by_loop, by_formula, uses_formula
from .backends import kernels
from .checks import check_alike, check_tensor, shape_error
from .head_penalty import (
    check_kind,
    cotangents_fake,
    present,
    save_statistics,
    statistics_fake,
)
from .library import operator
from .onnx import decomposes, exporting_to_onnx
from .third_order import Derivatives, Places, formula_along_two, gradients


def routed_head_penalty(
    grad_qkv: Tensor,
    weight_qkv: Tensor,
    *,
    granularity: str = "token",
    reduction: str = "all",
    eps: float = 1e-12,
    return_cosines: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``head_penalty`` of the heads' input gradients, made tile by tile and never kept.

    What head h alone reads from its layer's input has the gradient ``u_h = r_h W_h``, r_h the gradient
    of its queries, keys and values. This is ``head_penalty`` of u ``[B, H, N, D]``, twice
    differentiable in both arguments. Under autocast it is computed in the dtypes given, which may
    then differ.

    Args:
        grad_qkv: ``[B, N, 3, H, d]``, the gradient of the qkv projection's output, any strides.
        weight_qkv: ``[3, H, d, D]``, the projection's weight, any strides.
        granularity: as ``head_penalty``'s.
        reduction: as ``head_penalty``'s.
        eps: as ``head_penalty``'s.
        return_cosines: as ``head_penalty``'s.

    Returns:
        As ``head_penalty``.

    Raises:
        UsageError: wrong shapes, dtypes, devices or arguments; one head with ``"pairs"``.
        UnsupportedError: a third derivative.

    Source: arXiv 2308.16274; that all heads come out of one backward pass is (40).
    """
    if has_torch_function((grad_qkv, weight_qkv)):
        return handle_torch_function(
            routed_head_penalty,
            (grad_qkv, weight_qkv),
            grad_qkv,
            weight_qkv,
            granularity=granularity,
            reduction=reduction,
            eps=eps,
            return_cosines=return_cosines,
        )
    _check(grad_qkv, weight_qkv)
    check_kind(granularity, reduction, eps, grad_qkv.shape[3], grad_qkv.dtype)
    kind = (granularity, reduction, float(eps))
    if uses_formula() or exporting_to_onnx():
        penalty, cosines = by_formula(reference.routed_head_penalty, grad_qkv, weight_qkv, *kind)
    else:
        penalty, cosines, *_ = _forward(grad_qkv, weight_qkv, *kind)
    return (penalty, cosines) if return_cosines else penalty


def _check(grad_qkv: Tensor, weight_qkv: Tensor) -> None:
    check_tensor("grad_qkv", grad_qkv)
    check_tensor("weight_qkv", weight_qkv)
    if grad_qkv.ndim != 5 or grad_qkv.shape[2] != 3 or grad_qkv.numel() == 0:
        wanted = "[B, N, 3, H, d], none of them zero"
        raise shape_error("grad_qkv", wanted, grad_qkv, "check its axes")
    H, d = grad_qkv.shape[3:]
    if weight_qkv.ndim != 4 or weight_qkv.shape[:3] != (3, H, d) or weight_qkv.shape[3] == 0:
        hint = "view the projection's weight as (3, H, d, D)"
        raise shape_error("weight_qkv", f"[3, {H}, {d}, D] for grad_qkv's heads", weight_qkv, hint)
    if not torch.is_autocast_enabled(grad_qkv.device.type):
        check_alike(grad_qkv=grad_qkv, weight_qkv=weight_qkv)
    elif weight_qkv.device != grad_qkv.device:
        wanted = f"device {grad_qkv.device} like grad_qkv"
        raise usage_error("weight_qkv", wanted, weight_qkv.device, "move one of them")


@operator("routed_head_penalty")
def routed_head_penalty_operator(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(40)-(41): penalty, cosines, norms."""
    run = kernels(RoutedHeadPenaltyKernels, grad_qkv).routed_head_penalty_forward
    return run(grad_qkv, weight, granularity, reduction, eps)


@operator("routed_head_penalty_backward")
def routed_head_penalty_backward_operator(
    inputs: RoutedHeadPenaltyBackward,
) -> tuple[Tensor, Tensor]:
    """(42): ``dgrad_qkv`` and ``dweight``."""
    return kernels(RoutedHeadPenaltyKernels, inputs.grad_qkv).routed_head_penalty_backward(inputs)


@operator("routed_head_penalty_double_backward")
def routed_head_penalty_double_backward_operator(
    inputs: RoutedHeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(43)-(45): ``ggrad_qkv``, ``gweight``, and ``gdpenalty``, ``gdcosines`` or no elements."""
    run = kernels(RoutedHeadPenaltyKernels, inputs.grad_qkv).routed_head_penalty_double_backward
    return present(run(inputs), inputs.cosines)


@routed_head_penalty_operator.register_fake
def _(grad_qkv, weight, granularity, *_):
    B, N, _, H, _ = grad_qkv.shape
    dtype = torch.promote_types(torch.promote_types(grad_qkv.dtype, weight.dtype), torch.float32)
    return statistics_fake(grad_qkv.new_empty(0, dtype=dtype), B, H, N, granularity)


@routed_head_penalty_backward_operator.register_fake
def _(grad_qkv, weight, *_):
    return grad_qkv.new_empty(grad_qkv.shape), weight.new_empty(weight.shape)


@routed_head_penalty_double_backward_operator.register_fake
def _(*inputs):
    x = RoutedHeadPenaltyDoubleBackward._make(inputs)
    grads = x.grad_qkv.new_empty(x.grad_qkv.shape), x.weight.new_empty(x.weight.shape)
    return *grads, *cotangents_fake(x.cosines, x.dpenalty, x.dcosines)


def _forward_derivative(
    ctx: Any, dpenalty: Tensor | None, dcosines: Tensor | None, *_: None
) -> tuple[Any, ...]:
    if dpenalty is None and dcosines is None:
        return (None,) * 5
    return *_backward(*ctx.saved_tensors, dpenalty, dcosines, *ctx.options), None, None, None


def _backward_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    if all(x is None for x in cotangents):
        return (None,) * 9
    *_, dpenalty, dcosines = ctx.saved_tensors
    *grads, gdpenalty, gdcosines = _double_backward(*ctx.saved_tensors, *cotangents, *ctx.options)
    given = (
        gdpenalty if dpenalty is not None else None,
        gdcosines if dcosines is not None else None,
    )
    return *grads, None, None, *given, None, None, None


def _double_backward_derivative(
    ctx: Any,
    ugrad_qkv: Tensor | None,
    uweight: Tensor | None,
    vpenalty: Tensor | None,
    vcosines: Tensor | None,
) -> tuple[Any, ...]:
    kind, given = ctx.options, ctx.saved_tensors[:4]

    def first(*dy: Tensor | None) -> tuple[Tensor, ...]:
        return _backward(*given, *dy, *kind)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        return _double_backward(*given, *dy, *dd, *kind)[:2]

    def along_two(a: Any, u: Any) -> Any:
        def formula(grad_qkv: Tensor, weight: Tensor) -> Any:
            return reference.routed_head_penalty(grad_qkv, weight, *kind)

        return formula_along_two(formula, given[:2], a, u)

    u, v, derivatives = (
        (ugrad_qkv, uweight),
        (vpenalty, vcosines),
        Derivatives(first, second, along_two),
    )
    return gradients("routed_head_penalty", ctx, _PLACES, derivatives, u, v)


_PLACES = Places(slice(0, 2), slice(4, 6), slice(6, 8))

_double_backward = Operator(
    routed_head_penalty_double_backward_operator,
    derivative=_double_backward_derivative,
    batch=batch_by_loop,
)
_backward = Operator(
    routed_head_penalty_backward_operator, derivative=_backward_derivative, batch=batch_by_loop
)
_forward = Operator(
    routed_head_penalty_operator,
    derivative=_forward_derivative,
    batch=batch_by_loop,
    save=save_statistics,
    results=2,
)
decomposes(routed_head_penalty_operator, reference.routed_head_penalty_forward)
