"""Host time of operators and training steps, without a GPU: on one that computes nothing (``benchmarks/fake_gpu``).

    python -m benchmarks.host_time [--only PATTERN] [--rounds 25] [--write]
    python -m benchmarks.host_time --counts FILE

Times are the least of many short rounds in which ours and PyTorch's own take turns, in one process: what the host
needs until it has queued the work. ``--write`` records them in ``benchmarks/results/host_time.json``. ``--counts``
times nothing and writes what each row asks of a GPU.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.fake_gpu import launch
from benchmarks.fake_gpu.build import UNAVAILABLE, UnavailableError

COUNTED = ("triton", "kernels", "gemms", "copies", "memsets", "waits", "mallocs", "allocations")
ROUND_SECONDS = 2e-3
"""A round calls a job until about this much time has passed."""


def measure(only: str = "", rounds: int = 25) -> dict[str, Any]:
    """Return a row per operator and order, and per step: microseconds, ratio to PyTorch's own, counts."""
    from benchmarks.host_workloads import STEPS, operator_rivals, step_jobs
    from benchmarks.timing import conditions

    operators, steps = [], []
    for (operator, order), rivals in operator_rivals().items():
        if only not in f"{operator} {order}":
            continue
        jobs = {"ours": rivals.ours, "baseline": rivals.baseline}
        least = minima(jobs, rounds)
        row = {"operator": operator, "order": order, "against": rivals.against}
        row |= {"ours_us": round(least["ours"], 1), "baseline_us": round(least["baseline"], 1)}
        row |= {"ratio": _ratio(least["ours"], least["baseline"]), **counts_of(rivals.ours)}
        operators.append(row)
    for name in STEPS:
        if only not in f"{name} step":
            continue
        jobs = step_jobs(name)
        least = minima(jobs, rounds)
        first = next(iter(least.values()))
        for who, us in least.items():
            row = {"step": name, "who": who, "us": round(us), "ratio": _ratio(us, first)}
            steps.append({**row, **counts_of(jobs[who])})
    return {"machine": {**conditions(), **versions()}, "operators": operators, "steps": steps}


def minima(jobs: Mapping[str, Any], rounds: int) -> dict[str, float]:
    """Return the least microseconds of a call of each job; the jobs take turns, round by round."""
    calls = {}
    for name, job in jobs.items():
        for _ in range(4):  # kernels are compiled, what is cached is cached
            job()
        begun = time.perf_counter()
        job()
        calls[name] = max(1, int(ROUND_SECONDS / (time.perf_counter() - begun)))
    least = dict.fromkeys(jobs, float("inf"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, job in jobs.items():
                begun = time.perf_counter()
                for _ in range(calls[name]):
                    job()
                taken = (time.perf_counter() - begun) / calls[name]
                least[name] = min(least[name], 1e6 * taken)
    finally:
        gc.enable()
    return least


def counts_of(job: Any) -> dict[str, int]:
    """Return what one call of a job, which has run before, asks of the GPU; what is 0 is left out."""
    import torch

    from benchmarks.fake_gpu.counters import counting

    def allocations() -> int:
        return torch.cuda.memory_stats().get("allocation.all.allocated", 0)

    before = allocations()
    with counting() as found:
        job()
    found["allocations"] = allocations() - before
    return {name: found[name] for name in COUNTED if found[name]}


def counts() -> dict[str, Any]:
    """Return the counts of every row, without timing, and the versions they belong to."""
    from benchmarks.host_workloads import STEPS, operator_rivals, step_jobs

    rows: dict[str, dict[str, int]] = {}
    jobs = {f"{name}, {order}": one.ours for (name, order), one in operator_rivals().items()}
    for name in STEPS:
        jobs |= {f"{name}: {who}": job for who, job in step_jobs(name).items()}
    for name, job in jobs.items():
        for _ in range(4):
            job()
        rows[name] = counts_of(job)
    return {"versions": versions(), "rows": rows}


def versions() -> dict[str, str]:
    """Versions that decide how many kernels PyTorch launches."""
    import timm
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__}


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of what ``measure`` found."""
    lines = [
        "| operator | order | ours | PyTorch | ratio | Triton launches | other launches | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["operators"]:
        cells = [row["operator"], row["order"], f"{row['ours_us']:.0f} us"]
        cells += [f"{row['baseline_us']:.0f} us ({row['against']})", f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join([*cells, *_counts(row)])} |")
    lines += [
        "",
        "| step | by | host time | x ERM | Triton launches | other launches | waits | copies | allocations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["steps"]:
        cells = [row["step"], row["who"], f"{row['us'] / 1e3:.2f} ms", f"{row['ratio']:.2f}"]
        more = [str(row.get(name, 0)) for name in ("copies", "allocations")]
        lines.append(f"| {' | '.join([*cells, *_counts(row), *more])} |")
    machine = found["machine"]
    told = ", ".join(f"{key} {machine[key]}" for key in ("cpu", "cores", "torch", "triton", "timm"))
    note = "On a GPU that computes nothing; the least of interleaved rounds in one process"
    return "\n".join([*lines, "", f"{note}; {told}."]) + "\n"


def _counts(row: Mapping[str, Any]) -> list[str]:
    others = sum(row.get(name, 0) for name in ("kernels", "gemms", "memsets"))
    return [str(row.get("triton", 0)), str(others), str(row.get("waits", 0))]


def _ratio(a: float, b: float) -> float:
    return round(a / b, 3)


def compact(found: Mapping[str, Any]) -> str:
    """JSON with one row a line."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]"
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            rows = (f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
            return "{\n" + ",\n".join(rows) + "\n}"
        return json.dumps(value)

    return "{" + ",\n".join(f"{json.dumps(key)}: {text(one)}" for key, one in found.items()) + "}\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--counts", type=Path, help="file to write the counts to, instead of times")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--write", action="store_true", help="record the times")
    options = parser.parse_args(arguments)
    if not launch.here():
        try:
            return launch.run(["-m", "benchmarks.host_time", *arguments])
        except UnavailableError as reason:
            print(reason, file=sys.stderr)
            return UNAVAILABLE
    if options.counts:
        options.counts.write_text(compact(counts()), encoding="utf-8")
        return 0
    found = measure(options.only, options.rounds)
    print(json.dumps(found) if options.json else markdown(found))
    if options.write:
        from benchmarks.timing import RESULTS

        (RESULTS / "host_time.json").write_text(compact(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
