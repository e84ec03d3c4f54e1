"""GELU on a CPU: forward, backward and double backward, equations (20)-(26) of kernels/README.md.

In float32 and bfloat16 a rung is one pass of a C++ kernel (``gelu_native``). In other dtypes, or where there is no
compiler, forward and backward are PyTorch's own kernels, and the double backward owns one chunk of elements at a time,
whose buffers are reused and stay in the cache: one fused pass for ``gdy``, and passes in place for the second
derivative.

Shapes   any; every tensor of a rung has the shape of x.
Dtypes   any floating; arithmetic in float32 (float64 for float64).
Traffic  the double backward reads x, dy, ddx and writes gx, gdy once each.
"""

import math

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.allocator import new_empty
from ..runtime.scratch import Scratch
from . import native

CHUNK_ELEMENTS = 1 << 17
"""Elements of a chunk per thread (512 KiB in float32): the fastest of 2^14 ... 2^19.

Measured at 32 x 197 x 384."""
FLAT_BEYOND = 40.0
"""|x| from which y'' is 0 in every dtype; clamping there keeps its powers of x finite."""

TANH_SCALE = math.sqrt(2 / math.pi)
"""k of (23)."""
TANH_CUBIC = 0.044715
"""c of (23)."""


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """(20) or (23): ``y`` like x, contiguous."""
    if native.runs(x):
        (y,) = native.call("forward", approximate, "y", x=x)
        return y
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=new_empty(x, *x.shape))


def gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """(26): ``dx`` like x, contiguous."""
    if native.runs(x):
        (dx,) = native.call("backward", approximate, "dx", x=x, dy=dy)
        return dx
    return torch.ops.aten.gelu_backward.grad_input(
        dy, x, approximate=approximate, grad_input=new_empty(x, *x.shape)
    )


def gelu_double_backward(
    x: Tensor, dy: Tensor, ddx: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy`` like x, contiguous."""
    if native.runs(x):
        gx, gdy = native.call("double_backward", approximate, "gx", "gdy", x=x, dy=dy, ddx=ddx)
        return gx, gdy
    xs, dys, a = (t.reshape(-1) for t in (x, dy, ddx))
    acc = accumulation_dtype(x.dtype)
    scratch = Scratch(acc, x.device)
    second = _second_tanh if approximate == "tanh" else _second_erf
    gx, gdy = (new_empty(x, *xs.shape) for _ in range(2))
    step = CHUNK_ELEMENTS * torch.get_num_threads()
    for start in range(0, len(xs), step):
        part = slice(start, start + step)
        torch.ops.aten.gelu_backward.grad_input(
            a[part], xs[part], approximate=approximate, grad_input=gdy[part]
        )
        xt = scratch.load("x", xs[part])
        size = torch.abs(xt, out=scratch.get("size", *xt.shape)).clamp_(max=FLAT_BEYOND)
        gxt = second(size, scratch).mul_(scratch.load("dy", dys[part]))
        torch.mul(gxt, scratch.load("ddx", a[part]), out=gx[part])
    return gx.view(x.shape), gdy.view(x.shape)


def _second_erf(size: Tensor, scratch: Scratch) -> Tensor:
    """(22) at ``size`` = |x|: phi(x) (2 - x^2)."""
    square = torch.mul(size, size, out=scratch.get("square", *size.shape))
    second = torch.mul(square, -0.5, out=scratch.get("second", *size.shape)).exp_()
    peak = 1 / math.sqrt(2 * math.pi)
    return second.mul_(square.mul_(-peak).add_(2 * peak))


def _second_tanh(size: Tensor, scratch: Scratch) -> Tensor:
    """(25) at ``size`` = |x|: (1 - T^2) (k (1 + 6 c x^2) - x T u'^2).

    With s = sigmoid(-2 |u|), faster than tanh: T = 1 - 2 s, and 1 - T^2 = 4 s (1 - s) does not cancel.
    """
    k, kc = TANH_SCALE, TANH_SCALE * TANH_CUBIC
    square = torch.mul(size, size, out=scratch.get("square", *size.shape))
    s = torch.mul(square, -2 * kc, out=scratch.get("sigmoid", *size.shape))
    s.sub_(2 * k).mul_(size).sigmoid_()
    bend = torch.mul(square, 3 * kc, out=scratch.get("bend", *size.shape)).add_(k).square_()
    bend.mul_(size).addcmul_(bend, s, value=-2)
    return square.mul_(24 * kc).add_(4 * k).sub_(bend, alpha=4).mul_(s.addcmul_(s, s, value=-1))
