"""Hold ``dvf.cost`` against measured steps on this CPU: time by the processor's clock, and the peak of memory.

``python -m benchmarks.scripts.cost`` measures the machine (``dvf.cost``'s calibration), then every row in a process of
its own, one thread, and stores ``benchmarks/results/cost.json``. A step is loss, backward and AdamW. The peak is what a
step adds to the resident memory of a process that has run one, with glibc's ``MALLOC_MMAP_THRESHOLD_`` fixed; the
predicted one is without parameters, optimizer state, batch and the scratch memory that threads keep.

``python -m benchmarks.scripts.cost --whole ViT-L all bfloat16 --batch 8`` adds a row of a whole process: a fresh one
makes model and optimizer and takes two steps, of which the second finds the optimizer's state made, and the peak is
what the kernel says it ever held (``VmHWM``), less what it held before there was a model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import diversevit_fast as dvf
from benchmarks.runner import peak_bytes, status_bytes
from benchmarks.timing import RESULTS, conditions, write
from diversevit_fast.cost.calibration import calibrate
from diversevit_fast.cost.counting import StepCounter
from diversevit_fast.cost.step import take_step

MODELS = {
    "ViT-Ti": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}
TIMED = ("ViT-Ti", "ViT-S", "ViT-B")
STEPS: dict[str, str | None] = {"erm": None, "last": "last", "all": "all"}
DTYPES = ("float32", "bfloat16")
ROUNDS = 3
BEFORE = ("parameters", "optimizer state", "batch", "workspace")
"""Parts of the peak that are there before a step begins: threads keep their scratch memory."""


def step_of(model: str, step: str, dtype: str, batch: int) -> Callable[[], None]:
    """A training step of a new model on random images."""
    torch.manual_seed(0)
    made = timm.create_model(MODELS[model], num_classes=10).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
    layers = STEPS[step]
    diversity = None if layers is None else dvf.HeadDiversity(made, layers=layers)
    data = torch.rand(batch, 3, 224, 224), torch.arange(batch) % 10
    uncounted = StepCounter()  # takes the phases, and is not entered
    return lambda: take_step(made, diversity, data, getattr(torch, dtype), optimizer, uncounted)


def measured(model: str, step: str, dtype: str, batch: int) -> dict[str, float]:
    """Processor seconds of a step, the median of some, and the bytes that one adds at its peak."""
    once = step_of(model, step, dtype, batch)
    once()
    taken = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        once()
        taken.append(time.process_time() - begun)
    dvf.empty_cpu_cache()
    return {
        "seconds": statistics.median(taken),
        "bytes": peak_bytes(once, torch.device("cpu")) or 0,
    }


def held_by_a_process(model: str, step: str, dtype: str, batch: int) -> dict[str, float]:
    """Processor seconds of the second step of this fresh process, and the most bytes that it ever held."""
    status = Path("/proc/self/status")
    before = status_bytes(status, "VmRSS")
    once = step_of(model, step, dtype, batch)
    once()
    begun = time.process_time()
    once()
    seconds = time.process_time() - begun
    return {"seconds": seconds, "before": before, "most": status_bytes(status, "VmHWM")}


def in_a_process(how: str, model: str, step: str, dtype: str, batch: int) -> dict[str, float]:
    """What a fresh process measures, ``how`` being an option of this program."""
    command = [sys.executable, "-m", "benchmarks.scripts.cost", how, model, step, dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(
        [*command, "--batch", str(batch)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def predicted(machine: Any, model: str, step: str, dtype: str, batch: int) -> tuple[float, Any]:
    """The predicted seconds of a step, and its peak."""
    with torch.device("meta"):
        made = timm.create_model(MODELS[model], num_classes=10)
    found = dvf.cost(made, STEPS[step], batch=batch, dtype=dtype, device=machine)
    assert found.seconds is not None
    return found.seconds.step, found.peak


def whole_row_of(machine: Any, model: str, step: str, dtype: str, batch: int) -> dict[str, Any]:
    """A row of a whole process: bytes are of all that it adds to an interpreter with its libraries."""
    seconds, peak = predicted(machine, model, step, dtype, batch)
    real = in_a_process("--held", model, step, dtype, batch)
    return {
        **{"model": model, "step": step, "dtype": dtype, "batch": batch},
        "predicted_seconds": round(seconds, 4),
        "seconds": round(real["seconds"], 4),
        "predicted_bytes": peak.total,
        "bytes": real["most"] - real["before"],
        "bytes_with_libraries": real["most"],
        "conditions": conditions(),
    }


def row_of(machine: Any, model: str, step: str, dtype: str, batch: int) -> dict[str, Any]:
    """A row: what was predicted and what a process measures."""
    seconds, peak = predicted(machine, model, step, dtype, batch)
    before = sum(peak.parts[part] for part in BEFORE)
    real = in_a_process("--only", model, step, dtype, batch)
    return {
        **{"model": model, "step": step, "dtype": dtype, "batch": batch},
        "predicted_seconds": round(seconds, 4),
        "seconds": round(real["seconds"], 4),
        "predicted_bytes": peak.total - before,
        "bytes": real["bytes"],
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    named: dict[str, Any] = {"nargs": 3, "metavar": ("MODEL", "STEP", "DTYPE")}
    parser.add_argument("--whole", **named, help="add a row of a whole process")
    parser.add_argument("--only", **named, help=argparse.SUPPRESS)
    parser.add_argument("--held", **named, help=argparse.SUPPRESS)
    parser.add_argument("--models", default=",".join(TIMED))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--add", action="store_true", help="keep the rows of other models")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    for wanted, measure in ((options.only, measured), (options.held, held_by_a_process)):
        if wanted:
            model, step, dtype = wanted
            print(json.dumps(measure(model, step, dtype, options.batch)))
            return 0
    machine = calibrate()
    path = RESULTS / "cost.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if options.whole:
        model, step, dtype = options.whole
        row = whole_row_of(machine, model, step, dtype, options.batch)
        print(row)
        write("cost", {**known, "whole": [*known.get("whole", ()), row]})
        return 0
    rows = []
    if options.add:
        rows = [row for row in known["rows"] if row["model"] not in options.models.split(",")]
    for model in options.models.split(","):
        for dtype in DTYPES:
            for step in STEPS:
                rows.append(row_of(machine, model, step, dtype, options.batch))
                print(rows[-1], flush=True)
                write("cost", {**known, "conditions": conditions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
