"""GELU in PyTorch: forward, backward and double backward, equations (20)-(26) of kernels/README.md.

Forward and backward are PyTorch's own kernels. The double backward goes through the elements chunk by chunk, so that
its buffers stay in the cache: PyTorch's backward gives ``gdy``, operators in place the second derivative.

Traffic   the double backward reads x, dy, ddx and writes gx, gdy once each.
"""

import math

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.allocator import new_empty
from ..runtime.scratch import Scratch

CHUNK_ELEMENTS = 1 << 17
"""Elements of a chunk per thread (512 KiB in float32): the fastest of 2^14 ... 2^19, measured at 32 x 197 x 384."""
FLAT_BEYOND = 40.0
"""|x| from which y'' is 0 in every dtype; clamping there keeps its powers of x finite."""

TANH_SCALE = math.sqrt(2 / math.pi)
"""kappa of (23)."""
TANH_CUBIC = 0.044715
"""c of (23)."""


def forward(x: Tensor, approximate: str) -> Tensor:
    """(20) or (23): ``y`` like x, contiguous."""
    return torch.ops.aten.gelu.out(x, approximate=approximate, out=new_empty(x, *x.shape))


def backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """(26): ``dx`` like x, contiguous."""
    return torch.ops.aten.gelu_backward.grad_input(
        dy, x, approximate=approximate, grad_input=new_empty(x, *x.shape)
    )


def double_backward(x: Tensor, dy: Tensor, ddx: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy`` like x, contiguous."""
    xs, dys, ddxs = (t.reshape(-1) for t in (x, dy, ddx))
    acc = accumulation_dtype(x.dtype)
    scratch = Scratch(acc, x.device)
    second = _second_tanh if approximate == "tanh" else _second_erf
    gx, gdy = (new_empty(x, *xs.shape) for _ in range(2))
    step = CHUNK_ELEMENTS * torch.get_num_threads()
    for start in range(0, len(xs), step):
        part = slice(start, start + step)
        torch.ops.aten.gelu_backward.grad_input(
            ddxs[part], xs[part], approximate=approximate, grad_input=gdy[part]
        )
        xt = scratch.load("x", xs[part])
        size = torch.abs(xt, out=scratch.get("size", *xt.shape)).clamp_(max=FLAT_BEYOND)
        gxt = second(size, scratch).mul_(scratch.load("dy", dys[part]))
        torch.mul(gxt, scratch.load("ddx", ddxs[part]), out=gx[part])
    return gx.view(x.shape), gdy.view(x.shape)


def _second_erf(size: Tensor, scratch: Scratch) -> Tensor:
    """(22): y'' = phi(x) (2 - x^2), from ``size`` = |x|."""
    square = torch.mul(size, size, out=scratch.get("square", *size.shape))
    second = torch.mul(square, -0.5, out=scratch.get("second", *size.shape)).exp_()
    peak = 1 / math.sqrt(2 * math.pi)
    return second.mul_(square.mul_(-peak).add_(2 * peak))


def _second_tanh(size: Tensor, scratch: Scratch) -> Tensor:
    """(25): y'' = (1 - T^2) (kappa (1 + 6 c x^2) - x T theta'^2), from ``size`` = |x|.

    With sigmoid = sigmoid(-2 |theta|), faster than tanh: T = 1 - 2 sigmoid, and 1 - T^2 = 4 sigmoid (1 - sigmoid) does
    not cancel.
    """
    k, kc = TANH_SCALE, TANH_SCALE * TANH_CUBIC
    square = torch.mul(size, size, out=scratch.get("square", *size.shape))
    sigmoid = torch.mul(square, -2 * kc, out=scratch.get("sigmoid", *size.shape))
    sigmoid.sub_(2 * k).mul_(size).sigmoid_()
    bend = torch.mul(square, 3 * kc, out=scratch.get("bend", *size.shape)).add_(k).square_()
    bend.mul_(size).addcmul_(bend, sigmoid, value=-2)
    return (
        square.mul_(24 * kc)
        .add_(4 * k)
        .sub_(bend, alpha=4)
        .mul_(sigmoid.addcmul_(sigmoid, sigmoid, value=-1))
    )
