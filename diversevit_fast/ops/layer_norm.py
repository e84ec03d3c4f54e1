"""LayerNorm, twice differentiable: schemas, fakes, and the forward, backward and double backward.

Saved for the backward passes: x, weight, mean, rstd and the cotangent. ``mean`` and ``rstd`` are constants of the
backward and of the double backward: the formulas account for both, so their gradients are None. Equations (10)-(19)
of ``kernels/README.md``.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from diversevit_kernels.common.contracts import (
    LayerNormBackward,
    LayerNormDoubleBackward,
    LayerNormKernels,
)

from ..errors import usage_error
from . import native, reference
from .autograd import (
    Native,
    Operator,
    Orders,
    batch_by_loop,
    by_formula,
    natively,
    runs_eagerly,
    uses_formula,
)
from .backends import kernels
from .checks import Passed, check_tensor, shape_error
from .library import operator
from .onnx import decomposes, exporting_to_onnx
from .third_order import Derivatives, Places, formula_along_two, gradients


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization, exactly ``F.layer_norm``, twice differentiable and fused.

    Statistics are kept in float32 (float64 for float64). Under autocast the result is float32 on a
    GPU and has the dtype of x on a CPU, as PyTorch's own. Inside a forward-mode level
    (``torch.func.jvp``, ``forward_ad``) and on the backend ``"reference"`` the plain formula is used:
    right to any order, but not fused.

    Args:
        x: ``[..., *normalized_shape]``.
        normalized_shape: sizes of the last axes, over which mean and variance are taken; an int is
            the size of the last one.
        weight: ``normalized_shape``, multiplies the normalized values; x's dtype, or float32 for a
            float16 or bfloat16 x.
        bias: ``normalized_shape``, is added; weight's dtype (x's without a weight).
        eps: added to the variance.

    Returns:
        Shape and dtype of x, contiguous.

    Raises:
        UsageError: wrong shapes, dtypes or devices.
        UnsupportedError: a third derivative.
    """
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(
            layer_norm,
            (x, weight, bias),
            x,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
        )
    eager = runs_eagerly()
    by_size = eager and type(normalized_shape) is int
    if by_size and _passed.find(normalized_shape, x, weight, bias):
        return _forward.eagerly(x, weight, bias, 1, float(eps))[0]
    check_tensor("x", x)
    shape = _normalized_shape(normalized_shape, x)
    cast = not x.is_cpu and torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type)
    if cast:
        x, weight, bias = map(_without_half, (x, weight, bias))
    if not _are_like(x, shape, weight, bias):
        _check_parameter("weight", weight, shape, x, half_as_float=True)
        _check_parameter("bias", bias, shape, x if weight is None else weight, half_as_float=False)
    if eager:
        if by_size and not cast and weight is not None and bias is not None:
            _passed.add(True, normalized_shape, x, weight, bias)
        return _forward.eagerly(x, weight, bias, len(shape), float(eps))[0]
    if exporting_to_onnx():
        return F.layer_norm(x, shape, weight, bias, eps)
    if uses_formula():
        return by_formula(reference.layer_norm, x, shape, weight, bias, eps)
    return _forward(x, weight, bias, len(shape), float(eps))[0]


_passed = Passed()


def _normalized_shape(normalized_shape: int | Sequence[int], x: Tensor) -> tuple[int, ...]:
    """Return the sizes as a tuple; they must be x's last ones."""
    if type(normalized_shape) is int and x.ndim and x.shape[-1] == normalized_shape:
        return (normalized_shape,)
    one = isinstance(normalized_shape, int)
    shape = (normalized_shape,) if one else normalized_shape
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape) or not shape:
        got = repr(normalized_shape)
        raise usage_error(
            "normalized_shape", "an int or a sequence of ints", got, "pass x.shape[-1]"
        )
    shape = tuple(shape)
    if len(shape) > x.ndim or tuple(x.shape[x.ndim - len(shape) :]) != shape:
        wanted = f"the last sizes of x, which has shape {list(x.shape)}"
        raise usage_error("normalized_shape", wanted, list(shape), "pass x.shape[-1]")
    return shape


def _are_like(x: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> bool:
    """Whether each is None or a tensor of ``shape`` in the dtype, on the device and in the layout of ``x``."""
    dtype, device, layout = x.dtype, x.device, x.layout
    for p in parameters:
        if p is not None and not (
            isinstance(p, Tensor)
            and not p.is_nested
            and p.dtype is dtype
            and p.shape == shape
            and p.device == device
            and p.layout is layout
        ):
            return False
    return True


def _check_parameter(
    name: str, p: Tensor | None, shape: tuple[int, ...], like: Tensor, *, half_as_float: bool
) -> None:
    """Check that ``p`` has ``shape``, the device of ``like``, and its dtype or one that may stand for it."""
    if p is None:
        return
    check_tensor(name, p)
    if tuple(p.shape) != shape:
        raise shape_error(
            name, f"{list(shape)}, normalized_shape", p, "pass one number per feature"
        )
    if p.device != like.device:
        raise usage_error(name, f"device {like.device} like x", p.device, "move one of them")
    allowed = [like.dtype]
    if half_as_float and like.dtype in (torch.float16, torch.bfloat16):
        allowed.append(torch.float32)
    if p.dtype not in allowed:
        wanted = "dtype " + " or ".join(map(str, allowed))
        raise usage_error(name, wanted, p.dtype, "cast it")


def _without_half(x: Any) -> Any:
    """Convert a half tensor to float32, as PyTorch does under autocast except on a CPU."""
    half = (torch.float16, torch.bfloat16)
    return x.float() if isinstance(x, Tensor) and x.dtype in half else x


@operator("layer_norm")
def layer_norm_operator(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y`` like x; ``mean`` and ``rstd`` [*lead] of the last ``axes`` axes."""
    run = kernels(LayerNormKernels, x).layer_norm_forward
    y, mean, rstd = run(x, weight, bias, axes, eps)
    return y.contiguous(), mean, rstd


@operator("layer_norm_backward")
def layer_norm_backward_operator(inputs: LayerNormBackward) -> tuple[Tensor, Tensor, Tensor]:
    """(14): ``dx``; ``dw`` and ``db`` (no elements unless asked for)."""
    dx, *grads = kernels(LayerNormKernels, inputs.x).layer_norm_backward(_of_rows(inputs))
    dw, db = (inputs.x.new_empty(0) if g is None else g for g in grads)
    return dx.contiguous(), dw, db


@operator("layer_norm_double_backward")
def layer_norm_double_backward_operator(
    inputs: LayerNormDoubleBackward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(15)-(19): ``gx``, ``gw``, ``gdy``.

    No elements where no cotangent can reach: ``gx`` without ``ddx`` and ``ddw``, ``gw`` without
    ``ddx`` or unless ``weight_grad``.
    """
    run = kernels(LayerNormKernels, inputs.x).layer_norm_double_backward
    gx, gw, gdy = run(_of_rows(inputs))
    gx = inputs.x.new_empty(0) if gx is None else gx.contiguous()
    return gx, inputs.x.new_empty(0) if gw is None else gw, gdy.contiguous()


Inputs = TypeVar("Inputs", LayerNormBackward, LayerNormDoubleBackward)


def _of_rows(inputs: Inputs) -> Inputs:
    """``inputs`` with ``mean`` and ``rstd`` [*lead]; PyTorch's forward gives them an axis of 1 per normalized one."""
    lead = inputs.x.shape[: inputs.x.ndim - inputs.axes]
    if inputs.mean.shape == lead:
        return inputs
    return inputs._replace(mean=inputs.mean.view(lead), rstd=inputs.rstd.view(lead))


@layer_norm_operator.register_fake
def _(x, weight, bias, axes, eps):
    lead, dtype = x.shape[: x.ndim - axes], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(lead, dtype=dtype), x.new_empty(lead, dtype=dtype)


@layer_norm_backward_operator.register_fake
def _(*inputs):
    given = LayerNormBackward._make(inputs)
    x, like = given.x, given.x if given.weight is None else given.weight
    shape, asked = x.shape[x.ndim - given.axes :], (given.weight_grad, given.bias_grad)
    return x.new_empty(x.shape), *(like.new_empty(shape) if g else x.new_empty(0) for g in asked)


@layer_norm_double_backward_operator.register_fake
def _(*inputs):
    given = LayerNormDoubleBackward._make(inputs)
    x, weight, ddx = given.x, given.weight, given.ddx
    gx = x.new_empty(0 if ddx is None and given.ddw is None else x.shape)
    if weight is None or ddx is None or not given.weight_grad:
        return gx, x.new_empty(0), x.new_empty(x.shape)
    return gx, weight.new_empty(weight.shape), x.new_empty(x.shape)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.axes, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _forward_derivative(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    weight_grad, bias_grad = ctx.needs_input_grad[1:3]
    dx, dw, db = _backward(*ctx.saved_tensors, dy, ctx.axes, weight_grad, bias_grad)
    return dx, dw if weight_grad else None, db if bias_grad else None, None, None


def _native_forward(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor]:
    y, mean, rstd = native.layer_norm(x, weight, bias, axes, eps)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.axes = axes
    ctx.set_materialize_grads(False)
    return (y,)


def _native_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None or not natively():
        return _forward_derivative(ctx, dy)
    x, weight, mean, rstd = ctx.saved_tensors
    _, weight_grad, bias_grad, *_ = ctx.needs_input_grad
    asked = ctx.axes, weight_grad, bias_grad
    return *native.layer_norm_gradients(x, weight, mean, rstd, dy, *asked), None, None


def _backward_derivative(
    ctx: Any, ddx: Tensor | None, ddw: Tensor | None, ddb: Tensor | None
) -> tuple[Any, ...]:
    axes, weight_grad, bias_grad = ctx.options
    ddw, ddb = ddw if weight_grad else None, ddb if bias_grad else None
    if ddx is None and ddw is None and ddb is None:
        return (None,) * 8
    weight_grad = ctx.needs_input_grad[1] and ddx is not None
    gx, gw, gdy = _double_backward(*ctx.saved_tensors, ddx, ddw, ddb, axes, weight_grad)
    gx = None if ddx is None and ddw is None else gx
    return gx, gw if weight_grad else None, None, None, gdy, None, None, None


def _double_backward_derivative(
    ctx: Any, ux: Tensor | None, uw: Tensor | None, v: Tensor | None
) -> tuple[Any, ...]:
    *given, _, _, ddw, ddb = ctx.saved_tensors
    x, weight, _, rstd = given
    axes, _ = ctx.options

    def first(dy: Tensor) -> Any:
        return _backward(*given, dy, axes, ddw is not None, ddb is not None)

    def second(dy: Any, dd: Any) -> tuple[Tensor | None, ...]:
        weight_grad = weight is not None and dd[0] is not None
        gx, gw, _ = _double_backward(*given, *dy, *dd, axes, weight_grad)
        return None if dd[0] is None and dd[1] is None else gx, gw if weight_grad else None

    def along_two(a: Any, u: Any) -> Any:
        eps = _eps_of(x, rstd, axes)

        def formula(x: Tensor, weight: Tensor | None) -> Tensor:
            return reference.layer_norm_forward(x, weight, None, axes, eps)[0]

        return formula_along_two(formula, (x, weight), a[:2], u[:2])

    u = (ux, uw, None)
    return gradients("layer_norm", ctx, _PLACES, Derivatives(first, second, along_two), u, (v,))


def _eps_of(x: Tensor, rstd: Tensor, axes: int) -> Any:
    """Recover the eps that was added to the variance, as a constant; only the forward is given it."""
    with torch.no_grad():
        square = rstd.reshape(*x.shape[: x.ndim - axes], *[1] * axes).square()
        wide = x.to(square.dtype)
        return 1 / square - wide.var(tuple(range(-axes, 0)), correction=0, keepdim=True)


_PLACES = Places(slice(0, 2), slice(4, 5), slice(5, 8))
_double_backward = Operator(
    layer_norm_double_backward_operator,
    derivative=_double_backward_derivative,
    batch=batch_by_loop,
)
_backward = Operator(
    layer_norm_backward_operator,
    derivative=_backward_derivative,
    batch=batch_by_loop,
    native=Native(native.takes_layer_norm_backward, native.layer_norm_backward),
)
_forward = Operator(
    layer_norm_operator,
    derivative=_forward_derivative,
    batch=batch_by_loop,
    save=_save_forward,
    results=1,
    native=Native(native.takes_layer_norm, native.layer_norm, _native_forward, _native_backward),
)
ORDERS = Orders(_forward, _backward, _double_backward)
decomposes(layer_norm_operator, reference.layer_norm_forward)
