"""Hold ``dvf.cost`` against measured steps on this CPU: time by the processor's clock, and the peak of memory.

``python -m benchmarks.scripts.cost`` measures the machine (``dvf.cost``'s calibration), then every row in a process of
its own, one thread, and stores ``benchmarks/results/cost.json``. A step is loss, backward and AdamW. The peak is what a
step adds to the resident memory of a process that has run one, with glibc's ``MALLOC_MMAP_THRESHOLD_`` fixed; the
predicted one is without parameters, optimizer state, batch and the scratch memory that threads keep.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import timm
import torch

import diversevit_fast as dvf
from benchmarks.runner import peak_bytes
from benchmarks.timing import RESULTS, conditions, write
from diversevit_fast.cost.calibration import calibrate
from diversevit_fast.cost.counting import StepCounter
from diversevit_fast.cost.step import take_step

MODELS = {
    "ViT-Ti": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
}
STEPS: dict[str, str | None] = {"erm": None, "last": "last", "all": "all"}
DTYPES = ("float32", "bfloat16")
ROUNDS = 3
BEFORE = ("parameters", "optimizer state", "batch", "workspace")
"""Parts of the peak that are there before a step begins: threads keep their scratch memory."""


def measured(model: str, step: str, dtype: str, batch: int) -> dict[str, float]:
    """Processor seconds of a step, the median of some, and the bytes that one adds at its peak."""
    torch.manual_seed(0)
    made = timm.create_model(MODELS[model], num_classes=10).train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
    layers = STEPS[step]
    diversity = None if layers is None else dvf.HeadDiversity(made, layers=layers)
    data = torch.rand(batch, 3, 224, 224), torch.arange(batch) % 10
    uncounted = StepCounter()  # takes the phases, and is not entered

    def once() -> None:
        take_step(made, diversity, data, getattr(torch, dtype), optimizer, uncounted)

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


def row_of(machine: Any, model: str, step: str, dtype: str, batch: int) -> dict[str, Any]:
    """A row: what was predicted and what a process measures."""
    with torch.device("meta"):
        made = timm.create_model(MODELS[model], num_classes=10)
    found = dvf.cost(made, STEPS[step], batch=batch, dtype=dtype, device=machine)
    assert found.seconds is not None
    before = sum(found.peak.parts[part] for part in BEFORE)
    command = [sys.executable, "-m", "benchmarks.scripts.cost", "--only", model, step, dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(
        [*command, "--batch", str(batch)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    real = json.loads(done.stdout.splitlines()[-1])
    return {
        **{"model": model, "step": step, "dtype": dtype, "batch": batch},
        "predicted_seconds": round(found.seconds.step, 4),
        "seconds": round(real["seconds"], 4),
        "predicted_bytes": found.peak_bytes - before,
        "bytes": real["bytes"],
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "STEP", "DTYPE"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--add", action="store_true", help="keep the rows of other models")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    if options.only:
        model, step, dtype = options.only
        print(json.dumps(measured(model, step, dtype, options.batch)))
        return 0
    machine = calibrate()
    rows = []
    if options.add:
        known = json.loads((RESULTS / "cost.json").read_text("utf-8"))["rows"]
        rows = [row for row in known if row["model"] not in options.models.split(",")]
    for model in options.models.split(","):
        for dtype in DTYPES:
            for step in STEPS:
                rows.append(row_of(machine, model, step, dtype, options.batch))
                print(rows[-1], flush=True)
                write("cost", {"conditions": conditions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
