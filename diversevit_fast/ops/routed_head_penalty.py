"""The penalty of routed input gradients u_h = r_h W_h: schema, fakes and the ladder d0 -> d1 -> d2.

Saved for the backward passes: grad_qkv, weight, cosines, norms and the cotangents; nothing of
B H N D elements. ``cosines`` and ``norms`` are constants of a rung: the formulas account for both, so
their gradients are None. Equations (40)-(45) of ``kernels/README.md``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import usage_error
from . import reference
from .autograd import Rung, any_order, batch_by_loop, plainly
from .backends import launch
from .checks import check_alike, check_tensor, shape_error
from .head_penalty import check_kind, cotangents_fake, present, statistics_fake
from .onnx import decomposes, exporting_to_onnx
from .third_order import Places, Stage, differentiated, plain_curvature


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
    if any_order() or exporting_to_onnx():
        penalty, cosines = plainly(reference.routed_head_penalty, grad_qkv, weight_qkv, *kind)
    else:
        penalty, cosines, _ = _d0(grad_qkv, weight_qkv, *kind)
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


@torch.library.custom_op("diversevit::routed_head_penalty", mutates_args=())
def routed_head_penalty_operator(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d0, (40)-(41): penalty, cosines, norms."""
    return launch("routed_head_penalty", "forward", grad_qkv, weight, granularity, reduction, eps)


@torch.library.custom_op("diversevit::routed_head_penalty_backward", mutates_args=())
def routed_head_penalty_backward_operator(
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
    """d1, (42): ``dgrad_qkv`` and ``dweight``."""
    given = (grad_qkv, weight, cosines, norms, dpenalty, dcosines)
    return launch("routed_head_penalty", "backward", *given, granularity, reduction, eps)


@torch.library.custom_op("diversevit::routed_head_penalty_double_backward", mutates_args=())
def routed_head_penalty_double_backward_operator(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d2, (43)-(45): ``ggrad_qkv``, ``gweight``, and ``gdpenalty``, ``gdcosines`` or no elements."""
    given = (grad_qkv, weight, cosines, norms, dpenalty, dcosines, ddgrad_qkv, ddweight)
    kind = (granularity, reduction, eps)
    return present(launch("routed_head_penalty", "double_backward", *given, *kind), cosines)


@routed_head_penalty_operator.register_fake
def _(grad_qkv, weight, granularity, reduction, eps):
    B, N, _, H, _ = grad_qkv.shape
    dtype = torch.promote_types(torch.promote_types(grad_qkv.dtype, weight.dtype), torch.float32)
    return statistics_fake(grad_qkv.new_empty(0, dtype=dtype), B, H, N, granularity)


@routed_head_penalty_backward_operator.register_fake
def _(grad_qkv, weight, cosines, norms, dpenalty, dcosines, granularity, reduction, eps):
    return grad_qkv.new_empty(grad_qkv.shape), weight.new_empty(weight.shape)


@routed_head_penalty_double_backward_operator.register_fake
def _(
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
):
    grads = grad_qkv.new_empty(grad_qkv.shape), weight.new_empty(weight.shape)
    return *grads, *cotangents_fake(cosines, dpenalty, dcosines)


def _save_d0(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_qkv, weight, *ctx.kind = inputs
    ctx.save_for_backward(grad_qkv, weight, *output[1:])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _d0_derivative(
    ctx: Any, dpenalty: Tensor | None, dcosines: Tensor | None, _: None
) -> tuple[Any, ...]:
    if dpenalty is None and dcosines is None:
        return (None,) * 5
    return *_d1(*ctx.saved_tensors, dpenalty, dcosines, *ctx.kind), None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, granularity, reduction, eps = inputs
    ctx.kind = (granularity, reduction, eps)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _d1_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    if all(x is None for x in cotangents):
        return (None,) * 9
    *_, dpenalty, dcosines = ctx.saved_tensors
    *grads, gdpenalty, gdcosines = _d2(*ctx.saved_tensors, *cotangents, *ctx.kind)
    given = (
        gdpenalty if dpenalty is not None else None,
        gdcosines if dcosines is not None else None,
    )
    return *grads, None, None, *given, None, None, None


def _d2_derivative(
    ctx: Any,
    ugrad_qkv: Tensor | None,
    uweight: Tensor | None,
    vpenalty: Tensor | None,
    vcosines: Tensor | None,
) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grad_qkv, weight, cosines, norms, *_ = tensors
    kind, given = ctx.kind, (grad_qkv, weight, cosines, norms)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        return _d2(*given, *dy, *dd, *kind)[:2]

    def curvature(a: Any, u: Any) -> Any:
        def formula(grad_qkv: Tensor, weight: Tensor) -> Any:
            return reference.routed_head_penalty(grad_qkv, weight, *kind)

        return plain_curvature(formula, (grad_qkv, weight), a, u)

    stage = Stage(lambda *dy: _d1(*given, *dy, *kind), second, curvature)
    u, v = (ugrad_qkv, uweight), (vpenalty, vcosines)
    return (
        *differentiated("routed_head_penalty", ctx, tensors, _PLACES, stage, u, v),
        None,
        None,
        None,
    )


_PLACES = Places(slice(0, 2), slice(4, 6), slice(6, 8))

_d2 = Rung(
    routed_head_penalty_double_backward_operator,
    save=_save,
    derivative=_d2_derivative,
    batch=batch_by_loop,
)
_d1 = Rung(
    routed_head_penalty_backward_operator,
    save=_save,
    derivative=_d1_derivative,
    batch=batch_by_loop,
)
_d0 = Rung(
    routed_head_penalty_operator, save=_save_d0, derivative=_d0_derivative, batch=batch_by_loop
)
decomposes(routed_head_penalty_operator, reference.routed_head_penalty_forward)
