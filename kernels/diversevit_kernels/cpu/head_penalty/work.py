"""The work of the penalties on a CPU, by the paths that ``plain`` and ``routed_dispatch`` take.

E is the width of a head's gradient, G the number of Gram matrices. A Gram matrix of C++ is computed in blocks of 4 x 4
heads on and below the diagonal, one of PyTorch whole. The H x H algebra of ``cosine`` are operators of PyTorch.
"""

import torch
from torch import Tensor

from ...common.contracts import (
    HeadPenaltyBackward,
    HeadPenaltyDoubleBackward,
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)
from ...common.dtypes import accumulation_dtype
from ...common.torch_internals import has_bfloat16_instructions
from ...common.work import GRAM_OPERATIONS, Work
from ..runtime.library_cache import enabled
from .cosine import TILE_ELEMENTS

_SIDE = 4  # heads of a block, ``gram_of`` of csrc/routed_head_penalty.cpp
_CHUNK_BYTES = 4 << 20  # of a chunk's u, the same
_CALLS = {"forward": 11, "backward": 12, "double_backward": 40}
"""Operators of PyTorch that a call runs on the Gram matrices, besides C++ or the products of a tile."""


def head_penalty_forward(grads: Tensor, granularity: str, reduction: str, eps: float) -> Work:
    """(30)-(32): G G^T."""
    return _plain(grads, granularity, 1, "forward")


def head_penalty_backward(inputs: HeadPenaltyBackward) -> Work:
    """(33)-(35): M G."""
    return _plain(inputs.grads, inputs.granularity, 1, "backward")


def head_penalty_double_backward(inputs: HeadPenaltyDoubleBackward) -> Work:
    """(36)-(39): ddG G^T, M ddG, M_dot G."""
    return _plain(inputs.grads, inputs.granularity, 3, "double_backward")


def routed_head_penalty_forward(
    grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
) -> Work:
    """(40)-(41): u = r W, and its Gram matrices."""
    routed, mixed, algebra = _sizes(grad_qkv, weight, granularity)
    H = grad_qkv.shape[3]
    native = _native(grad_qkv, weight)
    gram = mixed * _blocked(H) // H**2 if native else mixed
    element = accumulation_dtype(grad_qkv.dtype, weight.dtype).itemsize
    chunk = _CHUNK_BYTES if native else 2 * TILE_ELEMENTS * element
    return Work(
        products=routed + gram,
        elementwise=GRAM_OPERATIONS["forward"] * algebra,
        launches=_CALLS["forward"] + 1,
        workspace=chunk + weight.numel() * weight.itemsize + algebra * element,
    )


def routed_head_penalty_backward(inputs: RoutedHeadPenaltyBackward) -> Work:
    """(42): u again, du = M u, dr = du W^T, dW = r^T du; in bfloat16 du is two summands."""
    grad_qkv, weight = inputs.grad_qkv, inputs.weight
    routed, mixed, algebra = _sizes(grad_qkv, weight, inputs.granularity)
    native = _native(grad_qkv, weight)
    narrow = native and grad_qkv.itemsize == 2 and has_bfloat16_instructions()
    terms = 2 if narrow else 1
    wide = accumulation_dtype(grad_qkv.dtype, weight.dtype).itemsize
    chunk = (2 + terms) * _CHUNK_BYTES if native else 3 * TILE_ELEMENTS * wide
    weights = weight.numel() * (2 * weight.itemsize + 2 * wide)
    return Work(
        products=routed * (1 + 2 * terms) + mixed,
        elementwise=GRAM_OPERATIONS["backward"] * algebra,
        launches=_CALLS["backward"] + 1,
        workspace=chunk + weights + 2 * algebra * wide,
    )


def routed_head_penalty_double_backward(inputs: RoutedHeadPenaltyDoubleBackward) -> Work:
    """(43)-(45): u and ddu; K; M u, M ddu, M_dot u; gr and gW; more with both cotangents. A path of PyTorch alone."""
    grad_qkv, weight = inputs.grad_qkv, inputs.weight
    routed, mixed, algebra = _sizes(grad_qkv, weight, inputs.granularity)
    of_r, of_w = inputs.ddgrad_qkv is not None, inputs.ddweight is not None
    times = 1 + of_r + of_w + 2 + of_w + of_r
    wide = accumulation_dtype(grad_qkv.dtype, weight.dtype).itemsize
    return Work(
        products=routed * times + 4 * mixed,
        elementwise=GRAM_OPERATIONS["double_backward"] * algebra,
        launches=_CALLS["double_backward"],
        workspace=8 * TILE_ELEMENTS * wide + 3 * weight.numel() * wide,
    )


def _plain(grads: Tensor, granularity: str, products: int, order: str) -> Work:
    B, H, N, E = grads.shape
    algebra = (B * N if granularity == "token" else B) * H**2
    return Work(
        products=products * 2 * B * N * H**2 * E,
        elementwise=GRAM_OPERATIONS[order] * algebra,
        launches=_CALLS[order],
        workspace=2 * TILE_ELEMENTS * accumulation_dtype(grads.dtype).itemsize,
    )


def _sizes(grad_qkv: Tensor, weight: Tensor, granularity: str) -> tuple[int, int, int]:
    """FLOPs of r W for all heads, and of a product of all H x H matrices with u; elements of the Gram matrices."""
    B, N, _, H, d = grad_qkv.shape
    D = weight.shape[-1]
    algebra = (B * N if granularity == "token" else B) * H**2
    return 2 * B * N * H * 3 * d * D, 2 * B * N * H**2 * D, algebra


def _native(grad_qkv: Tensor, weight: Tensor) -> bool:
    """Whether C++ computes it, if there is a compiler, as ``routed_native.supports`` says."""
    known = (torch.float32, torch.float64, torch.bfloat16)
    return grad_qkv.dtype in known and grad_qkv.dtype == weight.dtype and enabled()


def _blocked(H: int) -> int:
    """Elements of a Gram matrix that C++ computes."""
    blocks = -(-H // _SIDE)
    return blocks * (blocks + 1) // 2 * _SIDE**2
