"""Dropout in the attention kernels, (53)-(57): which probabilities are kept, the same in all orders and tiles.

Names    ``words``: two random numbers of 32 bits for each row. ``z``: a tile of Z, 0 or 1 / (1 − p). Both are None
         without dropout, and nothing is compiled for them.
Dtypes   unsigned integers of 32 bits, whose arithmetic wraps around.
Traffic  Philox is as much work for a row as the mixer is for ten elements. Row programs have few rows to a thread and
         write the words, 8 bytes a row, for column programs, which have many.
"""

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.dropout import threshold
from ..runtime.tensors import allocate


class Dropout(NamedTuple):
    """In Arguments: what decides on the probabilities that are kept, and their factor.

    Numbers are odd integers of 64 bits: Triton would compile anew for a multiple of 16, or for one of 32 bits.
    """

    seed: Any  # a pointer to an int64
    threshold: int  # 2⁴⁰ + 2 threshold + 1
    factor: int  # the bits of 1 / (1 − p) in float64; the last of them is set


def dropout_of(seed: Tensor | None, dropout_p: float) -> Dropout | None:
    """Dropout for Arguments; None without a seed."""
    if seed is None:
        return None
    (bits,) = struct.unpack("<q", struct.pack("<d", 1.0 / (1.0 - dropout_p)))
    return Dropout(seed, (1 << 40) + 2 * threshold(dropout_p) + 1, bits | 1)


def empty_words(q: Tensor, seed: Tensor | None) -> Tensor | None:
    """Uninitialised ``[B, H, 2, Nq]`` for the words of all rows; None without a seed."""
    B, H, Nq, _ = q.shape
    return None if seed is None else allocate((B, H, 2, Nq), torch.int32, q)


@triton.jit
def row_words(args, ptr, b, h, rows):
    """The words of ``rows``, (55), [M, 1] each; also written to ``ptr``, if there is one, for other programs.

    The second is multiplied by the mixer's last factor already, (x + c) f = x f + c f.
    """
    if args.dropout is None:
        return  # as in ``load_rows``
    else:
        row = ((b * args.H + h) * args.Nq + rows).to(tl.uint64)
        low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
        zero = tl.zeros_like(low)
        first, second, _, _ = tl.philox(tl.load(args.dropout.seed), low, high, zero, zero)
        second = _times(second, 0x735A2D97)
        if ptr is not None:
            at = ptr + 2 * (b * args.H + h) * args.Nq + rows
            tl.store(at, first.to(tl.int32, bitcast=True), mask=rows < args.Nq)
            tl.store(at + args.Nq, second.to(tl.int32, bitcast=True), mask=rows < args.Nq)
        return first[:, None], second[:, None]


@triton.jit
def load_words(ptr, args, b, h, rows, AXIS: tl.constexpr):
    """What ``row_words`` wrote, with a new axis AXIS: 1 for tiles [M, N], 0 for transposed ones."""
    if ptr is None:
        return
    else:
        at = ptr + 2 * (b * args.H + h) * args.Nq + rows
        first = tl.load(at, mask=rows < args.Nq, other=0).to(tl.uint32, bitcast=True)
        second = tl.load(at + args.Nq, mask=rows < args.Nq, other=0).to(tl.uint32, bitcast=True)
        return tl.expand_dims(first, AXIS), tl.expand_dims(second, AXIS)


@triton.jit
def factors(args, words, j, const: tl.constexpr):
    """The tile of Z, (54) and (56)-(57), for rows of ``words`` and keys ``j``, both broadcast."""
    if words is None:
        return
    else:
        x = _times(j.to(tl.uint32), 0x9E3779B9) + words[0]
        x ^= x >> 16
        x = _times(x, 0x21F0AAAD)
        x ^= x >> 15
        x = _times(x, 0x735A2D97) + words[1]
        x ^= x >> 15
        least = (args.dropout.threshold >> 1).to(tl.uint32)
        factor = args.dropout.factor.to(tl.float64, bitcast=True).to(const.ACC)
        return tl.where(x >= least, factor, 0.0)


@triton.jit
def _times(x, FACTOR: tl.constexpr):
    """x FACTOR, of which Triton's debug mode would check that it does not wrap around."""
    return tl.mul(x, FACTOR, sanitize_overflow=False)


@triton.jit
def dropped(x, z):
    """A tile times Z."""
    if z is None:
        return x
    else:
        return x * z
