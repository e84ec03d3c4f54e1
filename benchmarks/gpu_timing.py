"""Times on a GPU: the device's own, the host's until a call returns, and a single call's from event to event."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Job = Callable[[], tuple[Tensor, ...]]
RUNS, QUEUED, REPLAYS = 20, 100, 7
BUSY_SECONDS = 0.1
"""A long job runs fewer times between two events, for about so long."""
FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 cache: written before a single call, so that it begins cold."""


class DeviceTime(NamedTuple):
    """Seconds of one run on the device, and how they were found."""

    seconds: float
    how: str


def device_time(job: Job) -> DeviceTime:
    """Time runs that follow each other without the host: captured in one CUDA graph, and replayed.

    Each run finds in the L2 cache what the one before left there. A job that cannot be captured is queued between two
    events: that is the device's time only where the host is the faster of the two, and ``how`` says so, and why.
    """
    job()
    most = max(1, int(BUSY_SECONDS / max(event_seconds(job), 1e-6)))
    runs = min(RUNS, most)
    try:
        replay, how = captured(_repeated(job, runs)), f"graph of {runs}, L2 warm"
    except (RuntimeError, NotImplementedError) as refusal:
        torch.cuda.synchronize()
        runs = min(QUEUED, most)
        why = (str(refusal).splitlines() or [type(refusal).__name__])[0][:80]
        replay, how = _repeated(job, runs), f"{runs} queued, L2 warm: {why}"
    event_seconds(replay)
    return DeviceTime(statistics.median(event_seconds(replay) for _ in range(REPLAYS)) / runs, how)


def _repeated(job: Job, times: int) -> Job:
    def runs() -> tuple[Tensor, ...]:
        for _ in range(times - 1):
            job()
        return job()

    return runs


def host_seconds(job: Callable[[], object], rounds: int = 15) -> float:
    """Return the least time until a call returns, while the device has nothing else to do."""

    def once() -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        job()
        return time.perf_counter() - begun

    least = min(once() for _ in range(rounds))
    torch.cuda.synchronize()
    return least


def event_seconds(job: Callable[[], object]) -> float:
    """Return the seconds between two events around ``job``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def single_call_seconds(job: Callable[[], object]) -> float:
    """Return the seconds between two events around one call that finds the L2 cache cold."""
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    return event_seconds(job)


def captured(job: Job) -> Job:
    """Capture ``job`` as a CUDA graph, whose replay spares Python's part. Results are overwritten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and libraries set up before a capture
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = job()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay
