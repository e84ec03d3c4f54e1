"""Limits of the reported chips per multiprocessor, and how many programs of a kernel fit at once.

Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (registers,
warps, blocks, shared memory; 1 KiB of shared memory per block is reserved from 8.0 on); registers are
handed out per warp in 256s and to four schedulers separately (the occupancy calculator's rules);
PTX ISA, tcgen05: 512 columns of tensor memory. AMD: CDNA3 ISA guide and LLVM's AMDGPU subtarget (512
vector registers per lane and SIMD in 8s, 8 waves per SIMD, 64 KiB of LDS in 512s, 16 work-groups).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chip:
    """Limits of one architecture. "Multiprocessor" is an SM or a CU, "warp" a warp or a wave."""

    backend: Literal["cuda", "hip"]
    arch: int | str  # as Triton's GPUTarget names it
    warps: int  # resident per multiprocessor
    programs: int  # resident per multiprocessor
    shared: int  # bytes per multiprocessor
    shared_per_program: int  # bytes a program may ask for
    tensor_columns: int = 0  # of tensor memory
    warp_size: int = 32
    registers: int = 16384  # 32-bit, per scheduler (NVIDIA) or lane and SIMD (AMD)
    register_unit: int = 256  # granularity per warp (NVIDIA) or lane (AMD)
    shared_unit: int = 128
    shared_reserved: int = 1024  # bytes of every program


_KIB = 1024
CHIPS = {
    "sm_80": Chip("cuda", 80, 64, 32, 164 * _KIB, 163 * _KIB),
    "sm_86": Chip("cuda", 86, 48, 16, 100 * _KIB, 99 * _KIB),
    "sm_89": Chip("cuda", 89, 48, 24, 100 * _KIB, 99 * _KIB),
    "sm_90": Chip("cuda", 90, 64, 32, 228 * _KIB, 227 * _KIB),
    "sm_100": Chip("cuda", 100, 64, 32, 228 * _KIB, 227 * _KIB, tensor_columns=512),
    "sm_120": Chip("cuda", 120, 48, 24, 100 * _KIB, 99 * _KIB),
    "gfx942": Chip(
        *("hip", "gfx942", 32, 16, 64 * _KIB, 64 * _KIB),
        warp_size=64,
        registers=512,
        register_unit=8,
        shared_unit=512,
        shared_reserved=0,
    ),
}
_SCHEDULERS = 4  # per multiprocessor, on all of them


def resident(chip: Chip, registers: int, warps: int, shared: int, tensor_columns: int = 0) -> int:
    """Return how many programs of ``warps`` warps one multiprocessor holds at once; 0 if it cannot hold one.

    Args:
        registers: per thread.
        shared: bytes of shared memory per program.
    """
    per_warp = registers * (chip.warp_size if chip.backend == "cuda" else 1)
    per_scheduler = chip.registers // max(1, _round_up(per_warp, chip.register_unit))
    limits = [chip.programs, min(chip.warps, _SCHEDULERS * per_scheduler) // warps]
    if taken := _round_up(shared + chip.shared_reserved, chip.shared_unit):
        limits.append(chip.shared // taken)
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
