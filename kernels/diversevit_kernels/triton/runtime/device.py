"""The device: its architecture, its limits, and what kernels are compiled with there.

Nothing else in this backend looks at the device or at the environment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.environment import switch

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""

COMPILER_OPTIONS: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
"""Options that must not depend on Triton's defaults, which change between versions."""

FAMILIES = {
    "interpreter": "interpreter",
    "sm_8": "ampere",  # and Ada
    "sm_9": "hopper",
    "sm_10": "blackwell",
    "sm_12": "rtx_blackwell",
    "sm_": "older_nvidia",  # or newer than all above
    "gfx": "amd",
    "": "other",
}
"""Beginning of an architecture's name -> the family whose launch configurations it shares; the longest counts."""

_MULTIPROCESSORS = {
    **{"interpreter": 2, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148},
    **{"sm_120": 170, "gfx942": 304},
}
"""Multiprocessors of an architecture's largest chip: A100, A40, L40S, H100, B200, RTX 5090, MI300X (data sheets)."""

_autotune = switch("DIVERSEVIT_AUTOTUNE", default=False)
_pretended: str | None = None


def architecture(device: torch.device) -> str:
    """The name of a device's architecture: ``sm_90``, ``gfx942``, ``xpu`` or ``interpreter``."""
    if _pretended is not None:
        return _pretended
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return device.type
    return _architecture_of(_index(device))


@cache
def _architecture_of(index: int) -> str:
    properties = _properties_of(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


_properties_of = cache(torch.cuda.get_device_properties)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def family(architecture: str) -> str:
    """The family that an architecture belongs to: a value of ``FAMILIES``."""
    return FAMILIES[max(filter(architecture.startswith, FAMILIES), key=len)]


@contextmanager
def pretend(name: str) -> Iterator[None]:
    """Inside the block every device is of architecture ``name``: for ahead-of-time compilation."""
    global _pretended
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


def pretending() -> bool:
    """Whether a ``pretend`` block is open."""
    return _pretended is not None


def autotuning() -> bool:
    """Whether launches time their candidates first: ``DIVERSEVIT_AUTOTUNE=1`` or ``autotune()``."""
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
    properties = _properties_of(_index(device))
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def multiprocessors(like: Tensor) -> int | None:
    """Multiprocessors of the device of ``like``; None if unknown."""
    if _pretended is None and not INTERPRETED and like.device.type == "cuda":
        return _properties_of(_index(like.device)).multi_processor_count
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
    return on_hopper if family(name) == "hopper" else "tf32x3"
