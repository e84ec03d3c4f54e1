"""Measure `every` and `fraction`: the cost of a step, and the accuracy under shift on MNIST-CIFAR.

The two are measured separately, so that trainings may share the machine with other work:

* ``python -m benchmarks.scripts.amortised cost``: steps of every setting in turn, in one process, on one thread
  and by the processor's time; a setting with ``every=k`` is timed over k consecutive steps, of which one takes
  the penalty.
* ``python -m benchmarks.scripts.amortised train --source FILE.npz --folder FOLDER``: ERM and DiverseViT in every
  setting, seed by seed, each training in a folder of its own. Run again, it skips the trainings that are finished and
  resumes the one that was interrupted.

Each prints the table and stores its part in ``benchmarks/results/amortised.json``; trainings do so one by one.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.timing import conditions, interleaved, summary, write
from diversevit_fast import HeadDiversity
from diversevit_fast.errors import UsageError, usage_error
from diversevit_fast.experiment.config import PRESETS, Settings, read_config, resolve
from diversevit_fast.experiment.metrics import SELECTED, Row, Summary, compare, read_csv
from diversevit_fast.experiment.run import resume, run
from diversevit_fast.experiment.train import training_loss
from diversevit_fast.models import DiverseViT

ERM = "erm"
VARIANTS: dict[str, dict[str, Any]] = {
    ERM: {},
    **{
        f"{layers}{name}": {"layers": layers, **extra}
        for layers in ("last", "all")
        for name, extra in (("", {}), (", every 4", {"every": 4}), (", 1/4", {"fraction": 0.25}))
    },
}
"""Setting -> arguments of ``HeadDiversity``; none for ERM."""

PRESET = "quick"


def _quick() -> tuple[nn.Module, tuple[int, int]]:
    return DiverseViT(**PRESETS[PRESET]["model"]), (64, 32)


def _vit_small() -> tuple[nn.Module, tuple[int, int]]:
    import timm

    return timm.create_model("vit_small_patch16_224", num_classes=2), (224, 224)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[int, int]]], int]] = {
    f"DiverseViT, preset {PRESET}": (_quick, PRESETS[PRESET]["batch_size"]),
    "ViT-S/16": (_vit_small, 4),
}
"""Models that the cost is measured on -> how they are made, with their image size, and images per step."""


def step_of(model: nn.Module, images: Tensor, variant: str) -> Callable[[], None]:
    """Return a function that trains ``model`` for one period: ``every`` consecutive steps of a variant."""
    options = VARIANTS[variant]
    labels = torch.arange(len(images)) % 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    draws = torch.Generator().manual_seed(0)
    diversity = HeadDiversity(model, **options, generator=draws)
    weight = 0.0 if variant == ERM else PRESETS[PRESET]["penalty_weight"]

    def step() -> None:
        _, loss, penalty = training_loss(model, diversity, images, labels, weight)
        optimizer.zero_grad(set_to_none=True)
        (loss if penalty is None else loss + weight * penalty).backward()
        optimizer.step()

    def period() -> None:
        for _ in range(options.get("every", 1)):
            step()

    return period


def cpu_seconds_of(job: Callable[[], object]) -> float:
    """Return the processor's time of one run, which excludes waiting for a core that others use."""
    begun = time.process_time()
    job()
    return time.process_time() - begun


def measure_cost(name: str, rounds: int, batch: int | None = None) -> dict[str, Any]:
    """Measure the mean step of every variant on a model of ``MODELS``: processor milliseconds, and the ratio to ERM's.

    Each variant trains a copy of its own, from the same weights.
    """
    make, usual = MODELS[name]
    jobs = {}
    for variant in VARIANTS:
        torch.manual_seed(0)
        model, size = make()
        jobs[variant] = step_of(model, torch.rand(batch or usual, 3, *size), variant)
    seconds = {
        variant: [taken / VARIANTS[variant].get("every", 1) for taken in each]
        for variant, each in interleaved(jobs, rounds, cpu_seconds_of).items()
    }
    found = {"batch": batch or usual, "rounds": rounds, "rows": summary(seconds, ERM)}
    return {"conditions": conditions(), **found}


def settings_of(variant: str, seed: int, shared: Mapping[str, Any]) -> Settings:
    """Return the settings of one training of a variant."""
    method = "erm" if variant == ERM else "diversevit"
    return resolve({**shared, **VARIANTS[variant], "methods": [method], "seeds": [seed]})


def trained(settings: Settings, folder: Path) -> list[Row]:
    """Return the rows of one training, which is run or resumed in ``folder`` if it is not finished.

    Raises:
        UsageError: the folder holds a training of other settings, or whatever the training raises.
    """
    partial, console = folder.with_name(f"{folder.name}.partial"), Console(quiet=True)
    begun = next((path for path in (folder, partial) if path.exists()), None)
    if begun is None:
        run(settings, folder, console=console)
    else:
        if Settings.from_json(read_config(begun / "config.json")) != settings:
            raise usage_error(
                "folder",
                "trainings of the settings asked for",
                f"others in {begun}",
                "take a new one",
            )
        if begun == partial:
            resume(folder, console=console)
    return read_csv(folder / "metrics.csv")


def train_all(
    shared: Mapping[str, Any], seeds: int, folder: Path, done: Callable[[str, dict[str, Any]], None]
) -> None:
    """Train every variant with one seed, then with the next; tell ``done`` each name and all rows so far."""
    rows: dict[str, list[Row]] = {variant: [] for variant in VARIANTS}
    for seed in range(seeds):
        for variant in VARIANTS:
            name = "".join(c if c.isalnum() else "-" for c in variant) + f"-seed{seed}"
            settings = settings_of(variant, seed, shared)
            rows[variant] += trained(settings, folder / name)
            done(name, {v: accuracies(found) for v, found in rows.items() if found})


def accuracies(rows: list[Row]) -> dict[str, Any]:
    """Return means and deviations over seeds: of the selected head, and of all heads after the last epoch."""
    (line,) = [one for one in compare(rows) if one.rule == SELECTED]
    last = max(row["epoch"] for row in rows)
    whole = [r for r in rows if (r["epoch"], r["heads"]) == (last, "all")]
    found = {
        "test_id": line.test_id,
        "test_ood": line.test_ood,
        "all_heads_test_ood": Summary.of(
            [r["accuracy"] for r in whole if r["split"] == "test_ood"]
        ),
        "train": Summary.of([r["accuracy"] for r in whole if r["split"] == "train"]),
    }
    return {"seeds": line.test_id.count} | {
        name: [round(one.mean, 4), round(one.sd, 4)] for name, one in found.items()
    }


def table(result: Mapping[str, Any]) -> str:
    """Return Markdown: each variant's cost over ERM's, and accuracies of the selected head; blank where unknown."""
    costs = result.get("cost", {})
    found = result.get("training", {}).get("rows", {})
    head = ["penalty", *(f"x erm, {name}" for name in costs), "seeds", "ID test", "OOD test"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant in VARIANTS:
        cells = [f"{cost['rows'][variant]['ratio']:.2f}" for cost in costs.values()]
        if row := found.get(variant):
            cells += [str(row["seeds"])]
            cells += [f"{mean:.3f} ± {sd:.3f}" for mean, sd in (row["test_id"], row["test_ood"])]
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join([variant, *cells])} |")
    return "\n".join(lines)


def store(part: str, value: Any) -> dict[str, Any]:
    """Replace one part of ``benchmarks/results/amortised.json``; the other stays."""
    path = timing.RESULTS / "amortised.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result[part] = value
    write("amortised", result)
    return result


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    cost = parts.add_parser("cost", help="steps in turn")
    cost.add_argument("--rounds", type=int, default=9)
    cost.add_argument("--batch", type=int, help="images per step; the model's usual number")
    training = parts.add_parser("train", help="accuracies")
    training.add_argument("--source", required=True, help="prepared MNIST-CIFAR images (.npz)")
    training.add_argument("--folder", required=True, type=Path, help="where the trainings are kept")
    training.add_argument("--samples", type=int, help="images per split; all")
    training.add_argument("--epochs", type=int, default=20)
    training.add_argument("--seeds", type=int, default=2)
    training.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(given)
    try:
        result = _cost(options) if options.part == "cost" else _train(options)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    print(table(result))
    return 0


def _cost(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)  # several wait for each other, which is processor time too
    return store(
        "cost", {name: measure_cost(name, options.rounds, options.batch) for name in MODELS}
    )


def _train(options: argparse.Namespace) -> dict[str, Any]:
    names = ("samples", "epochs", "threads")
    recipe = {"preset": PRESET, "data": "mnist-cifar"} | {n: getattr(options, n) for n in names}
    result: dict[str, Any] = {}

    def done(name: str, rows: dict[str, Any]) -> None:
        nonlocal result
        what = {"conditions": conditions(), "recipe": {**recipe, "seeds": options.seeds}}
        result = store("training", {**what, "rows": rows})
        print(f"{datetime.now():%H:%M:%S} {name}", file=sys.stderr, flush=True)

    train_all({**recipe, "source": options.source}, options.seeds, options.folder, done)
    return result


if __name__ == "__main__":
    sys.exit(main())
