"""How long a piece of work takes on this machine: the processor's clock, and a GPU's events around a CUDA graph."""

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

Job = Callable[[], object]
ROUNDS = 5
"""How often a job is timed at most."""
PATIENCE = 1.0
"""Seconds of one job after which no further round is begun."""


class Clock(Protocol):
    """What times a job: at most ``ROUNDS`` times, after one that is not timed."""

    def seconds(self, job: Job) -> float:
        """The median of the job's seconds."""
        ...


class CpuClock:
    """Times on the CPU: the processor's time of one thread, which others on the machine change less, else wall time."""

    def __init__(self):
        one = torch.get_num_threads() == 1
        self._now = time.process_time if one else time.perf_counter

    def seconds(self, job: Job) -> float:
        job()
        taken: list[float] = []
        while len(taken) < ROUNDS and sum(taken) < PATIENCE:
            begun = self._now()
            job()
            taken.append(self._now() - begun)
        return statistics.median(taken)


class GpuClock:
    """Times on a GPU between two events: of a job captured as a CUDA graph, so that Python's time is not in it."""

    repeats = 10
    """Replays between two events."""

    def seconds(self, job: Job) -> float:
        graph = _captured(job)
        graph.replay()
        taken: list[float] = []
        while len(taken) < ROUNDS and sum(taken) * self.repeats < PATIENCE:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(self.repeats):
                graph.replay()
            end.record()
            end.synchronize()
            taken.append(1e-3 * begin.elapsed_time(end) / self.repeats)
        return statistics.median(taken)


def _captured(job: Job) -> torch.cuda.CUDAGraph:
    """The kernels of a job as a graph; it runs twice before, on a stream of its own, to compile what is to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph
