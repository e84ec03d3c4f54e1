"""GELU by its definition: equations (20)-(26) of ``kernels/README.md``."""

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import GeluBackward, GeluDoubleBackward

TANH_SCALE = (2 / torch.pi) ** 0.5
"""kappa of (23)."""
TANH_CUBIC = 0.044715
"""c of (23)."""


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """(20), (23)  y = x Phi(x), or x (1 + T) / 2 with ``approximate="tanh"``."""
    wide = _wide(x)
    inner = _tanh_argument(wide).tanh() if approximate == "tanh" else torch.erf(wide / 2**0.5)
    return (0.5 * wide * (1 + inner)).to(x.dtype)


def gelu_derivatives(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(21)-(22), (24)-(25)  y' and y''."""
    if approximate == "tanh":
        k, c = TANH_SCALE, TANH_CUBIC
        t, slope = _tanh_argument(x).tanh(), k * (1 + 3 * c * x**2)
        first = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
        return first, (1 - t**2) * (k * (1 + 6 * c * x**2) - x * t * slope**2)
    density = (-0.5 * x**2).exp() / (2 * torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(x / 2**0.5)) + x * density, density * (2 - x**2)


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """(20), (23)  ``y`` like x."""
    return gelu(x, approximate)


def gelu_backward(inputs: GeluBackward) -> Tensor:
    """(26)  ``dx`` = dy y'."""
    x, dy, approximate = inputs
    return (dy * gelu_derivatives(_wide(x), approximate)[0]).to(x.dtype)


def gelu_double_backward(inputs: GeluDoubleBackward) -> tuple[Tensor, Tensor]:
    """(26)  Pull the cotangent ``ddx`` of dx back: ``gx`` = ddx dy y'', ``gdy`` = ddx y'."""
    x, dy, ddx, approximate = inputs
    first, second = gelu_derivatives(_wide(x), approximate)
    return (_wide(ddx) * dy * second).to(x.dtype), (ddx * first).to(x.dtype)


def _tanh_argument(x: Tensor) -> Tensor:
    """(23)  theta = kappa (x + c x^3)."""
    return TANH_SCALE * (x + TANH_CUBIC * x**3)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
