"""GELU on a CPU: forward, backward and double backward, equations (20)-(26) of kernels/README.md.

Forward and backward are PyTorch's own fused kernels. The double backward is one formula that Inductor compiles
(``inductor``). Where it is not compiled, it owns one chunk of elements at a time, whose buffers are reused and stay in
the cache: one fused pass for ``gdy``, and passes in place for the second derivative.

Shapes   any; every tensor of a rung has the shape of x.
Dtypes   any floating; arithmetic in float32 (float64 for float64).
Traffic  the double backward reads x, dy, ddx and writes gx, gdy once each.
"""

import math

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype
from .inductor import Formula, compiled_if_worth
from .scratch import Scratch

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
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=x.new_empty(x.shape))


def gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """(26): ``dx`` like x, contiguous."""
    return torch.ops.aten.gelu_backward.grad_input(
        dy, x, approximate=approximate, grad_input=x.new_empty(x.shape)
    )


def gelu_double_backward(
    x: Tensor, dy: Tensor, ddx: Tensor, approximate: str
) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy`` like x, contiguous."""
    xs, dys, a = (t.reshape(-1) for t in (x, dy, ddx))
    if run := compiled_if_worth(DOUBLE_BACKWARD[approximate], x.dtype, len(xs)):
        gx, gdy = run(xs, dys, a)
        return gx.view(x.shape), gdy.view(x.shape)
    acc = accumulation_dtype(x.dtype)
    scratch = Scratch(acc, x.device)
    second = _second_tanh if approximate == "tanh" else _second_erf
    gx, gdy = (x.new_empty(xs.shape) for _ in range(2))
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


def _formula_erf(x: Tensor, dy: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(21), (22), (26)."""
    wide, dy, a = (t.to(accumulation_dtype(x.dtype)) for t in (x, dy, a))
    near = wide.clamp(-FLAT_BEYOND, FLAT_BEYOND)
    density = torch.exp(-0.5 * near * near) * (1 / math.sqrt(2 * math.pi))
    first = 0.5 * (1 + torch.erf(near * math.sqrt(0.5))) + near * density
    gx, gdy = dy * a * density * (2 - near * near), a * first
    return gx.to(x.dtype), gdy.to(x.dtype)


def _formula_tanh(x: Tensor, dy: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(24)-(26). s = sigmoid(2 u) = (1 + T) / 2 and its complement do not cancel where |T| is 1."""
    wide, dy, a = (t.to(accumulation_dtype(x.dtype)) for t in (x, dy, a))
    near = wide.clamp(-FLAT_BEYOND, FLAT_BEYOND)
    square = near * near
    u = TANH_SCALE * near * (1 + TANH_CUBIC * square)
    slope = TANH_SCALE * (1 + 3 * TANH_CUBIC * square)
    s, rest = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
    bent = 2 * TANH_SCALE * (1 + 6 * TANH_CUBIC * square) - 2 * near * (s - rest) * slope * slope
    first = s * (1 + 2 * near * rest * slope)
    gx, gdy = dy * a * (2 * s * rest) * bent, a * first
    return gx.to(x.dtype), gdy.to(x.dtype)


def _examples(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.ones(40, dtype=dtype) for _ in range(3))


DOUBLE_BACKWARD = {
    "none": Formula("gelu_double_backward", _formula_erf, _examples, 3 * (("elements",),)),
    "tanh": Formula("gelu_tanh_double_backward", _formula_tanh, _examples, 3 * (("elements",),)),
}
