"""Tensors as arguments of kernels: which ones are taken, how they are passed, and where results are allocated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collector import Collector

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
allocator: Callable[..., Tensor] = torch.empty
"""The function that ``allocate`` calls: tests replace it by one that poisons and guards."""


def check_operand(name: str, x: Tensor) -> None:
    """Refuse what no kernel takes, in one line, before any launch.

    Raises:
        NotImplementedError: a dtype, device or layout without a kernel.
    """
    if x.dtype not in DTYPES:
        raise NotImplementedError(
            f"{name}: Triton kernels take float16, bfloat16, float32 or float64, not {x.dtype}"
        )
    if x.layout != torch.strided or x.is_nested:
        raise NotImplementedError(f"{name}: Triton kernels take strided tensors, not {x.layout}")


def reach(x: Tensor, first_axis: int = 0) -> int:
    """The largest offset that the axes from ``first_axis`` on can make."""
    farthest = 0
    for size, step in zip(x.shape[first_axis:], x.stride()[first_axis:], strict=True):
        farthest += (size - 1) * abs(step)
    return farthest


allocations = Collector[Tensor]()


def allocate(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised dense memory on the device of ``like``; a kernel must write all of it."""
    made = allocator(shape, dtype=dtype, device=like.device)
    allocations.note(made)
    return made


class Operand(NamedTuple):
    """A tensor [B, H, N, .] and its strides; in a kernel its ``ptr`` is a pointer."""

    ptr: Any
    sample: int
    head: int
    row: int
    col: int


def operand(x: Tensor | None) -> Operand | None:
    """A tensor with its strides; axes of size 1 get stride 0, so that masks broadcast."""
    if x is None:
        return None
    data = x.view(torch.uint8) if x.dtype == torch.bool else x
    return Operand(data, *[0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])


def empty_heads(like: Tensor) -> Tensor:
    """Uninitialised, shaped like ``like`` [B, H, N, .] and laid out as ``[B, N, H, .]``, what a projection reads."""
    B, H, N, width = like.shape
    return allocate((B, N, H, width), like.dtype, like).transpose(1, 2)
