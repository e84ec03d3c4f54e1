"""Dense copies of strided tensors, and constants, by a kernel: all that host code does is allocate and launch."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import run_kernel
from .plan import ANY_SIZE, ANY_WIDTH, EVERY_CHIP, INTERPRETER, LaunchTable, row, target_of
from .sizes import cdiv
from .strided import Elements, load_elements, merged_axes
from .tensors import allocate, reach

DENSE_COPY = LaunchTable(
    "dense_copy",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK=32),
    row(EVERY_CHIP, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK=1024),
)


@triton.jit
def dense_copy_kernel(
    x,  # Elements [n], or None: ``value`` everywhere
    y_ptr,  # [n], dense
    sizes,  # of the merged axes
    n,
    value,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy x, in row-major order. One program owns BLOCK elements."""
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    if x is None:
        y = tl.full([BLOCK], value, y_ptr.dtype.element_ty)
    else:
        y = load_elements(x, at, sizes, at < n).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=at < n)


def dense(x: Tensor | None) -> Tensor | None:
    """``x`` if it is dense, or a dense copy; None of None."""
    if x is None or x.is_contiguous():
        return x
    return write(allocate(tuple(x.shape), x.dtype, x), x)


def write(y: Tensor, x: Tensor | float) -> Tensor:
    """Write into all of a dense ``y`` a tensor that broadcasts to it, or a number; returns ``y``."""
    number = not isinstance(x, Tensor)
    wide = y if number else x.expand(y.shape)
    sizes, (strides,) = merged_axes(wide.shape, wide.stride())
    run_kernel(
        DENSE_COPY.plan(target_of(y)),
        dense_copy_kernel,
        lambda c: cdiv(y.numel(), c["BLOCK"]),
        None if number else Elements(wide, strides),
        y,
        sizes,
        y.numel(),
        float(x) if number else 0.0,
        INDEX=tl.int32 if max(y.numel(), reach(wide)) < 2**30 else tl.int64,
    )
    return y
