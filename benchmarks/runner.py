"""Gate, interleave, weigh: how a row of the benchmarks gets its numbers.

The first row of a group that is asked for checks every provider, then times those that passed in turn, round
by round, in this process; pytest-benchmark replays each row's times. Peak memory is a run of its own.
"""

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.registry import Job, Provider
from benchmarks.steps import StepSpec, StepWorkload
from benchmarks.timing import conditions, interleaved, seconds_of
from benchmarks.workloads import Spec, Workload
from diversevit_kernels.cpu.runtime import allocator

FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 cache: written between rounds, so that each begins cold."""


class Case(NamedTuple):
    """One row: what is computed, by whom."""

    spec: Spec | StepSpec
    provider: Provider

    @property
    def id(self) -> str:
        return f"{self.spec.group}-{self.provider.name}-{self.spec.device}".replace(" ", "_")


@dataclass
class Outcome:
    """What became of one provider of a group."""

    failure: BaseException | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_call_seconds: float = 0.0


def workload_of(spec: Spec | StepSpec) -> Workload | StepWorkload:
    return Workload(spec) if isinstance(spec, Spec) else StepWorkload(spec)


def gated(workload: Workload | StepWorkload, provider: Provider) -> tuple[Job, float]:
    """The provider's job, after its results passed the gate, and seconds of its first call.

    Raises:
        AssertionError: wrong results.
    """
    job = workload.job(provider)
    check = workload.check if isinstance(workload, Workload) else workload.check_of(provider)
    begun = time.perf_counter()
    results = job()
    taken = time.perf_counter() - begun
    check(results)
    return job, taken


class Board:
    """The groups of a session, each measured when its first row is asked for."""

    def __init__(self, groups: Mapping[str, Sequence[Case]], rounds: int | None = None):
        self.groups, self.rounds = groups, rounds
        self._measured: dict[str, dict[str, Outcome]] = {}

    def outcome(self, case: Case, timed: bool = True) -> Outcome:
        """Seconds and memory of a row, its whole group having been measured.

        Raises:
            Exception: whatever the row's own gate raised.
        """
        group = case.spec.group
        if group not in self._measured:
            self._measured[group] = self._measure(self.groups[group], timed)
        found = self._measured[group][case.provider.name]
        if found.failure is not None:
            raise found.failure
        return found

    def _measure(self, cases: Sequence[Case], timed: bool) -> dict[str, Outcome]:
        workload = workload_of(cases[0].spec)
        able = [c.provider for c in cases if c.provider.missing(workload.like) is None]
        outcomes = {provider.name: Outcome() for provider in able}
        jobs: dict[str, Job] = {}
        for provider in able:
            try:
                jobs[provider.name], taken = gated(workload, provider)
                outcomes[provider.name].first_call_seconds = taken
            except Exception as failure:
                outcomes[provider.name].failure = failure
        if not timed:
            return outcomes
        device = torch.device(cases[0].spec.device)
        rounds = self.rounds or (20 if device.type == "cuda" else 5)
        clock = _gpu_seconds if device.type == "cuda" else seconds_of
        for name, seconds in interleaved(jobs, rounds, clock).items():
            outcomes[name].seconds = seconds
        if isinstance(workload, StepWorkload) and workload.spec.graph:
            return outcomes  # a replay allocates nothing: its memory is the graph's
        for name, job in jobs.items():
            outcomes[name].peak_bytes = peak_bytes(job, device)
        return outcomes


def _gpu_seconds(job: Callable[[], object]) -> float:
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(job: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one more run takes at its peak, above what is there before; None where unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if platform.system() != "Linux" or not clear.exists():
        return None
    allocator.empty_cache()  # else memory freed by an earlier job is used again, unseen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status_bytes(status, "VmRSS")
    job()
    return max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, key: str) -> int:
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


class ReplayClock:
    """A timer for pytest-benchmark that tells recorded seconds: each round reads it twice."""

    def __init__(self):
        self._ticks: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        self._ticks = [tick for taken in seconds for tick in (0.0, taken)]

    def __call__(self) -> float:
        return self._ticks.pop(0) if self._ticks else 0.0


def machine(device: str) -> dict[str, object]:
    """Device, versions and commit a row belongs to."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = torch.cuda.get_device_name() if device == "cuda" else conditions()["cpu"]
    return {
        **conditions(),
        **{"device": name, "triton": triton, "cuda": torch.version.cuda},
        "commit": os.environ.get("DIVERSEVIT_COMMIT") or _commit(),
    }


def _commit() -> str:
    """The checkout's, with ``+`` where files differ from it; a copy without history is ``unknown``.

    Such a copy's rows get their commit from whoever made it: ``DIVERSEVIT_COMMIT``.
    """
    git = shutil.which("git")
    if git is None:
        return "unknown"
    git = [git, "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return (commit.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")
