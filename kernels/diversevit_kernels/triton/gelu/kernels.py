"""GELU on a GPU: forward, backward and double backward, equations (20)-(26) of kernels/README.md.

Shapes   any; all tensors have the shape of x. Inputs have any strides, results are dense.
Dtypes   float16, bfloat16, float32, float64; arithmetic in float32 (float64 for float64).
Traffic  forward reads x, backward x and dy, double backward x, dy and ddx, each once; each result is written once.
tanh     of (23) only enters through e = exp(-2 |theta|) <= 1, which cannot overflow: (1 + T) / 2 is 1 / (1 + e) or
         e / (1 + e) by the sign of x, and 1 - T^2 = 4 e / (1 + e)^2 does not cancel.
Phi      of (20) likewise: of -|x|, where it does not cancel, and through exp(-x^2 / 2), which phi needs anyway.
Numbers  are written inside the functions: Triton compares globals that a kernel reads at every launch.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...common.contracts import GeluBackward, GeluDoubleBackward
from ..runtime.device import accumulator
from ..runtime.launch import run_kernel
from ..runtime.plan import LaunchTable, target_of
from ..runtime.sizes import cdiv
from ..runtime.strided import Elements, load_elements, merged_axes
from ..runtime.tensors import allocate, check_operand, reach
from . import configs


@triton.jit
def _size(x):
    """|x|, at most 40: there y' is 0 or 1 and y'' is 0 in every dtype, and powers are finite. NaN stays NaN."""
    return tl.minimum(tl.abs(x), 40.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(x, FACTOR: tl.constexpr):
    """exp(FACTOR x), in float32 a power of two, which is what a chip has."""
    if x.dtype == tl.float64:
        return tl.exp(FACTOR * x)
    else:
        return tl.exp2((FACTOR * 1.4426950408889634) * x)


@triton.jit
def _of_sign(x, value):
    """What is ``value`` at -|x|, and 1 - ``value`` at |x|: Phi, (1 + T) / 2 and y' are. NaN stays NaN."""
    return tl.where(x < 0, value, 1.0 - value)


@triton.jit
def _normal(a):
    """Phi(-a) and exp(-a^2 / 2), for a >= 0, with one exponential for both.

    In float32 the first is a polynomial times the second: see kernels/README.md.
    """
    e = _exp(a * a, -0.5)
    if a.dtype == tl.float64:
        return 0.5 - 0.5 * tl.math.erf(a * 0.7071067811865476), e
    else:
        t = 1.0 / (1.0 + 0.305 * a)
        ratio = 0.03663856041 * t - 0.1527448643
        ratio = ratio * t + 0.1853128912
        ratio = ratio * t - 0.03761887865
        ratio = ratio * t + 0.1208394806
        ratio = ratio * t + 0.1034739599
        ratio = ratio * t + 0.1224586403
        ratio = ratio * t + 0.1216402449
        return ratio * t * e, e


@triton.jit
def _decay(a):
    """exp(-2 |theta|) of (23) at x = a or -a."""
    KAPPA: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    return _exp((1.0 + 0.044715 * a * a) * a, -2.0 * KAPPA)


@triton.jit
def _value(x, TANH: tl.constexpr):
    """GELU of x: (20) or (23)."""
    if TANH:
        e = _decay(_size(x))
        return x * _of_sign(x, e / (1.0 + e))
    else:
        tail, _ = _normal(_size(x))
        return x * _of_sign(x, tail)


@triton.jit
def _derivatives(x, TANH: tl.constexpr):
    """The derivatives y' and y'' at x: (21), (22) or (24), (25)."""
    KAPPA: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    PEAK: tl.constexpr = 0.3989422804014327  # phi(0)
    a = _size(x)
    if TANH:
        e = _decay(a)
        inverse = 1.0 / (1.0 + e)
        tail = e * inverse  # (1 - |T|) / 2
        half = 2.0 * tail * inverse  # (1 - T^2) / 2
        cubic = 0.044715 * a * a
        slope = KAPPA * (1.0 + 3.0 * cubic)
        t = (1.0 - e) * inverse  # |T|
        first = tail - half * a * slope
        second = 2.0 * half * (KAPPA * (1.0 + 6.0 * cubic) - a * t * slope * slope)
    else:
        tail, e = _normal(a)
        density = PEAK * e
        first = tail - a * density
        second = density * (2.0 - a * a)
    return _of_sign(x, first), second


@triton.jit
def gelu_forward_kernel(
    x,  # Elements [n]
    y_ptr,  # [n], dense
    sizes,  # of the merged axes
    n,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GELU, (20) or (23). One program owns BLOCK elements."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    y = _value(load_elements(x, at, sizes, at < n).to(ACC), TANH)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def gelu_backward_kernel(
    x,  # Elements [n]
    dy,  # Elements [n]
    dx_ptr,  # [n], dense
    sizes,  # of the merged axes
    n,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward, (26): dx = dy y'. One program owns BLOCK elements."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    first, _ = _derivatives(load_elements(x, at, sizes, at < n).to(ACC), TANH)
    dx = load_elements(dy, at, sizes, at < n).to(ACC) * first
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def gelu_double_backward_kernel(
    x,  # Elements [n]
    dy,  # Elements [n]
    ddx,  # Elements [n]
    gx_ptr,  # [n], dense
    gdy_ptr,  # [n], dense
    sizes,  # of the merged axes
    n,
    TANH: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Double backward, (26): gx = ddx dy y'', gdy = ddx y'. One program owns BLOCK elements."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    first, second = _derivatives(load_elements(x, at, sizes, at < n).to(ACC), TANH)
    cotangent = load_elements(ddx, at, sizes, at < n).to(ACC)
    gx = cotangent * load_elements(dy, at, sizes, at < n).to(ACC) * second
    tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=at < n)
    tl.store(gdy_ptr + at, (cotangent * first).to(gdy_ptr.dtype.element_ty), mask=at < n)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """GELU, (20) or (23): ``y`` like x, contiguous."""
    return _elementwise(configs.FORWARD, gelu_forward_kernel, approximate, 1, x)[0]


def gelu_backward(inputs: GeluBackward) -> Tensor:
    """The gradient of x, (26): ``dx`` like x, contiguous."""
    x, dy, approximate = inputs
    return _elementwise(configs.BACKWARD, gelu_backward_kernel, approximate, 1, x, dy)[0]


def gelu_double_backward(inputs: GeluDoubleBackward) -> tuple[Tensor, Tensor]:
    """The gradients of the backward's inputs, (26): ``gx`` and ``gdy`` like x, contiguous."""
    x, dy, ddx, approximate = inputs
    table, kernel = configs.DOUBLE_BACKWARD, gelu_double_backward_kernel
    gx, gdy = _elementwise(table, kernel, approximate, 2, x, dy, ddx)
    return gx, gdy


def _elementwise(
    table: LaunchTable, kernel: Any, approximate: str, results: int, *tensors: Tensor
) -> list[Tensor]:
    """Run ``kernel`` on tensors of one shape: so many dense results like the first."""
    x = tensors[0]
    for t in tensors:
        check_operand("gelu", t)
    out = [allocate(tuple(x.shape), x.dtype, x) for _ in range(results)]
    if x.numel() == 0:
        return out
    sizes, strides = merged_axes(x.shape, *(t.stride() for t in tensors))
    farthest = max(x.numel(), *map(reach, tensors))
    run_kernel(
        table.plan(target_of(x)),
        kernel,
        lambda c: cdiv(x.numel(), c["BLOCK"]),
        *map(Elements, tensors, strides),
        *out,
        sizes,
        x.numel(),
        TANH=approximate == "tanh",
        ACC=accumulator(x.dtype),
        INDEX=tl.int32 if farthest < 2**30 else tl.int64,
    )
    return out
