"""GELU, twice differentiable: schema, fakes and the ladder d0 -> d1 -> d2.

Saved for the backward passes: x and the cotangent. Equations (20)-(26) of ``kernels/README.md``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import reference
from .autograd import Rung, any_order, plainly
from .backends import launch
from .checks import check_choice, check_tensor
from .onnx import decomposes, exporting_to_onnx
from .third_order import Places, Stage, differentiated


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, exactly ``F.gelu``, twice differentiable and fused.

    Half types are computed in float32. Autocast leaves the dtype of x alone, as with PyTorch's own.
    Inside a forward-mode level (``torch.func.jvp``, ``forward_ad``) and on the backend ``"reference"`` the
    plain formula is used: right to any order, but not fused.

    Args:
        x: any shape.
        approximate: ``"none"`` (the error function) or ``"tanh"``.

    Returns:
        Shape and dtype of x, contiguous.

    Raises:
        UsageError: x is no dense floating tensor, or ``approximate`` is unknown.
        UnsupportedError: a third derivative.
    """
    if has_torch_function((x,)):
        return handle_torch_function(gelu, (x,), x, approximate=approximate)
    check_tensor("x", x)
    check_choice("approximate", approximate, ("none", "tanh"))
    if exporting_to_onnx():
        return F.gelu(x, approximate=approximate)
    if any_order():
        return plainly(reference.gelu, x, approximate)
    return _d0(x, approximate)


@torch.library.custom_op("diversevit::gelu", mutates_args=())
def gelu_operator(x: Tensor, approximate: str) -> Tensor:
    """d0, (20) or (23): ``y`` like x."""
    return launch("gelu", "forward", x, approximate).contiguous()


@torch.library.custom_op("diversevit::gelu_backward", mutates_args=())
def gelu_backward_operator(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """d1, (26): ``dx`` like x."""
    return launch("gelu", "backward", x, dy, approximate).contiguous()


@torch.library.custom_op("diversevit::gelu_double_backward", mutates_args=())
def gelu_double_backward_operator(
    x: Tensor, dy: Tensor, ddx: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """d2, (26): ``gx`` and ``gdy`` like x."""
    gx, gdy = launch("gelu", "double_backward", x, dy, ddx, approximate)
    return gx.contiguous(), gdy.contiguous()


@gelu_operator.register_fake
def _(x, approximate):
    return x.new_empty(x.shape)


@gelu_backward_operator.register_fake
def _(x, dy, approximate):
    return x.new_empty(x.shape)


@gelu_double_backward_operator.register_fake
def _(x, dy, ddx, approximate):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.approximate = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _d0_derivative(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None
    return _d1(*ctx.saved_tensors, dy, ctx.approximate), None


def _d1_derivative(ctx: Any, ddx: Tensor | None) -> tuple[Any, ...]:
    if ddx is None:
        return None, None, None
    return *_d2(*ctx.saved_tensors, ddx, ctx.approximate), None


def _d2_derivative(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    x = tensors[0]

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        return _d2(x, *dy, *dd, ctx.approximate)[:1]

    stage = Stage(
        first=lambda dy: (_d1(x, dy, ctx.approximate),),
        second=second,
        curvature=second,  # elementwise, so that (52) is the product of (26) in another order
    )
    return *differentiated("gelu", ctx, tensors, _PLACES, stage, (u,), (v,)), None


_PLACES = Places(slice(0, 1), slice(1, 2), slice(2, 3))


def _batch_elementwise(
    call: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The vmap rule: with the mapped axis in front everywhere, it is one more axis of elements."""

    def lift(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    result = call(*map(lift, args, in_dims))
    return result, (0,) * len(result) if isinstance(result, tuple) else 0


_d2 = Rung(
    gelu_double_backward_operator, save=_save, derivative=_d2_derivative, batch=_batch_elementwise
)
_d1 = Rung(gelu_backward_operator, save=_save, derivative=_d1_derivative, batch=_batch_elementwise)
_d0 = Rung(gelu_operator, save=_save, derivative=_d0_derivative, batch=_batch_elementwise)
decomposes(gelu_operator, reference.gelu_forward)
