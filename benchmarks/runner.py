"""The runner of the benchmarks: checks, times and measures the memory of all implementations of a group together.

The first row of a group that is asked for checks every implementation, then times those that passed in turn, round
by round, in this process; pytest-benchmark is given each row's times. Peak memory is measured in a run of its own.
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

from benchmarks.fake_gpu import launch as fake_gpu
from benchmarks.gpu_timing import device_time, host_seconds, single_call_seconds
from benchmarks.records import FAKE
from benchmarks.registry import Implementation, Job
from benchmarks.steps import StepSpec, StepWorkload
from benchmarks.timing import conditions, interleaved, seconds_of
from benchmarks.work import flops, moved_bytes
from benchmarks.workloads import OperatorSpec, OperatorWorkload
from diversevit_kernels.cpu.runtime import allocator

OURS = "ours"


class Case(NamedTuple):
    """One row: what is computed, and by which implementation."""

    spec: OperatorSpec | StepSpec
    implementation: Implementation

    @property
    def id(self) -> str:
        return f"{self.spec.group}-{self.implementation.name}-{self.spec.device}".replace(" ", "_")


@dataclass
class Outcome:
    """The result of one implementation of a group: why it failed or was refused, or its times and memory."""

    failure: BaseException | None = None
    refused: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_call_seconds: float = 0.0
    gpu: dict[str, Any] = field(default_factory=dict)  # what rows of a GPU have besides


def workload_of(spec: OperatorSpec | StepSpec) -> OperatorWorkload | StepWorkload:
    return OperatorWorkload(spec) if isinstance(spec, OperatorSpec) else StepWorkload(spec)


def checked(
    workload: OperatorWorkload | StepWorkload, implementation: Implementation
) -> tuple[Job, float]:
    """Return the implementation's job, after its results passed the correctness check, and seconds of its first call.

    On the fake GPU, which computes nothing, there is no check; nor is what is measured there ever a result.

    Raises:
        AssertionError: wrong results.
    """
    job = workload.job(implementation)
    begun = time.perf_counter()
    results = job()
    taken = time.perf_counter() - begun
    if not fake_gpu.here():
        workload.check(implementation, results)
    return job, taken


class Runner:
    """Measures the groups of a session, each when its first row is asked for."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[Case]],
        rounds: int | None = None,
        on_cpu: Callable[[Callable[[], object]], float] = seconds_of,
    ):
        self.groups, self.rounds, self.on_cpu = groups, rounds, on_cpu
        self._measured: dict[str, dict[str, Outcome]] = {}

    def outcome(self, case: Case, timed: bool = True) -> Outcome:
        """Return seconds and memory of a row, after measuring its whole group.

        Raises:
            Exception: whatever the row's own check raised.
        """
        group = case.spec.group
        if group not in self._measured:
            self._measured[group] = self._measure(self.groups[group], timed)
        found = self._measured[group][case.implementation.name]
        if found.failure is not None:
            raise found.failure
        return found

    def _measure(self, cases: Sequence[Case], timed: bool) -> dict[str, Outcome]:
        workload = workload_of(cases[0].spec)
        every = [c.implementation for c in cases]
        outcomes = {one.name: Outcome(refused=one.missing(workload.like)) for one in every}
        jobs: dict[str, Job] = {}
        for one in every:
            found = outcomes[one.name]
            if found.refused:
                continue
            try:
                jobs[one.name], found.first_call_seconds = checked(workload, one)
            except torch.cuda.OutOfMemoryError:
                found.refused = f"{one.name}: out of memory"
            except Exception as failure:
                if one.name != OURS and isinstance(failure, NotImplementedError):
                    found.refused = f"{one.name}: {str(failure).splitlines()[0]}"
                else:
                    found.failure = failure
        if not timed:
            return outcomes
        device = torch.device(cases[0].spec.device)
        rounds = self.rounds or (20 if device.type == "cuda" else 5)
        clock = single_call_seconds if device.type == "cuda" else self.on_cpu
        for name, seconds in interleaved(jobs, rounds, clock).items():
            outcomes[name].seconds = seconds
        if device.type == "cuda":
            for name, job in jobs.items():
                outcomes[name].gpu = gpu_details(workload, job)
        if isinstance(workload, StepWorkload) and workload.spec.graph:
            return outcomes  # a replay allocates nothing: its memory is the graph's
        for name, job in jobs.items():
            outcomes[name].peak_bytes = peak_bytes(job, device)
        return outcomes


def gpu_details(workload: OperatorWorkload | StepWorkload, job: Job) -> dict[str, Any]:
    """Return host time, and of an operator the device's time and what the operator has to do."""
    found: dict[str, Any] = {"host_seconds": host_seconds(job)}
    if isinstance(workload, OperatorWorkload):
        seconds, how = device_time(job)
        found |= {"device_seconds": seconds, "device_how": how}
        found |= {"flops": flops(workload.spec), "bytes": moved_bytes(workload.spec)}
    return found


def peak_bytes(job: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that one more run adds at its peak to what is there before; None where unknown."""
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
    allocator.empty_cache()  # otherwise memory freed by an earlier job is used again, unseen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = status_bytes(status, "VmRSS")
    job()
    return max(0, status_bytes(status, "VmHWM") - before)


def status_bytes(status: Path, key: str) -> int:
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


class ReplayClock:
    """A timer that gives pytest-benchmark recorded seconds: each round reads it twice."""

    def __init__(self):
        self._ticks: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        self._ticks = [tick for taken in seconds for tick in (0.0, taken)]

    def __call__(self) -> float:
        return self._ticks.pop(0) if self._ticks else 0.0


def extra_info(case: Case, found: Outcome) -> dict[str, Any]:
    """Return what a row tells besides its times."""
    spec, one = case.spec, case.implementation
    compiled = {"compile_seconds": round(found.first_call_seconds, 1)} if one.compiled else {}
    return {
        "workload": spec.workload,
        "shape": getattr(spec, "shapes", [[getattr(spec, "batch", 0)]])[0],
        "dtype": str(spec.dtype).removeprefix("torch."),
        "order": spec.order,
        "implementation": one.name,
        "first_order_only": one.first_order_only,
        "peak_bytes": found.peak_bytes,
        **found.gpu,
        **compiled,
    }


def machine(device: str) -> dict[str, object]:
    """Return the device, versions and commit that a row belongs to."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = torch.cuda.get_device_name() if device == "cuda" else conditions()["cpu"]
    name = FAKE if fake_gpu.here() else name
    return {
        **conditions(),
        **{"device": name, "triton": triton, "cuda": torch.version.cuda},
        "commit": os.environ.get("DIVERSEVIT_COMMIT") or _commit(),
    }


def _commit() -> str:
    """Return the checkout's commit, with ``+`` where files differ from it, or ``unknown`` in a copy without history.

    Whoever makes such a copy sets ``DIVERSEVIT_COMMIT``.
    """
    git = shutil.which("git")
    if git is None:
        return "unknown"
    git = [git, "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return (commit.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")
