"""The penalty on cosines between head gradients: schemas, fakes, and the forward, backward and double backward.

Saved for the backward passes: grads, cosines, norms and the cotangents. ``cosines`` and ``norms`` are constants of the
backward and of the double backward: the formulas account for both, so their gradients are None. Equations (30)-(39) of
``kernels/README.md``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import (
    HeadPenaltyBackward,
    HeadPenaltyDoubleBackward,
    HeadPenaltyKernels,
)

from ..errors import usage_error
from . import reference
from .autograd import Operator, batch_by_loop, by_formula, uses_formula
from .backends import kernels
from .checks import check_choice, check_tensor, shape_error
from .library import operator
from .onnx import decomposes, exporting_to_onnx
from .third_order import Derivatives, Places, formula_along_two, gradients

GRANULARITIES = ("token", "sample")
REDUCTIONS = ("all", "pairs")


def head_penalty(
    grads: Tensor,
    *,
    granularity: str = "token",
    reduction: str = "all",
    eps: float = 1e-12,
    return_cosines: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean squared cosine between the gradients of different heads, twice differentiable.

    0 where every two heads are orthogonal. Under autocast it is computed in the dtype given. Inside a
    forward-mode level and on the backend ``"reference"`` the plain formula is used: right to any order.

    Args:
        grads: ``[B, H, N, E]``, any strides.
        granularity: ``"token"`` (one Gram matrix per token, as in the paper) or ``"sample"`` (one per
            sample, over all its tokens and channels).
        reduction: divides a Gram matrix's sum of squares, its diagonal counted as zero, by H * H
            (``"all"``, as published) or by H * (H - 1) (``"pairs"``). Then the mean over samples and tokens.
        eps: gradient norms are clamped below at it, so a zero gradient has cosine 0 with every head.
        return_cosines: return the Gram matrices of cosines too; they are as differentiable.

    Returns:
        A scalar, float32 for half dtypes; with ``return_cosines`` also ``[B, N, H, H]`` by token or
        ``[B, H, H]`` by sample.

    Raises:
        UsageError: wrong shape, dtype or argument; one head with ``"pairs"``.
        UnsupportedError: a third derivative.

    Source: arXiv 2308.16274, the regulariser ("input gradients of the attention heads").
    """
    if has_torch_function((grads,)):
        return handle_torch_function(
            head_penalty,
            (grads,),
            grads,
            granularity=granularity,
            reduction=reduction,
            eps=eps,
            return_cosines=return_cosines,
        )
    check_tensor("grads", grads)
    if grads.ndim != 4 or grads.numel() == 0:
        raise shape_error("grads", "[B, H, N, E], none of them zero", grads, "check its axes")
    check_kind(granularity, reduction, eps, grads.shape[1], grads.dtype)
    if uses_formula() or exporting_to_onnx():
        penalty, cosines = by_formula(reference.head_penalty, grads, granularity, reduction, eps)
    else:
        penalty, cosines, *_ = _forward(grads, granularity, reduction, float(eps))
    return (penalty, cosines) if return_cosines else penalty


def check_kind(
    granularity: str, reduction: str, eps: float, heads: int, dtype: torch.dtype
) -> None:
    """The arguments that both penalties share.

    Raises:
        UsageError: an unknown choice, one head without pairs, or an ``eps`` whose square underflows.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "pairs" and heads == 1:
        raise usage_error("reduction", "'all' for one head", "'pairs'", "one head has no pairs")
    smallest = math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny)
    if not smallest <= eps < math.inf:
        raise usage_error("eps", f"a finite number of at least {smallest:.2g}", eps, "pass 1e-12")


def statistics_fake(like: Tensor, B: int, H: int, N: int, granularity: str) -> tuple[Tensor, ...]:
    """Penalty, cosines and norms without contents, typed like ``like``."""
    groups = (B, N) if granularity == "token" else (B,)
    return like.new_empty(()), like.new_empty(*groups, H, H), like.new_empty(*groups, H)


@operator("head_penalty")
def head_penalty_operator(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32): penalty, cosines, norms."""
    run = kernels(HeadPenaltyKernels, grads).head_penalty_forward
    return run(grads, granularity, reduction, eps)


@operator("head_penalty_backward")
def head_penalty_backward_operator(inputs: HeadPenaltyBackward) -> Tensor:
    """(33)-(35): ``dgrads``."""
    return kernels(HeadPenaltyKernels, inputs.grads).head_penalty_backward(inputs)


@operator("head_penalty_double_backward")
def head_penalty_double_backward_operator(
    inputs: HeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(36)-(39): ``ggrads``, ``gdpenalty``, ``gdcosines`` (no elements without the cotangent)."""
    return present(
        kernels(HeadPenaltyKernels, inputs.grads).head_penalty_double_backward(inputs),
        inputs.cosines,
    )


def present(results: tuple[Tensor | None, ...], like: Tensor) -> Any:
    """``results`` with tensors of no elements for those that are absent, as operators must return."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


@head_penalty_operator.register_fake
def _(grads, granularity, *_):
    B, H, N, _ = grads.shape
    like = grads.new_empty(0, dtype=torch.promote_types(grads.dtype, torch.float32))
    return statistics_fake(like, B, H, N, granularity)


def _grads_fake(grads: Tensor) -> Tensor:
    """``[B, H, N, E]`` stored as ``[B, N, H, E]``, the layout every backend returns."""
    return grads.transpose(1, 2).new_empty(grads.transpose(1, 2).shape).transpose(1, 2)


@head_penalty_backward_operator.register_fake
def _(grads, *_):
    return _grads_fake(grads)


@head_penalty_double_backward_operator.register_fake
def _(*inputs):
    x = HeadPenaltyDoubleBackward._make(inputs)
    return _grads_fake(x.grads), *cotangents_fake(x.cosines, x.dpenalty, x.dcosines)


def cotangents_fake(
    cosines: Tensor, dpenalty: Tensor | None, dcosines: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``gdpenalty`` and ``gdcosines`` without contents, no elements where there is no cotangent."""
    return (
        cosines.new_empty(0 if dpenalty is None else ()),
        cosines.new_empty(0 if dcosines is None else cosines.shape),
    )


def save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the forward's tensors, its cosines and its norms, of which the norms have no derivative."""
    *tensors, granularity, reduction, eps = inputs
    ctx.options = (granularity, reduction, eps)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _forward_derivative(
    ctx: Any, dpenalty: Tensor | None, dcosines: Tensor | None, *_: None
) -> tuple[Any, ...]:
    if dpenalty is None and dcosines is None:
        return (None,) * 4
    return _backward(*ctx.saved_tensors, dpenalty, dcosines, *ctx.options), None, None, None


def _backward_derivative(ctx: Any, ddgrads: Tensor | None) -> tuple[Any, ...]:
    if ddgrads is None:
        return (None,) * 8
    *_, dpenalty, dcosines = ctx.saved_tensors
    ggrads, gdpenalty, gdcosines = _double_backward(*ctx.saved_tensors, ddgrads, *ctx.options)
    given = (
        gdpenalty if dpenalty is not None else None,
        gdcosines if dcosines is not None else None,
    )
    return ggrads, None, None, *given, None, None, None


def _double_backward_derivative(
    ctx: Any, u: Tensor | None, vpenalty: Tensor | None, vcosines: Tensor | None
) -> tuple[Any, ...]:
    kind, given = ctx.options, ctx.saved_tensors[:3]

    def first(*dy: Tensor | None) -> tuple[Tensor]:
        return (_backward(*given, *dy, *kind),)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        return _double_backward(*given, *dy, *dd, *kind)[:1]

    def along_two(a: Any, u: Any) -> Any:
        return formula_along_two(lambda x: reference.head_penalty(x, *kind), given[:1], a, u)

    v, derivatives = (vpenalty, vcosines), Derivatives(first, second, along_two)
    return gradients("head_penalty", ctx, _PLACES, derivatives, (u,), v)


_PLACES = Places(slice(0, 1), slice(3, 5), slice(5, 6))

_double_backward = Operator(
    head_penalty_double_backward_operator,
    derivative=_double_backward_derivative,
    batch=batch_by_loop,
)
_backward = Operator(
    head_penalty_backward_operator, derivative=_backward_derivative, batch=batch_by_loop
)
_forward = Operator(
    head_penalty_operator,
    derivative=_forward_derivative,
    batch=batch_by_loop,
    save=save_statistics,
    results=2,
)
decomposes(head_penalty_operator, reference.head_penalty_forward)
