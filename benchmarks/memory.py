"""Peak memory of the penalty: a training step with every layer regularised, and attention at 4097 tokens.

``python -m benchmarks.memory`` measures each row in a process of its own, prints the table and stores
``benchmarks/results/memory.json``. Peak: what one run adds to the resident memory of a process that has run once.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch

from .board import peak_bytes
from .providers import PROVIDERS
from .step_workload import StepSpec, StepWorkload, step_providers
from .timing import conditions, write
from .workload import Spec, Workload

TOKENS = 4097
STEP, ATTENTION = "all-layers step", "attention"
ROWS = {
    STEP: ("erm", "ours", "eager"),
    ATTENTION: ("eager", "ours"),
}
"""Workload -> providers, the first of which is what the others are compared with."""


def job_of(workload: str, provider: str, batch: int) -> Callable[[], object]:
    """One run of a provider."""
    if workload == STEP:
        step = StepWorkload(StepSpec(STEP, batch, False, "cpu"))
        return step.job(next(p for p in step_providers(STEP) if p.name == provider))
    shape = (1, 12, TOKENS, 64)
    spec = Spec(ATTENTION, (shape, shape, shape), torch.float32, "d0+d1+d2", "cpu")
    return Workload(spec).job(next(p for p in PROVIDERS[ATTENTION] if p.name == provider))


def peak(workload: str, provider: str, batch: int) -> int:
    """Bytes, measured in a fresh process.

    Raises:
        RuntimeError: the process failed; its last line.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--only", workload, provider]
    done = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{workload}, {provider}: {last}")
    return int(done.stdout)


def table(rows: dict[str, dict[str, int]]) -> str:
    lines = [f"{'':20}{'':10}{'peak MiB':>10}{'ratio':>8}"]
    for workload, found in rows.items():
        base = next(iter(found.values()))
        lines += [
            f"{workload:20}{name:10}{n / 2**20:>10.0f}{n / base:>8.3f}" for name, n in found.items()
        ]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="of the step")
    parser.add_argument("--only", nargs=2, metavar=("WORKLOAD", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.only:
        workload, provider = options.only
        job = job_of(workload, provider, options.batch)
        job()
        print(peak_bytes(job, torch.device("cpu")))
        return 0
    rows = {
        workload: {name: peak(workload, name, options.batch) for name in providers}
        for workload, providers in ROWS.items()
    }
    print(table(rows))
    result = {"conditions": conditions(), "batch": options.batch, "tokens": TOKENS, "peak": rows}
    print(write("memory", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
