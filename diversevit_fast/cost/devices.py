"""What machines can do, for predicted times: rates of data sheets, the shares of them that were reached, launches.

A data sheet's rate is for dense products, without sparsity. Shares are measured: of the H200, by rows of
``benchmarks/results/h200.json`` for single operators (never by those of whole steps, which the model is compared
with); other GPUs are given the same shares, which nobody measured there. A CPU has no data sheet of such rates: that
of the table is the record of one machine, and ``calibrate`` measures yours.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import usage_error
from .counting import ATTENTION, ELEMENTWISE, PENALTY, PRODUCTS, Call

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A machine, as far as a step's time and memory depend on it. Rates are per second.

    Attributes:
        name: as it is asked for.
        architecture: of a GPU, as Triton names it; None for a CPU.
        rates: dtype -> FLOPs of dense products at most.
        bandwidth: bytes of memory at most.
        shares: kind of call -> the share of the rate, or of the bandwidth for elementwise ones, that is sustained.
        launch: seconds that the shortest kernel takes; on a CPU, an operator of PyTorch with its Python.
        host: seconds of Python and C++ for one of PyTorch's operators.
        host_operator: the same for an operator of this library, its share of the penalty's Python included.
        memory: bytes; None where unknown.
        link: bytes per second and GPU to others of the same node, in one direction: half of what data sheets give for
            both together.
        network: the same to other nodes; assumed: a port of 400 Gbit/s for each GPU.
        source: where the numbers are from.
    """

    name: str
    architecture: str | None
    rates: Mapping[str, float]
    bandwidth: float
    shares: Mapping[str, float]
    launch: float
    host: float
    host_operator: float
    memory: int | None = None
    link: float = 0.0
    network: float = 50e9
    source: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.architecture is not None

    def seconds(self, call: Call) -> float:
        """Seconds of one call: of its products or its bytes, whichever takes longer, and at least a launch."""
        if call.kind == ELEMENTWISE:
            moving = call.moved / (self.bandwidth * self._share(ELEMENTWISE, call))
            return moving + self.launch * call.launches
        computing = call.flops / (self.rate(call) * self._share(call.kind, call))
        moving = call.moved / (self.bandwidth * self.shares[ELEMENTWISE])
        return max(computing, moving) + self.launch * call.launches

    def rate(self, call: Call) -> float:
        """FLOPs of products at most, in the dtype that they are made of."""
        if call.narrow > 1:
            return self.rates["bfloat16"] / call.narrow
        return self.rates.get(call.dtype) or self.rates["float32"]

    def _share(self, kind: str, call: Call) -> float:
        for key in (f"{call.name} {call.dtype}", f"{kind} {call.dtype}", kind):
            if key in self.shares:
                return self.shares[key]
        return self.shares[PRODUCTS]


_H200_SHARES = {
    f"{ATTENTION['forward']} bfloat16": 0.09,
    f"{ATTENTION['backward']} bfloat16": 0.09,
    f"{ATTENTION['double backward']} bfloat16": 0.09,
    f"{ATTENTION['forward']} float32": 0.20,
    f"{ATTENTION['backward']} float32": 0.20,
    f"{ATTENTION['double backward']} float32": 0.22,
    "_scaled_dot_product_flash_attention bfloat16": 0.086,
    "_scaled_dot_product_flash_attention_backward bfloat16": 0.086,
    "_scaled_dot_product_efficient_attention float32": 0.37,
    "_scaled_dot_product_efficient_attention_backward float32": 0.37,
    f"{PENALTY} bfloat16": 0.16,
    f"{PENALTY} float32": 0.21,
    ELEMENTWISE: 0.87,
    "native_layer_norm": 0.34,
    "native_layer_norm_backward": 0.34,
    "gelu_double_backward": 0.24,
    "layer_norm_double_backward float32": 0.20,
    "layer_norm_double_backward bfloat16": 0.115,
}
"""From ``benchmarks/results/h200.json``, medians over rounds: attention of 577 tokens, the routed penalty,
LayerNorm and GELU; of two orders measured together, the share of both. FLOPs are those that the kernels execute."""

_HOST, _HOST_OPERATOR = 4.9e-6, 43e-6
"""From ``benchmarks/results/host_time.json``, steps of a ViT-S: one core of an AMD EPYC. Others may take
several times as long."""
_LAUNCH = 2.5e-6
"""The shortest kernel in a CUDA graph, from start to start: assumed, neither measured nor from a data sheet."""

MATRIX_SHARES = (
    "S. Bekman, Machine Learning Engineering, 'Maximum Achievable Matmul FLOPS comparison table', "
    "bfloat16, best shapes"
)


def _gpu(
    name: str,
    architecture: str,
    half: float,
    single: float,
    bandwidth: float,
    matrix_share: float,
    memory: int,
    link: float,
    source: str,
) -> Device:
    return Device(
        name,
        architecture,
        {"bfloat16": half, "float16": half, "float32": single, "float64": single / 2},
        bandwidth,
        {**_H200_SHARES, PRODUCTS: matrix_share},
        _LAUNCH,
        host=_HOST,
        host_operator=_HOST_OPERATOR,
        memory=memory,
        link=link,
        source=f"{source}; shares of matrix products: {MATRIX_SHARES}; other shares: an H200",
    )


DEVICES = {
    device.name: device
    for device in (
        _gpu(
            *("A100", "sm_80", 312e12, 19.5e12, 2.039e12, 0.859, 80 * GIB, 300e9),
            "NVIDIA A100 80GB SXM data sheet",
        ),
        _gpu(
            *("H100", "sm_90", 989e12, 67e12, 3.35e12, 0.803, 80 * GIB, 450e9),
            "NVIDIA H100 SXM data sheet",
        ),
        _gpu(
            *("H200", "sm_90", 989e12, 67e12, 4.8e12, 0.803, 141 * 10**9, 450e9),
            "NVIDIA H200 SXM data sheet",
        ),
        _gpu(
            *("B200", "sm_100", 2250e12, 75e12, 8.0e12, 0.776, 180 * 10**9, 900e9),
            "NVIDIA HGX B200 data sheet, an eighth of it",
        ),
        _gpu(
            *("MI300X", "gfx942", 1307e12, 163.4e12, 5.3e12, 0.601, 192 * 10**9, 64e9),
            "AMD Instinct MI300X data sheet; the link is one of seven",
        ),
    )
}
"""Shipped GPUs by name."""


def device_of(device: object) -> Device | None:
    """The device that is meant: a ``Device``, a name of the table, or ``"cpu"`` or ``"cuda"`` as it was measured.

    Returns:
        None for a CPU that was not measured: counts and memory, no times.

    Raises:
        UsageError: an unknown name, or a rate that is missing or not positive.
    """
    if isinstance(device, str):
        if device == "cpu":
            from .calibration import load

            return load()
        if device == "cuda":
            from .calibration import load

            if (measured := load(device="cuda")) is not None:
                return measured
            hint = "run diversevit cost --calibrate --device cuda on it, or name one of the table"
            raise usage_error("device", "a GPU that was measured", "none for cuda", hint)
        if device in DEVICES:
            return DEVICES[device]
        names = ", ".join(["cpu", "cuda", *DEVICES])
        hint = "or make a Device of your own"
        raise usage_error("device", f"one of {names}", reprlib.repr(device), hint)
    if not isinstance(device, Device):
        got = type(device).__name__
        raise usage_error("device", "a Device or a name", got, "say H200")
    needed = {"bandwidth": device.bandwidth, "float32": device.rates.get("float32")}
    needed |= {**device.rates, **device.shares}
    needed |= {kind: device.shares.get(kind) for kind in (PRODUCTS, ELEMENTWISE)}
    for name, x in needed.items():
        if not isinstance(x, int | float) or not 0 < x < float("inf"):
            got = "none" if x is None else repr(x)
            raise usage_error("device", f"a positive rate of {name}", got, "mend the Device")
    return device
