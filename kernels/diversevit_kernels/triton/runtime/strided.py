"""Tensors of any strides read in row-major order, without a copy: axes are merged once, before a launch.

Elementwise and row kernels number elements (or rows) in row-major order and write dense results. Where a
tensor's axes do not lie behind each other, a kernel divides that number into positions along the axes
that are left after merging; a dense tensor has one axis and costs no division.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

Ints = tuple[int, ...]


class Elements(NamedTuple):
    """A tensor and the strides of its merged axes, innermost first; in a kernel its ``ptr`` is a pointer."""

    ptr: Any
    strides: Ints


def merged_axes(shape: Sequence[int], *strides: Sequence[int]) -> tuple[Ints, list[Ints]]:
    """The fewest axes, innermost first, through which every tensor steps with one stride per axis.

    Args:
        shape: common to all tensors.
        strides: of each tensor.

    Returns:
        The axes' sizes without the outermost one, which no kernel needs, and each tensor's strides.
    """
    axes: list[Ints] = []  # (size, stride of each tensor)
    for size, *steps in zip(*map(reversed, (shape, *strides)), strict=True):
        if size == 1:
            continue
        if axes and all(b == axes[-1][0] * a for a, b in zip(axes[-1][1:], steps, strict=True)):
            axes[-1] = (size * axes[-1][0], *axes[-1][1:])
        else:
            axes.append((size, *steps))
    sizes, *merged = zip(*axes or [(1, *(0 for _ in strides))], strict=True)
    return sizes[:-1], merged


@triton.jit
def offsets(index, sizes, strides):
    """Offsets of the elements numbered ``index`` in row-major order; ``sizes``, ``strides`` of ``merged_axes``."""
    at = tl.zeros_like(index)
    for axis in tl.static_range(len(sizes)):
        at += index % sizes[axis] * strides[axis]
        index = index // sizes[axis]
    return at + index * strides[len(sizes)]


@triton.jit
def load_elements(x, at, sizes, inside):
    """Load the elements numbered ``at`` of an ``Elements``, zero outside."""
    return tl.load(x.ptr + offsets(at, sizes, x.strides), mask=inside, other=0.0)
