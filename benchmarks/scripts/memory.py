"""Measure peak memory, each row in a process of its own: of steps, of attention at 4097 tokens, of R1 of critics.

``python -m benchmarks.scripts.memory`` prints the table and stores ``benchmarks/results/memory.json``;
``--workload NAME`` measures that one and leaves the others of the file as they are, and ``--out NAME`` writes another
file of that folder, for a workload that is measured on another machine. A row is what one run adds at its peak to the
resident memory of a process that has run a small case of the same:

* ``peak``: freed memory goes back to the system at once (glibc's ``MALLOC_MMAP_THRESHOLD_`` fixed), so it is what is
  in use. The same for any number of threads, to about 1 %.
* ``resident``: the allocator as it comes, which also keeps holes between tensors of different sizes; runs of the same
  step differ by a fifth. Of the workloads of ``RESIDENT`` alone.
* ``seconds``: the processor time of the run of ``peak``, all threads together.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diversevit_fast as dvf
from benchmarks import timing
from benchmarks.critics import CRITICS
from benchmarks.orders import DOUBLE_BWD
from benchmarks.registry import named
from benchmarks.runner import peak_bytes
from benchmarks.steps import StepSpec, StepWorkload, erm, penalised, step_implementations
from benchmarks.timing import conditions, write
from benchmarks.workloads import OperatorSpec, OperatorWorkload, Tensors, run

STEP, ATTENTION, MASK, CHECKPOINTS = (
    *("all-layers step", "attention", "attention with a trained mask", "checkpointed step"),
)
R1 = "R1 "
"""Prefix of the workloads of critics."""
ROWS = {
    STEP: ("erm", "ours", "eager"),
    ATTENTION: ("eager", "ours"),
    MASK: ("eager", "ours"),
    CHECKPOINTS: tuple(
        name + how for name in ("erm", "all layers", "last layer") for how in ("", ", checkpoints")
    ),
    **{f"{R1}{name}": ("SDPA math", "eager", "ours") for name in CRITICS},
}
"""Workload -> implementations; the others are compared with the first."""
MEASURES: dict[str, dict[str, str]] = {
    "peak": {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
    "resident": {},
}
"""Measure -> environment of the process. The value is glibc's initial one: setting it keeps it there."""

RESIDENT = (STEP, ATTENTION)


class Size(NamedTuple):
    """Sizes of the workloads."""

    batch: int = 8  # of the step
    tokens: int = 4097  # of attention
    tiny: bool = False  # steps of models of 2 layers and 32 x 32 pixels


SMALL = Size(2, 65, True)
"""Is run first, for what a process does once."""


Job = Callable[[], object]


def job_of(workload: str, implementation: str, size: Size) -> Job:
    """Return one run of an implementation; it leaves nothing behind."""
    if workload == CHECKPOINTS:
        return _checkpointed(implementation, size)
    if workload == MASK:
        return _masked(implementation, size)
    if workload == ATTENTION:
        shape = (1, 12, size.tokens, 64)
        spec = OperatorSpec(ATTENTION, (shape,) * 3, torch.float32, DOUBLE_BWD, "cpu")
        return OperatorWorkload(spec).job(named(ATTENTION, implementation))
    if workload == STEP:
        spec = StepSpec(STEP, size.batch, size.tiny, "cpu")
    else:
        critic = workload.removeprefix(R1)
        batch = CRITICS[critic].batches["cpu"]
        spec = StepSpec("R1 step", batch, size.tiny, "cpu", critic=critic)
    step = StepWorkload(spec)
    once = step.job(next(p for p in step_implementations(spec.step) if p.name == implementation))
    return _without_gradients(step.model, once)


def _masked(implementation: str, size: Size) -> Job:
    """Attention with a mask [N, N] of all heads that has a gradient, from forward to double backward."""
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 12, size.tokens, 64),) * 3 + ((1, 1, size.tokens, size.tokens),)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=g) for shape in shapes]

    inputs, dd = [x.requires_grad_() for x in draw()], draw()
    do = torch.randn(shapes[0], generator=g).requires_grad_()

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v

    function = {"eager": eager, "ours": dvf.attention}[implementation]
    return lambda: run(function, Tensors(inputs, do, dd), DOUBLE_BWD)


def _checkpointed(implementation: str, size: Size) -> Job:
    """A step of a ViT-B on 4 images, with or without the penalty and, by timm's own switch, checkpoints."""
    import timm

    torch.manual_seed(0)
    side = 32 if size.tiny else 224
    options: dict[str, Any] = {"depth": 2} if size.tiny else {}
    model: Any = timm.create_model("vit_base_patch16_224", img_size=side, num_classes=2, **options)
    layers, _, checkpoints = implementation.partition(", ")
    model.train().set_grad_checkpointing(bool(checkpoints))
    loss = (erm if layers == "erm" else penalised(layers.split()[0]))(model)
    images, labels = torch.rand(4, 3, side, side), torch.arange(4) % 2
    return _without_gradients(model, lambda: loss(images, labels).backward())


def _without_gradients(model: torch.nn.Module, once: Job) -> Job:
    def job() -> None:
        once()
        model.zero_grad(set_to_none=True)

    return job


def measured(
    workload: str, implementation: str, size: Size, environment: Mapping[str, str]
) -> tuple[int, float]:
    """Return peak bytes and processor seconds, measured in a fresh process.

    Raises:
        RuntimeError: the process failed; its last line.
    """
    command = [
        *(sys.executable, "-m", "benchmarks.scripts.memory"),
        *("--only", workload, implementation),
        *("--batch", str(size.batch), "--tokens", str(size.tokens)),
        *["--tiny"] * size.tiny,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{workload}, {implementation}: {last}")
    peak, seconds = done.stdout.split()
    return int(peak), float(seconds)


def table(results: Mapping[str, Any]) -> str:
    """Return MiB and the ratio to a workload's first implementation, by measure, and seconds."""
    heads = "".join(f"{measure + ' MiB':>14}{'ratio':>8}" for measure in MEASURES)
    lines = [f"{'':56}{'seconds':>8}{heads}"]
    for workload, names in ROWS.items():
        for name in [name for name in names if name in results["peak"].get(workload, ())]:
            cells = f"{results['seconds'].get(workload, {}).get(name, ''):>8}"
            for measure in MEASURES:
                if found := results.get(measure, {}).get(workload):
                    cells += f"{found[name] / 2**20:>14.0f}{found[name] / found[names[0]]:>8.2f}"
            lines.append(f"{workload:30}{name:26}{cells}")
    return "\n".join(lines)


def measure(workload: str, size: Size) -> dict[str, dict[str, float]]:
    """Return what each measure finds of each implementation of a workload, and its seconds."""
    found: dict[str, dict[str, float]] = {}
    for which, environment in MEASURES.items():
        if which == "peak" or workload in RESIDENT:
            both = {name: measured(workload, name, size, environment) for name in ROWS[workload]}
            found[which] = {name: peak for name, (peak, _) in both.items()}
            found.setdefault("seconds", {name: seconds for name, (_, seconds) in both.items()})
    return found


def stored(size: Size, name: str = "memory") -> dict[str, Any]:
    """Return the results of the file; empty ones if it is not there.

    Raises:
        ValueError: they are of another machine or of other sizes.
    """
    path, here = timing.RESULTS / f"{name}.json", {"conditions": conditions(), **size._asdict()}
    results = json.loads(path.read_text("utf-8")) if path.exists() else here
    if any(results[key] != value for key, value in here.items()):
        raise ValueError(f"{path}: measured elsewhere; leave --workload out to measure all again")
    return results


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=Size().batch, help="of the step")
    parser.add_argument("--tokens", type=int, default=Size().tokens, help="of attention")
    parser.add_argument("--tiny", action="store_true", help="steps of very small models")
    parser.add_argument("--workload", choices=ROWS, help="this one alone")
    parser.add_argument("--out", default="memory", help="name of the file of results")
    parser.add_argument("--only", nargs=2, metavar=("WORKLOAD", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    size = Size(options.batch, options.tokens, options.tiny)
    if options.only:
        workload, name = options.only
        job_of(workload, name, SMALL)()
        print(*once(job_of(workload, name, size)))
        return 0
    results: dict[str, Any] = {"conditions": conditions(), **size._asdict()}
    if options.workload:
        try:
            results = stored(size, options.out)
        except ValueError as problem:
            print(problem, file=sys.stderr)
            return 1
    for workload in [options.workload] if options.workload else ROWS:
        for what, found in measure(workload, size).items():
            results.setdefault(what, {})[workload] = found
    path = write(options.out, results)
    print(table(results), path, sep="\n")
    return 0


def once(job: Job) -> tuple[int | None, float]:
    """Return the peak bytes and the processor seconds of a run."""
    taken = []

    def timed() -> None:
        begun = time.process_time()
        job()
        taken.append(time.process_time() - begun)

    peak = peak_bytes(timed, torch.device("cpu"))
    return peak, round(taken[-1], 2)


if __name__ == "__main__":
    sys.exit(main())
