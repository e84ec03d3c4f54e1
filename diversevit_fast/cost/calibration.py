"""Measure what this machine sustains, in under a minute, and keep it: ``diversevit cost --calibrate``."""

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import usage_error
from ..files import StrPath, read_bytes, write_atomically
from ..ops import attention, gelu, layer_norm, routed_head_penalty
from ..ops.backends import cache_folder
from .counting import ELEMENTWISE, PRODUCTS, StepCounter
from .devices import Device

FILE = "cost_calibration.json"
_ROUNDS, _MOST_BYTES = 5, 1 << 20
Job = Callable[[], object]


def calibrate() -> Device:
    """Measure the CPU with the threads of this process: products, attention to second order, penalty, bandwidth."""
    rates = {name: _product_rate(dtype) for name, dtype in _DTYPES.items()}
    bandwidth = _bandwidth()
    shares: dict[str, float] = {PRODUCTS: 1.0, ELEMENTWISE: 1.0}
    base = Device("cpu", None, rates, bandwidth, shares, 0.0, 0.0, 0.0)
    for name, dtype in _DTYPES.items():
        for job in _jobs(dtype):
            for key, share in _shares_of(job, base, name).items():
                shares[key] = share
    return Device(
        "cpu",
        None,
        rates,
        bandwidth,
        shares,
        launch=_call_seconds(),
        host=0.0,
        host_operator=0.0,
        memory=_memory(),
        source="measured here",
        identity=identity(),
    )


def identity() -> dict[str, Any]:
    """What a calibration belongs to: processor, cores, threads, PyTorch."""
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
    path = cache_folder() / FILE if path is None else Path(path)
    names = ("rates", "bandwidth", "shares", "launch", "memory", "identity")
    content = json.dumps({name: getattr(device, name) for name in names}, indent=1)
    write_atomically(path, lambda file: file.write(content.encode()))
    return path


def load(path: StrPath | None = None) -> Device | None:
    """Read a calibration, this user's by default; None if there is none. One of another machine warns.

    Raises:
        UsageError: a file that is none, or whose rates are missing or not positive.
    """
    if path is None:
        path = cache_folder() / FILE
        if not path.exists():
            return None
    try:
        found = json.loads(read_bytes(path, _MOST_BYTES))
        numbers = {"bandwidth": found["bandwidth"], "launch": found["launch"], **found["rates"]}
        numbers |= found["shares"]
        kept = {key: found["rates"][key] for key in _DTYPES}
        shares = {str(key): float(x) for key, x in found["shares"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise _wrong(path, f"no usable one ({type(problem).__name__}: {problem})") from None
    for name, x in numbers.items():
        if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < float("inf"):
            raise _wrong(path, f"{name} {x!r}, which is no positive rate")
    if PRODUCTS not in shares or ELEMENTWISE not in shares:
        raise _wrong(path, "none of products or bandwidth")
    if found.get("identity") != identity():
        warnings.warn(
            f"{path}: measured on another machine ({found.get('identity')}); run diversevit cost --calibrate",
            stacklevel=2,
        )
    rest: Any = {"memory": found.get("memory"), "identity": found.get("identity") or {}}
    source = f"calibration {path}"
    launch = found["launch"]
    return Device(
        "cpu", None, kept, found["bandwidth"], shares, launch, 0.0, 0.0, source=source, **rest
    )


def _wrong(path: StrPath, got: str) -> Exception:
    return usage_error(str(path), "a calibration", got, "run diversevit cost --calibrate")


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _seconds(job: Job) -> float:
    job()
    # of one thread the processor's time, which others on the machine change less
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(_ROUNDS):
        begun = clock()
        job()
        taken.append(clock() - begun)
    return statistics.median(taken)


def _product_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of the products of an MLP of a ViT-S on eight images."""
    x, w = torch.randn(1576, 384, dtype=dtype), torch.randn(1536, 384, dtype=dtype)
    return 2 * 1576 * 384 * 1536 / _seconds(lambda: F.linear(x, w))


def _bandwidth() -> float:
    x, y = torch.randn(1 << 23), torch.randn(1 << 23)
    return 3 * 4 * (1 << 23) / _seconds(lambda: torch.add(x, y))


def _call_seconds() -> float:
    """Seconds of one of PyTorch's operators on a few numbers."""
    x = torch.randn(8)

    def many() -> None:
        for _ in range(1000):
            torch.add(x, x)

    return _seconds(many) / 1000


def _jobs(dtype: torch.dtype) -> Iterator[tuple[Job, ...]]:
    """Steps of growing order: each is timed beside the one before, whose seconds are taken off."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    q, k, v = (draw(4, 6, 197, 64) for _ in range(3))
    yield from (_orders(lambda: attention(q, k, v), (q, k, v)),)
    yield _orders(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v))[:2]
    x, w, b = draw(8, 197, 384), draw(384), draw(384)
    yield _orders(lambda: layer_norm(x, 384, w, b), (x, w, b))
    yield _orders(lambda: F.layer_norm(x, (384,), w, b), (x, w, b))[:2]
    y = draw(8, 197, 1536)
    yield _orders(lambda: gelu(y), (y,))
    yield _orders(lambda: F.gelu(y), (y,))[:2]
    r, weight = draw(4, 197, 3, 6, 64), draw(3, 6, 64, 384)
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


def _shares_of(jobs: tuple[Job, ...], base: Device, dtype: str) -> dict[str, float]:
    """Of what each order adds: the share of the rate, or of the bandwidth, by the operator's name."""
    shares, before, known = {}, 0.0, set()
    for job in jobs:
        counter = StepCounter()
        counter.phase = "forward"
        with counter:
            job()
        seconds = _seconds(job)
        calls = [call for call in counter.calls if call.name not in known]
        known |= {call.name for call in calls}
        ideal = sum(base.seconds(call) * counter.calls[call] for call in calls)
        for call in calls:
            what = call.kind if call.ours and call.kind != ELEMENTWISE else call.name
            shares[f"{what} {dtype}"] = ideal / max(seconds - before, 1e-7)
        before = seconds
    return shares


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
