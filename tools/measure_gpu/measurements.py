"""What is measured on a GPU, one measurement a process: ``python -m tools.measure_gpu.measurements NAME``.

Device time of an operator is that of a CUDA graph of RUNS runs, by the run: nothing of the host is in it. The L2 cache
is overwritten before each replay, so the first run of a graph finds it cold and the others what their predecessor left.
An operator that cannot be captured is queued RUNS times between two events, and its row says so. Host time is the least
time until a call returns, while the device is idle.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS, REPLAYS = 20, 7
TOKENS = {
    "attention": (197, 577),
    "routed_head_penalty": (197,),
    "gelu": (197,),
    "layer_norm": (197,),
}
RIVALS = ("ours", "eager", "SDPA fused")
STEPS = ("paper step", "all-layers step")


def names() -> list[str]:
    """Return all measurements: what may be wrong comes first, then what is new, then what is autotuned."""
    tests = sorted(p.name for p in (ROOT / "tests/kernels/triton").glob("test_*.py"))
    rows = [
        f"{op} {n} {dtype}"
        for op, ns in TOKENS.items()
        for n in ns
        for dtype in ("bfloat16", "float32")
    ]
    steps = [
        f"{step} {dtype}{how}"
        for step in STEPS
        for dtype in ("float32", "bfloat16")
        for how in ("", " graph")
    ]
    return [
        *(f"tests: {name}" for name in tests),
        *(f"step: {name}" for name in steps),
        *(f"operator: {row}" for row in rows),
        *(f"autotuned: {row}" for row in rows if row.startswith(("attention", "routed"))),
    ]


def commit() -> str:
    """Return the commit that is measured, as ``benchmarks.runner`` tells it."""
    from benchmarks.runner import machine

    return str(machine("cpu")["commit"])


def run(name: str, unchecked: bool) -> dict[str, Any]:
    """Carry out one measurement."""
    kind, _, rest = name.partition(": ")
    if kind == "tests":
        return kernel_tests(rest)
    from benchmarks.runner import machine

    found = step(rest, unchecked) if kind == "step" else operator(kind, rest, unchecked)
    told = machine("cuda")
    kept = {key: told[key] for key in ("device", "torch", "triton", "cuda")}
    return {**found, "checked": not unchecked, "on": kept}


def kernel_tests(name: str) -> dict[str, Any]:
    """Run one file of kernel tests; count outcomes and keep the first line of each failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = str(ROOT / "tests/kernels/triton" / name)
        subprocess.run([*command, path], cwd=ROOT, env=environment, capture_output=True)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failures = {
        f"{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "first_lines": failures}


def operator(kind: str, row: str, unchecked: bool) -> dict[str, Any]:
    """Time one operator in all orders, ours and PyTorch's."""
    import torch

    from benchmarks.cases import shapes
    from benchmarks.host_time import minima
    from benchmarks.orders import ORDERS
    from benchmarks.registry import IMPLEMENTATIONS
    from benchmarks.workloads import OperatorSpec, OperatorWorkload
    from diversevit_kernels.triton.runtime.device import autotune

    which, tokens, dtype = row.split()
    rows = []
    for order in ORDERS:
        given = shapes(which, int(tokens), "cuda")
        workload = OperatorWorkload(
            OperatorSpec(which, given, getattr(torch, dtype), order, "cuda")
        )
        for one in IMPLEMENTATIONS[which]:
            wanted = one.name == "ours" if kind == "autotuned" else one.name in RIVALS
            if not wanted or not one.serves(order) or one.missing(workload.like):
                continue
            with autotune(kind == "autotuned"):
                job = workload.job(one)
                results = job()
                if not unchecked:
                    workload.check(one, results)
                device = device_time(job)
                host = minima({"host": job}, 9)["host"]
            rows.append({"order": order, "by": one.name, **device, "host_us": round(host, 1)})
    return {"rows": rows}


def step(name: str, unchecked: bool) -> dict[str, Any]:
    """Time one training step by everybody; a graph's time is that of its replays."""
    import torch

    from benchmarks.runner import peak_bytes
    from benchmarks.steps import StepSpec, StepWorkload, step_implementations

    graph = name.endswith(" graph")
    which, dtype = name.removesuffix(" graph").rsplit(" ", 1)
    batch = 80 if which == "paper step" else 64
    spec = StepSpec(which, batch, False, "cuda", dtype=getattr(torch, dtype), graph=graph)
    workload = StepWorkload(spec)
    rows = []
    for one in step_implementations(which):
        job = workload.job(one)
        results = job()
        if not unchecked:
            workload.check(one, results)
        row = {"by": one.name, "ms": round(1e3 * median_seconds(job), 3)}
        if not graph:
            row["peak_bytes"] = peak_bytes(job, torch.device("cuda"))
        rows.append(row)
    return {"rows": rows}


def device_time(job: Callable[[], Any]) -> dict[str, Any]:
    """Return microseconds of a run on the device, and how they were found."""
    import torch

    from benchmarks.steps import captured

    def runs() -> Any:
        for _ in range(RUNS):
            results = job()
        return results

    try:
        replay, how = captured(runs), "graph"
    except (RuntimeError, NotImplementedError) as refusal:
        torch.cuda.synchronize()
        replay, how = runs, f"queued: {str(refusal).splitlines()[0][:80]}"
    return {"device_us": round(1e6 * median_seconds(replay) / RUNS, 2), "how": how}


def median_seconds(job: Callable[[], Any]) -> float:
    """Return the median seconds of some runs, by events; each finds the L2 cache cold."""
    from benchmarks.runner import gpu_seconds

    return statistics.median(gpu_seconds(job) for _ in range(REPLAYS))


if __name__ == "__main__":
    print("RESULT", json.dumps(run(sys.argv[1], "--unchecked" in sys.argv[2:])))
