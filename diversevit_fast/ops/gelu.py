"""GELU, twice differentiable: schemas, fakes, and the forward, backward and double backward.

Saved for the backward passes: x and the cotangent. Equations (20)-(26) of ``kernels/README.md``.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import GeluBackward, GeluDoubleBackward, GeluKernels

from . import native, reference
from .autograd import Native, Operator, Orders, by_formula, natively, runs_eagerly, uses_formula
from .backends import kernels
from .checks import check_choice, check_tensor
from .library import operator
from .onnx import decomposes, exporting_to_onnx
from .third_order import Derivatives, Places, gradients


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
    if runs_eagerly():
        return _forward.eagerly(x, approximate)
    if exporting_to_onnx():
        return F.gelu(x, approximate=approximate)
    if uses_formula():
        return by_formula(reference.gelu, x, approximate)
    return _forward(x, approximate)


@operator("gelu")
def gelu_operator(x: Tensor, approximate: str) -> Tensor:
    """(20) or (23): ``y`` like x."""
    return kernels(GeluKernels, x).gelu_forward(x, approximate).contiguous()


@operator("gelu_backward")
def gelu_backward_operator(inputs: GeluBackward) -> Tensor:
    """(26): ``dx`` like x."""
    return kernels(GeluKernels, inputs.x).gelu_backward(inputs).contiguous()


@operator("gelu_double_backward")
def gelu_double_backward_operator(inputs: GeluDoubleBackward) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy`` like x."""
    gx, gdy = kernels(GeluKernels, inputs.x).gelu_double_backward(inputs)
    return gx.contiguous(), gdy.contiguous()


@gelu_operator.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@gelu_backward_operator.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@gelu_double_backward_operator.register_fake
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _forward_derivative(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return None, None
    return _backward(*ctx.saved_tensors, dy, *ctx.options), None


def _native_forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
    ctx.save_for_backward(x)
    ctx.options = (approximate,)
    ctx.set_materialize_grads(False)
    return native.gelu(x, approximate)


def _native_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None or not natively():
        return _forward_derivative(ctx, dy)
    (x,), (approximate,) = ctx.saved_tensors, ctx.options
    return native.gelu_backward(x, dy, approximate), None


def _backward_derivative(ctx: Any, ddx: Tensor | None) -> tuple[Any, ...]:
    if ddx is None:
        return None, None, None
    return *_double_backward(*ctx.saved_tensors, ddx, *ctx.options), None


def _double_backward_derivative(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Any, ...]:
    x, *_ = ctx.saved_tensors

    def first(dy: Tensor) -> tuple[Tensor]:
        return (_backward(x, dy, *ctx.options),)

    def second(dy: Any, dd: Any) -> tuple[Tensor, ...]:
        return _double_backward(x, *dy, *dd, *ctx.options)[:1]

    # elementwise, so that (52) is the product of (26) in another order
    return gradients("gelu", ctx, _PLACES, Derivatives(first, second, second), (u,), (v,))


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


_double_backward = Operator(
    gelu_double_backward_operator, derivative=_double_backward_derivative, batch=_batch_elementwise
)
_backward = Operator(
    gelu_backward_operator,
    derivative=_backward_derivative,
    batch=_batch_elementwise,
    native=Native(native.takes_gelu, native.gelu_backward),
)
_forward = Operator(
    gelu_operator,
    derivative=_forward_derivative,
    batch=_batch_elementwise,
    native=Native(native.takes_gelu, native.gelu, _native_forward, _native_backward),
)
again, backward_again = _forward.again, _backward.again
"""``again(node)()`` computes a recorded ``gelu`` again, ``backward_again(node)()`` a recorded ``gelu_backward``."""
ORDERS = Orders(_forward, _backward, _double_backward)
decomposes(gelu_operator, reference.gelu_forward)
