"""Measure what this machine sustains, in under a minute, and keep it: ``diversevit cost --calibrate``.

``calibrate("cuda")`` does the same on a GPU, with more samples. That has run with stand-ins for GPU and clock, on no
chip.
"""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import usage_error
from ..files import StrPath, read_bytes, write_atomically
from ..ops import attention, gelu, layer_norm, routed_head_penalty
from ..ops.backends import cache_folder
from .clocks import Clock, CpuClock, GpuClock, Job
from .counting import ELEMENTWISE, PRODUCTS, StepCounter
from .devices import Device

FILES = {"cpu": "cost_calibration.json", "cuda": "cost_calibration_cuda.json"}
_MOST_BYTES = 1 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDED = ("float32", "bfloat16")  # what calibrations of earlier versions have


class Sizes(NamedTuple):
    """How much is measured: samples of the operators, and numbers of which bandwidth is measured."""

    samples: int
    numbers: int


_SIZES = {"cpu": Sizes(4, 1 << 23), "cuda": Sizes(64, 1 << 26)}


def calibrate(
    device: str = "cpu", *, clock: Clock | None = None, sizes: Sizes | None = None
) -> Device:
    """Measure the CPU with the threads of this process, or the current GPU.

    Products, attention to second order, penalty, LayerNorm and GELU in float32, bfloat16 and float16, and bandwidth;
    each at most ``clocks.ROUNDS`` times.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        clock: what times a job; None: the device's own.
        sizes: of what is measured; None: the device's own.

    Raises:
        UsageError: another device, or no GPU.
    """
    if device not in FILES:
        hint = "leave out --device, or say --device cuda"
        raise usage_error("calibrate", "cpu or cuda", repr(device), hint)
    if device == "cuda" and not torch.cuda.is_available():
        raise usage_error("calibrate", "a GPU", "none that PyTorch sees", "see diversevit doctor")
    sizes = sizes or _SIZES[device]
    clock = clock or (GpuClock() if device == "cuda" else CpuClock())
    with torch.device(device):
        return _measured(device, clock, sizes)


def _measured(device: str, clock: Clock, sizes: Sizes) -> Device:
    rates = {name: _product_rate(dtype, clock, sizes) for name, dtype in _DTYPES.items()}
    bandwidth = _bandwidth(clock, sizes)
    shares: dict[str, float] = {PRODUCTS: 1.0, ELEMENTWISE: 1.0}
    architecture = _architecture() if device == "cuda" else None
    base = Device(device, architecture, rates, bandwidth, shares, 0.0, 0.0, 0.0)
    for name, dtype in _DTYPES.items():
        for jobs in _jobs(dtype, sizes):
            for key, share in _shares_of(jobs, base, name, clock).items():
                shares[key] = share
    host, host_operator = _host_seconds() if device == "cuda" else (0.0, 0.0)
    return Device(
        device,
        architecture,
        rates,
        bandwidth,
        shares,
        launch=_call_seconds(clock),
        host=host,
        host_operator=host_operator,
        memory=_memory(device),
        source="measured here",
        identity=identity(device),
    )


def _architecture() -> str:
    """The current GPU's, as Triton names it."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return found.gcnArchName.partition(":")[0]
    return f"sm_{found.major}{found.minor}"


def identity(device: str = "cpu") -> dict[str, Any]:
    """What a calibration belongs to: processor, cores, threads, PyTorch; or GPU and PyTorch."""
    if device == "cuda":
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {"gpu": gpu, "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def save(device: Device, path: StrPath | None = None) -> Path:
    """Write a calibration, to this user's cache folder by default; return where."""
    path = cache_folder() / FILES[device.name] if path is None else Path(path)
    names = ("rates", "bandwidth", "shares", "launch", "memory", "identity")
    if device.is_gpu:
        names = (*names, "architecture", "host", "host_operator")
    content = json.dumps({name: getattr(device, name) for name in names}, indent=1)
    write_atomically(path, lambda file: file.write(content.encode()))
    return path


def load(path: StrPath | None = None, device: str = "cpu") -> Device | None:
    """Read a calibration, this user's by default; None if there is none. One of another machine warns.

    Args:
        device: ``"cpu"`` or ``"cuda"``, which it is of.

    Raises:
        UsageError: a file that is none, or whose rates are missing or not positive.
    """
    if path is None:
        path = cache_folder() / FILES[device]
        if not path.exists():
            return None
    try:
        found = json.loads(read_bytes(path, _MOST_BYTES))
        numbers = {"bandwidth": found["bandwidth"], "launch": found["launch"], **found["rates"]}
        numbers |= found["shares"]
        kept = {key: found["rates"][key] for key in _NEEDED}
        kept |= {key: rate for key, rate in found["rates"].items() if key in _DTYPES}
        gpu = {name: found[name] for name in _OF_GPU} if device == "cuda" else _NO_GPU
        numbers |= {} if device == "cpu" else {name: gpu[name] for name in _OF_GPU[1:]}
        shares = {str(key): float(x) for key, x in found["shares"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise _wrong(path, f"no usable one ({type(problem).__name__}: {problem})") from None
    for name, x in numbers.items():
        if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < float("inf"):
            raise _wrong(path, f"{name} {x!r}, which is no positive rate")
    if PRODUCTS not in shares or ELEMENTWISE not in shares:
        raise _wrong(path, "none of products or bandwidth")
    if found.get("identity") != identity(device):
        warnings.warn(
            f"{path}: measured on another machine ({found.get('identity')}); run diversevit cost --calibrate",
            stacklevel=2,
        )
    return Device(
        device,
        gpu["architecture"],
        kept,
        found["bandwidth"],
        shares,
        found["launch"],
        gpu["host"],
        gpu["host_operator"],
        memory=found.get("memory"),
        source=f"calibration {path}",
        identity=found.get("identity") or {},
    )


_OF_GPU = ("architecture", "host", "host_operator")
_NO_GPU: dict[str, Any] = {"architecture": None, "host": 0.0, "host_operator": 0.0}


def _wrong(path: StrPath, got: str) -> Exception:
    return usage_error(str(path), "a calibration", got, "run diversevit cost --calibrate")


def _product_rate(dtype: torch.dtype, clock: Clock, sizes: Sizes) -> float:
    """FLOPs per second of the products of an MLP of a ViT-S on twice the samples."""
    rows = 2 * sizes.samples * 197
    x, w = torch.randn(rows, 384, dtype=dtype), torch.randn(1536, 384, dtype=dtype)
    return 2 * rows * 384 * 1536 / _at_least(clock.seconds(lambda: F.linear(x, w)))


def _bandwidth(clock: Clock, sizes: Sizes) -> float:
    x, y = torch.randn(sizes.numbers), torch.randn(sizes.numbers)
    return 3 * 4 * sizes.numbers / _at_least(clock.seconds(lambda: torch.add(x, y)))


def _call_seconds(clock: Clock) -> float:
    """Seconds of one of PyTorch's operators on a few numbers; on a GPU of its kernel, one after the other."""
    x = torch.randn(8)

    def many() -> None:
        for _ in range(1000):
            torch.add(x, x)

    return _at_least(clock.seconds(many) / 1000)


def _host_seconds() -> tuple[float, float]:
    """Seconds of Python and C++ that start an operator of PyTorch, and one of this library, on a GPU."""
    x, q = torch.randn(8), torch.randn(1, 2, 16, 64, requires_grad=True)
    found = []
    for job in (lambda: torch.add(x, x), lambda: attention(q, q, q)):
        job()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(100):
            job()
        found.append(_at_least((time.perf_counter() - begun) / 100))
        torch.cuda.synchronize()
    return found[0], found[1]


def _at_least(seconds: float) -> float:
    return max(seconds, 1e-9)


def _jobs(dtype: torch.dtype, sizes: Sizes) -> Iterator[tuple[Job, ...]]:
    """Steps of growing order: each is timed beside the one before, whose seconds are taken off."""
    few, many = sizes.samples, 2 * sizes.samples

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    q, k, v = (draw(few, 6, 197, 64) for _ in range(3))
    yield _orders(lambda: attention(q, k, v), (q, k, v))
    yield _orders(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v))[:2]
    x, w, b = draw(many, 197, 384), draw(384), draw(384)
    yield _orders(lambda: layer_norm(x, 384, w, b), (x, w, b))
    yield _orders(lambda: F.layer_norm(x, (384,), w, b), (x, w, b))[:2]
    y = draw(many, 197, 1536)
    yield _orders(lambda: gelu(y), (y,))
    yield _orders(lambda: F.gelu(y), (y,))[:2]
    r, weight = draw(few, 197, 3, 6, 64), draw(3, 6, 64, 384)
    yield _orders(lambda: routed_head_penalty(r, weight), (r, weight))[:2]


def _orders(forward: Callable[[], Any], inputs: tuple[Tensor, ...]) -> tuple[Job, ...]:
    do = torch.randn_like(forward()).requires_grad_()

    def backward() -> object:
        return torch.autograd.grad(forward(), inputs, do)

    def double() -> object:
        first = torch.autograd.grad(forward(), inputs, do, create_graph=True)
        dd = [x.detach() for x in first]
        return torch.autograd.grad(first, (*inputs, do), dd, allow_unused=True)

    return forward, backward, double


def _shares_of(jobs: tuple[Job, ...], base: Device, dtype: str, clock: Clock) -> dict[str, float]:
    """Of what each order adds: the share of the rate, or of the bandwidth, by the operator's name."""
    shares, before, known = {}, 0.0, set()
    for job in jobs:
        counter = StepCounter(base.architecture)
        counter.phase = "forward"
        with counter:
            job()
        seconds = clock.seconds(job)
        calls = [call for call in counter.calls if call.name not in known]
        known |= {call.name for call in calls}
        ideal = sum(base.seconds(call) * counter.calls[call] for call in calls)
        for call in calls:
            what = call.kind if call.ours and call.kind != ELEMENTWISE else call.name
            shares[f"{what} {dtype}"] = ideal / max(seconds - before, 1e-7)
        before = seconds
    return shares


def _memory(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
