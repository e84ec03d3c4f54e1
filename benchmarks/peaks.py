"""What chips can do at most: data-sheet rates of dense products and of memory, by the name a device gives itself."""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Rates of one chip, per second."""

    half: float  # FLOPs of dense products of float16 or bfloat16
    single: float  # of float32, outside tensor cores
    bandwidth: float  # bytes

    def flops(self, dtype: str) -> float | None:
        """Return the rate of products of a dtype, by its name; None where the table has none.

        Products of float32 that are made of several narrower ones on tensor cores may exceed float32's rate.
        """
        return {"float32": self.single}.get(dtype, self.half if "16" in dtype else None)


PEAKS = {
    "A100": Peak(312e12, 19.5e12, 2.039e12),
    "H100 SXM": Peak(989e12, 67e12, 3.35e12),
    "H200": Peak(989e12, 67e12, 4.8e12),
    "B200": Peak(2250e12, 75e12, 8.0e12),
}
"""Sources: NVIDIA's data sheets of the A100 80GB SXM, the H100 SXM, the H200 SXM and the HGX B200 (an eighth of it)."""
_NAMES = {
    r"NVIDIA A100-SXM4-80GB": "A100",
    r"NVIDIA H100 80GB HBM3": "H100 SXM",
    r"NVIDIA H200": "H200",
    r"NVIDIA B200": "B200",
}


def peak_of(device: str) -> Peak | None:
    """Return the rates of a device by its full name; None for one that is not in the table."""
    found = [chip for name, chip in _NAMES.items() if re.fullmatch(name, device)]
    return PEAKS[found[0]] if found else None
