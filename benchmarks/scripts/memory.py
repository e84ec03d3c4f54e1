"""Measure peak memory: of a training step with a penalty on every layer, and of attention at 4097 tokens.

``python -m benchmarks.scripts.memory`` measures each row in a process of its own, prints the table and stores
``benchmarks/results/memory.json``: what one run adds at its peak to the resident memory of a process that has
run once. Measured twice:

* ``peak``: freed memory goes back to the system at once (glibc's ``MALLOC_MMAP_THRESHOLD_`` fixed), so it is what is
  in use. The same for any number of threads, to about 1 %.
* ``resident``: the allocator as it comes, which also keeps holes between tensors of different sizes; runs of the same
  step differ by a fifth.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from benchmarks.orders import DOUBLE_BWD
from benchmarks.registry import named
from benchmarks.runner import peak_bytes
from benchmarks.steps import StepSpec, StepWorkload, step_implementations
from benchmarks.timing import conditions, write
from benchmarks.workloads import OperatorSpec, OperatorWorkload

STEP, ATTENTION = "all-layers step", "attention"
ROWS = {
    STEP: ("erm", "ours", "eager"),
    ATTENTION: ("eager", "ours"),
}
"""Workload -> implementations; the others are compared with the first."""
MEASURES: dict[str, dict[str, str]] = {
    "peak": {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
    "resident": {},
}
"""Measure -> environment of the process. The value is glibc's initial one: setting it keeps it there."""


class Size(NamedTuple):
    """Sizes of the workloads."""

    batch: int = 8  # of the step
    tokens: int = 4097  # of attention
    tiny: bool = False  # the step of a model of 2 layers and 32 x 32 pixels


def job_of(workload: str, implementation: str, size: Size) -> Callable[[], object]:
    """Return one run of an implementation; it leaves nothing behind."""
    if workload == STEP:
        step = StepWorkload(StepSpec(STEP, size.batch, size.tiny, "cpu"))
        once = step.job(next(p for p in step_implementations(STEP) if p.name == implementation))

        def job() -> None:
            once()
            step.model.zero_grad(set_to_none=True)

        return job
    shape = (1, 12, size.tokens, 64)
    spec = OperatorSpec(ATTENTION, (shape,) * 3, torch.float32, DOUBLE_BWD, "cpu")
    return OperatorWorkload(spec).job(named(ATTENTION, implementation))


def peak(workload: str, implementation: str, size: Size, environment: Mapping[str, str]) -> int:
    """Return peak bytes, measured in a fresh process.

    Raises:
        RuntimeError: the process failed; its last line.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.scripts.memory",
        "--only",
        workload,
        implementation,
    ]
    command += ["--batch", str(size.batch), "--tokens", str(size.tokens)]
    command += ["--tiny"] * size.tiny
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{workload}, {implementation}: {last}")
    return int(done.stdout)


def table(results: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Return MiB and the ratio to a workload's first implementation, by measure."""
    lines = [f"{'':26}" + "".join(f"{measure + ' MiB':>14}{'ratio':>8}" for measure in results)]
    for workload, names in ROWS.items():
        for name in names:
            cells = ""
            for found in results.values():
                bytes_, base = found[workload][name], found[workload][names[0]]
                cells += f"{bytes_ / 2**20:>14.0f}{bytes_ / base:>8.2f}"
            lines.append(f"{workload:16}{name:10}{cells}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=Size().batch, help="of the step")
    parser.add_argument("--tokens", type=int, default=Size().tokens, help="of attention")
    parser.add_argument("--tiny", action="store_true", help="the step of a very small model")
    parser.add_argument("--only", nargs=2, metavar=("WORKLOAD", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    size = Size(options.batch, options.tokens, options.tiny)
    if options.only:
        workload, name = options.only
        job = job_of(workload, name, size)
        job()
        print(peak_bytes(job, torch.device("cpu")))
        return 0
    results = {
        measure: {
            workload: {name: peak(workload, name, size, environment) for name in names}
            for workload, names in ROWS.items()
        }
        for measure, environment in MEASURES.items()
    }
    print(table(results))
    print(write("memory", {"conditions": conditions(), **size._asdict(), **results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
