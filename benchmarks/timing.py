"""Interleaved timing, and files of results with the machine they were measured on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


Job = Callable[[], object]


def seconds_of(job: Job) -> float:
    """Return the seconds of one run, by the wall clock."""
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def processor_seconds_of(job: Job) -> float:
    """Return the processor seconds of one run, of all threads, which others on the machine change less."""
    begun = time.process_time()
    job()
    return time.process_time() - begun


def interleaved(
    jobs: Mapping[str, Job], rounds: int, clock: Callable[[Job], float] = seconds_of
) -> dict[str, list[float]]:
    """Run every job once in every round, after one warm-up; return what ``clock`` says of each, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        clock(job)
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(clock(job))
    return seconds


def summary(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Return median and p20/p80 in milliseconds, and the median over rounds of the ratio to ``baseline``."""
    rows = {}
    for name, values in seconds.items():
        fifths = statistics.quantiles(values, n=5)
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=True)]
        rows[name] = {
            "median_ms": round(1e3 * statistics.median(values), 2),
            "p20_ms": round(1e3 * fifths[0], 2),
            "p80_ms": round(1e3 * fifths[-1], 2),
            "ratio": round(statistics.median(ratios), 3),
        }
    return rows


def conditions() -> dict[str, object]:
    """Return the machine and versions that a result belongs to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(name: str, result: object) -> Path:
    """Store a result as ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
