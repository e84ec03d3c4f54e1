"""Launch configurations: one table keyed by kernel, architecture, element size and width.

Nothing else in this package looks at the device or at the environment. The first row that matches is
taken; each row is justified by ``python -m tools.kernel_analysis.compile_report`` (no spill in a main loop, at most
64 bytes of stack, shared memory within the chip's limit) and Hopper's rows for attention up to width 128 and for the
routed penalty by an H200 besides: there tiles of 64 rows on 4 warps, one warpgroup, took half of the time that
they took on 8 and less. ``SPILLING`` lists what spills and was the fastest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.environment import switch

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""

_autotune = switch("DIVERSEVIT_AUTOTUNE", default=False)
_pretended: str | None = None


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched: its tile sizes (constexpr arguments of the kernel), warps, stages."""

    tiles: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    def __getitem__(self, tile: str) -> int:
        return dict(self.tiles)[tile]


@dataclass(frozen=True)
class _Row:
    kernel: str
    architectures: tuple[str, ...]  # beginnings of names; empty: every architecture
    itemsize: tuple[int, ...]  # bytes of an element; empty: every size
    width: int | None  # the largest width it serves; None: every width
    above: int  # it serves widths above this one only
    configuration: Configuration

    def serves(self, kernel: str, architecture: str, itemsize: int, width: int) -> bool:
        return (
            self.kernel == kernel
            and (not self.architectures or architecture.startswith(self.architectures))
            and (not self.itemsize or itemsize in self.itemsize)
            and (self.width is None or width <= self.width)
            and width > self.above
        )


def _row(
    kernel: str,
    architectures: tuple[str, ...] = (),
    itemsize: tuple[int, ...] = (),
    width: int | None = None,
    *,
    above: int = 0,
    warps: int,
    stages: int,
    **tiles: int,
) -> _Row:
    configuration = Configuration(tuple(tiles.items()), warps, stages)
    return _Row(kernel, architectures, itemsize, width, above, configuration)


_INTERPRETER = ("interpreter",)
_NVIDIA, _AMPERE, _HOPPER, _BLACKWELL, _NEWER = (
    ("sm_",),
    ("sm_8",),
    ("sm_9",),
    ("sm_10",),
    ("sm_9", "sm_10"),
)
_WITHOUT_WARPGROUPS = (*_AMPERE, "sm_12")
"""NVIDIA chips whose matrix instructions are of one warp."""
_HALF, _SINGLE = (2,), (4,)
# fmt: off
_TABLE: tuple[_Row, ...] = (
    # attention; "_whole": a row tile holds all keys, up to BLOCK_N (ROW_KEYS) of them
    *(_row(f"attention_{name}", _INTERPRETER, warps=4, stages=1, BLOCK_M=rows, BLOCK_N=keys)
      for name, rows, keys in (
          ("forward", 16, 16), ("forward_few", 16, 16), ("mask_gradient", 16, 16), ("backward_few", 16, 16),
          ("backward_rows_whole", 16, 32), ("backward_rows", 16, 16), ("backward_columns", 16, 32),
          ("double_backward_few", 16, 16), ("double_backward_rows_whole", 16, 32),
          ("double_backward_rows", 32, 16), ("double_backward_columns", 16, 32))),
    *(_row(f"attention_double_backward_{name}", _INTERPRETER, warps=4, stages=1,
           ROW_TILE=16, ROW_KEYS=keys, BLOCK_M=16, BLOCK_N=16)
      for name, keys in (("head_whole", 32), ("head", 16))),
    _row("attention_forward", _HOPPER, _HALF, 64, warps=4, stages=3, BLOCK_M=64, BLOCK_N=64),
    _row("attention_forward", _HOPPER, _HALF, 128, warps=4, stages=3, BLOCK_M=64, BLOCK_N=32),
    _row("attention_forward", _BLACKWELL, _HALF, 64, warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    _row("attention_forward", _BLACKWELL, _HALF, 112, warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
    _row("attention_forward", _AMPERE, _HALF, 112, above=96, warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    _row("attention_forward", _NVIDIA, _HALF, 128, warps=8, stages=3, BLOCK_M=128, BLOCK_N=64),
    _row("attention_forward", _HOPPER, _HALF, 256, warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    _row("attention_forward", _BLACKWELL, _HALF, 256, warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
    _row("attention_forward", _NVIDIA, _HALF, 256, warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_forward", _HOPPER, _SINGLE, 64, warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_forward", _NEWER, _SINGLE, 256, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_forward", _AMPERE, _SINGLE, 96, warps=8, stages=1, BLOCK_M=64, BLOCK_N=16),
    _row("attention_forward", _NVIDIA, _SINGLE, 128, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_forward", (), (), 256, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_forward_few", _NVIDIA, _HALF, 256, warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    _row("attention_forward_few", _NVIDIA, _SINGLE, 64, warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    _row("attention_forward_few", (), (), 256, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_mask_gradient", _NEWER, _HALF, 256, warps=8, stages=1, BLOCK_M=64, BLOCK_N=64),
    _row("attention_mask_gradient", _AMPERE, _HALF, 128, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_mask_gradient", _NVIDIA, _HALF, 64, warps=8, stages=1, BLOCK_M=64, BLOCK_N=64),
    _row("attention_mask_gradient", _NVIDIA, _HALF, 128, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_mask_gradient", _NVIDIA, _SINGLE, 128, warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    _row("attention_mask_gradient", (), (), 256, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_backward_few", _NVIDIA, _HALF, 256, warps=4, stages=2, BLOCK_M=16, BLOCK_N=32),
    _row("attention_backward_few", _NVIDIA, _SINGLE, 112, warps=4, stages=2, BLOCK_M=16, BLOCK_N=32),
    _row("attention_backward_few", (), (), 256, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_backward_rows_whole", _BLACKWELL, _HALF, 64, warps=8, stages=1, BLOCK_M=64, BLOCK_N=256),
    _row("attention_backward_rows_whole", _WITHOUT_WARPGROUPS, _HALF, 64, above=32,
         warps=8, stages=1, BLOCK_M=32, BLOCK_N=256),
    _row("attention_backward_rows", _HOPPER, _HALF, 64, warps=4, stages=3, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _HOPPER, _HALF, 96, warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _HOPPER, _HALF, 128, above=112, warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _NEWER, _HALF, 112, above=96, warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    _row("attention_backward_rows", _NEWER, _HALF, 128, warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    _row("attention_backward_rows", _NVIDIA, _HALF, 64, warps=8, stages=1, BLOCK_M=128, BLOCK_N=64),
    _row("attention_backward_rows", _AMPERE, _HALF, 112, warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _NVIDIA, _HALF, 128, warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    _row("attention_backward_rows", _NVIDIA, _HALF, 256, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _HOPPER, _SINGLE, 64, warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", _AMPERE, _SINGLE, 96, warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    _row("attention_backward_rows", _NVIDIA, _SINGLE, 128, warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_backward_rows", (), (), 256, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_backward_columns", _HOPPER, _HALF, 64, warps=4, stages=2, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _NVIDIA, _HALF, 64, warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    _row("attention_backward_columns", _AMPERE, _HALF, 96, warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    _row("attention_backward_columns", _AMPERE, _HALF, 112, warps=8, stages=2, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _HOPPER, _HALF, 112, above=96, warps=8, stages=2, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _HOPPER, _HALF, 128, warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    _row("attention_backward_columns", _BLACKWELL, _HALF, 128, warps=8, stages=1, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _NVIDIA, _HALF, 128, warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    _row("attention_backward_columns", _NVIDIA, _HALF, 256, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_backward_columns", _HOPPER, _SINGLE, 64, warps=4, stages=1, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _AMPERE, _SINGLE, 96, above=64, warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    _row("attention_backward_columns", _HOPPER, _SINGLE, 96, above=64, warps=4, stages=1, BLOCK_M=16, BLOCK_N=64),
    _row("attention_backward_columns", _BLACKWELL, _SINGLE, 96, above=64, warps=8, stages=1, BLOCK_M=32, BLOCK_N=64),
    _row("attention_backward_columns", _NVIDIA, _SINGLE, 128, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_backward_columns", (), (), 256, warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_double_backward_few", _NVIDIA, _HALF, 64, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_double_backward_few", _NVIDIA, (), 128, warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_double_backward_few", (), (), 256, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_rows_whole", _BLACKWELL, _HALF, 64, warps=8, stages=1, BLOCK_M=64, BLOCK_N=128),
    _row("attention_double_backward_rows_whole", _WITHOUT_WARPGROUPS, _HALF, 64,
         warps=8, stages=1, BLOCK_M=32, BLOCK_N=128),
    _row("attention_double_backward_rows", _HOPPER, _HALF, 64, warps=4, stages=3, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _BLACKWELL, _HALF, 64, warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_double_backward_rows", _AMPERE, _HALF, 64, warps=8, stages=1, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _AMPERE, _HALF, 96, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_double_backward_rows", _AMPERE, _HALF, 112, warps=8, stages=1, BLOCK_M=32, BLOCK_N=16),
    _row("attention_double_backward_rows", _NVIDIA, _HALF, 64, warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _BLACKWELL, _HALF, 128, warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _HOPPER, _HALF, 96, warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    _row("attention_double_backward_rows", _HOPPER, _HALF, 128, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_double_backward_rows", _NVIDIA, _HALF, 128, warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _AMPERE, _SINGLE, 32, warps=2, stages=1, BLOCK_M=32, BLOCK_N=16),
    _row("attention_double_backward_rows", _AMPERE, _SINGLE, 88, above=80, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_rows", _AMPERE, _SINGLE, 96, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    _row("attention_double_backward_rows", _AMPERE, _SINGLE, 128, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_rows", _HOPPER, _SINGLE, 64, warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_double_backward_rows", _NEWER, _SINGLE, 32, warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    _row("attention_double_backward_rows", _BLACKWELL, _SINGLE, 64, warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    _row("attention_double_backward_rows", _NVIDIA, _SINGLE, 64, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_double_backward_rows", _NEWER, _SINGLE, 96, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_rows", _NVIDIA, _SINGLE, 128, warps=8, stages=1, BLOCK_M=32, BLOCK_N=16),
    _row("attention_double_backward_rows", (), (), 256, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_columns", _HOPPER, _HALF, 64, warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _HOPPER, _HALF, 128, warps=4, stages=1, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _NVIDIA, _HALF, 64, warps=8, stages=2, BLOCK_M=16, BLOCK_N=128),
    _row("attention_double_backward_columns", _AMPERE, _HALF, 96, warps=8, stages=2,
         BLOCK_M=16, BLOCK_N=128),
    _row("attention_double_backward_columns", _NVIDIA, _HALF, 128, warps=8, stages=2, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _AMPERE, _SINGLE, 32, warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _AMPERE, _SINGLE, 64, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_double_backward_columns", _AMPERE, _SINGLE, 96, warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    _row("attention_double_backward_columns", _AMPERE, _SINGLE, 128, warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _HOPPER, _SINGLE, 64, warps=8, stages=1, BLOCK_M=16, BLOCK_N=128),
    _row("attention_double_backward_columns", _HOPPER, _SINGLE, 96, above=64, warps=4, stages=1,
         BLOCK_M=32, BLOCK_N=16),
    _row("attention_double_backward_columns", _HOPPER, _SINGLE, 128, above=96, warps=8, stages=1,
         BLOCK_M=32, BLOCK_N=32),
    _row("attention_double_backward_columns", _NEWER, _SINGLE, 128, warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    _row("attention_double_backward_columns", _NVIDIA, _SINGLE, 128, warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    _row("attention_double_backward_columns", (), (), 256, warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    _row("attention_double_backward_head", _BLACKWELL, _HALF, 64, warps=8, stages=1,
         ROW_TILE=64, ROW_KEYS=32, BLOCK_M=16, BLOCK_N=128),
    _row("attention_double_backward_head", _WITHOUT_WARPGROUPS, _HALF, 64, warps=8, stages=2,
         ROW_TILE=64, ROW_KEYS=16, BLOCK_M=16, BLOCK_N=64),
    # layer norm: tiles of whole rows, about TILE elements
    _row("layer_norm_forward", _INTERPRETER, warps=4, stages=1, TILE=64),
    _row("layer_norm_backward", _INTERPRETER, warps=4, stages=1, TILE=64),
    _row("layer_norm_double_backward", _INTERPRETER, warps=4, stages=1, TILE=64),
    _row("layer_norm_sums", _INTERPRETER, warps=1, stages=1, BLOCK_P=2, BLOCK_N=16),
    *(_row("layer_norm_forward", width=width, warps=warps, stages=1, TILE=tile)
      for width, warps, tile in ((2048, 4, 2048), (4096, 8, 4096), (8192, 16, 8192))),
    *(_row(kernel, width=width, warps=warps, stages=1, TILE=tile)
      for kernel in ("layer_norm_backward", "layer_norm_double_backward")
      for width, warps, tile in ((1024, 8, 2048), (2048, 16, 2048), (4096, 16, 4096), (8192, 16, 8192))),
    _row("layer_norm_sums", warps=4, stages=1, BLOCK_P=32, BLOCK_N=32),
    # gelu
    *(_row(f"gelu_{rung}", _INTERPRETER, warps=4, stages=1, BLOCK=32)
      for rung in ("forward", "backward", "double_backward")),
    *(_row(f"gelu_{rung}", warps=4, stages=1, BLOCK=1024)
      for rung in ("forward", "backward", "double_backward")),
    # head penalty; width: heads, padded; "_span": no kernel, but elements of a part of a sample
    _row("head_penalty_span", _INTERPRETER, warps=1, stages=1, SPAN=32),
    _row("head_penalty_statistics", _INTERPRETER, warps=1, stages=1, BLOCK_K=16, BLOCK_P=2),
    _row("head_penalty_curvature", _INTERPRETER, warps=1, stages=1, BLOCK_P=2),
    *(_row(f"head_penalty_{name}", _INTERPRETER, warps=1, stages=1, BLOCK_K=16)
      for name in ("products", "backward", "double_backward")),
    _row("head_penalty_span", warps=1, stages=1, SPAN=8192),
    *(_row("head_penalty_statistics", width=heads, warps=warps, stages=2, BLOCK_K=64, BLOCK_P=parts)
      for heads, warps, parts in ((16, 1, 4), (32, 2, 2), (64, 4, 1))),
    *(_row("head_penalty_curvature", width=heads, warps=warps, stages=1, BLOCK_P=parts)
      for heads, warps, parts in ((16, 2, 4), (32, 4, 2), (64, 8, 1))),
    *(_row("head_penalty_products", width=heads, warps=warps, stages=2, BLOCK_K=block)
      for heads, warps, block in ((16, 1, 64), (32, 2, 64), (64, 4, 32))),
    *(_row("head_penalty_backward", width=heads, warps=warps, stages=2, BLOCK_K=block)
      for heads, warps, block in ((16, 2, 64), (32, 4, 64), (64, 8, 32))),
    *(_row("head_penalty_double_backward", (), (4,), heads, warps=warps, stages=2, BLOCK_K=block)
      for heads, warps, block in ((16, 2, 64), (32, 4, 32), (64, 8, 16))),
    *(_row("head_penalty_double_backward", width=heads, warps=warps, stages=2, BLOCK_K=block)
      for heads, warps, block in ((16, 2, 64), (32, 4, 64), (64, 8, 32))),
    # routed head penalty; width: of a head
    *(_row(f"routed_penalty_{name}", _INTERPRETER, warps=4, stages=1, BLOCK_T=16, BLOCK_J=16, BLOCK_E=16)
      for name in ("route", "route_back", "weight")),
    _row("routed_penalty_route", ("gfx",), (2,), warps=4, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    _row("routed_penalty_route", (*_AMPERE, *_HOPPER), (2,), 112, above=80, warps=8, stages=3,
         BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    _row("routed_penalty_route", (), (2,), warps=4, stages=3, BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    _row("routed_penalty_route", _AMPERE, (4,), 112, above=80, warps=8, stages=2, BLOCK_T=32, BLOCK_J=32, BLOCK_E=64),
    _row("routed_penalty_route", _HOPPER, (4,), warps=4, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    _row("routed_penalty_route", warps=8, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    _row("routed_penalty_route_back", _AMPERE, (4,), 112, above=80, warps=8, stages=1,
         BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    _row("routed_penalty_route_back", _HOPPER, (4,), warps=4, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    _row("routed_penalty_route_back", warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    _row("routed_penalty_weight", _HOPPER, (4,), warps=4, stages=1, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
    _row("routed_penalty_weight", warps=8, stages=2, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
)
# fmt: on


SPILLING = {
    # 0.5 ms against 1.1; spills with four query heads to a key head
    ("attention_backward_columns", "sm_90", 4): 64,
    # 1.3 ms against 3.9
    ("attention_double_backward_rows", "sm_90", 4): 64,
    # 1.2 ms against 2.9; as the first
    ("attention_double_backward_columns", "sm_90", 4): 64,
    # 0.9 ms against 1.4; spills under Triton 3.8, did not under 3.6
    ("attention_double_backward_columns", "sm_90", 2): 128,
}
"""(kernel, architecture, itemsize) -> widths up to this, where a configuration that spills was measured to be
faster than those without: on an H200, 197 tokens, 64 x 12 heads of width 64 or 64 x 6 of 128."""


def _properties(device: torch.device) -> Any:
    """What torch.cuda says of a device, asked once: launches look it up."""
    return _properties_of(torch.cuda.current_device() if device.index is None else device.index)


_properties_of = cache(torch.cuda.get_device_properties)


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ``xpu`` or ``interpreter``."""
    if _pretended is not None:
        return _pretended
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return device.type
    properties = _properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextmanager
def pretend(name: str) -> Iterator[None]:
    """Inside the block every device is of architecture ``name``: for ahead-of-time compilation."""
    global _pretended
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


def _find(kernel: str, like: Tensor, width: int) -> Configuration | None:
    return _first_row(kernel, architecture(like.device), like.dtype.itemsize, width)


@cache
def _first_row(kernel: str, architecture: str, itemsize: int, width: int) -> Configuration | None:
    rows = (row for row in _TABLE if row.serves(kernel, architecture, itemsize, width))
    return next((row.configuration for row in rows), None)


def configuration(kernel: str, like: Tensor, width: int) -> Configuration:
    """The table's first row for ``kernel`` on the device and dtype of ``like``, at this width.

    Raises:
        NotImplementedError: no row serves it.
    """
    found = _find(kernel, like, width)
    if found is None:
        raise NotImplementedError(
            f"{kernel}: no launch configuration for width {width}, {like.dtype}, "
            f"on {architecture(like.device)}"
        )
    return found


def candidates(kernel: str, like: Tensor, width: int) -> list[Configuration]:
    """What autotuning tries: every row of ``kernel``, whatever it was made for, at 4 and 8 warps, 1 to 3 stages.

    The table's own choice comes first, so that it wins ties.
    """
    rows = [row for row in _TABLE if row.kernel == kernel and row.architectures != _INTERPRETER]
    tried = [
        Configuration(row.configuration.tiles, warps, stages)
        for row in rows
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]
    return list(dict.fromkeys([configuration(kernel, like, width), *tried]))


def autotuning() -> bool:
    """Whether each kind of launch first times its candidates: ``DIVERSEVIT_AUTOTUNE=1`` or ``autotune()``."""
    return _autotune and not INTERPRETED and _pretended is None


@contextmanager
def autotune(enabled: bool = True) -> Iterator[None]:
    """Inside the block autotuning is on (or off), whatever the environment says."""
    global _autotune
    before, _autotune = _autotune, enabled
    try:
        yield
    finally:
        _autotune = before


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have on ``device``."""
    properties = _properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def has_configuration(kernel: str, like: Tensor, width: int) -> bool:
    """Whether the table has a row for ``kernel``."""
    return _find(kernel, like, width) is not None


def fits(kernel: str, like: Tensor, width: int, tile: str, n: int) -> bool:
    """Whether the table has a row for ``kernel``, and its tile ``tile`` holds ``n``."""
    found = _find(kernel, like, width)
    return found is not None and n <= found[tile]


_MULTIPROCESSORS = {
    **{"interpreter": 2, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148},
    **{"sm_120": 170, "gfx942": 304},
}
"""Of the largest chip of an architecture: A100, A40, L40S, H100, B200, RTX 5090, MI300X (vendors' data sheets)."""


def multiprocessors(like: Tensor) -> int | None:
    """Of the device of ``like``; None if unknown."""
    if _pretended is None and not INTERPRETED and like.device.type == "cuda":
        return _properties(like.device).multi_processor_count
    return _MULTIPROCESSORS.get(architecture(like.device))


def fills(like: Tensor, programs: int) -> bool:
    """Whether ``programs`` keep every multiprocessor of the device busy twice over."""
    count = multiprocessors(like)
    return count is not None and programs >= 2 * count


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype of statistics, sums and accumulators: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(like: Tensor, on_hopper: str = "tf32x3") -> str:
    """``input_precision`` of ``tl.dot``: float32 products follow torch's matmul precision on NVIDIA.

    "highest" is three TF32 products (float32's accuracy on tensor cores), "high" and "medium" one.

    Args:
        on_hopper: what "highest" is there. "bf16x6", six bfloat16 products, is as exact (on an H200 attention's
            error was 4e-7 with it, 6e-7 with three TF32 ones, 8e-7 in eager) and needs fewer registers;
            "bf16x3" is for products of bfloat16 tensors with float32 ones: 16 bits of the latter.
    """
    name = architecture(like.device)
    if like.dtype != torch.float32 or not name.startswith("sm_"):
        return "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return on_hopper if name.startswith(_HOPPER) else "tf32x3"


def options(like: Tensor) -> dict[str, Any]:
    """Compiler options that must not depend on Triton's defaults, which change between versions."""
    return {} if INTERPRETED else {"enable_fp_fusion": True}
