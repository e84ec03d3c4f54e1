"""What `every` and `fraction` cost and what they keep: training speed and accuracy under shift on MNIST-CIFAR.

``python -m benchmarks.amortised --source FILE.npz`` trains ERM and DiverseViT (preset quick) in each setting,
seed by seed, prints the table and stores ``benchmarks/results/amortised.json``. Speeds are those of the trainings, one
after another in one process: differences of a few per cent mean nothing.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from diversevit_fast.experiment.config import resolve
from diversevit_fast.experiment.metrics import SELECTED, Line, compare, read_csv
from diversevit_fast.experiment.run import run

from .timing import conditions, write

VARIANTS: dict[str, dict[str, Any]] = {
    "erm": {"methods": ["erm"]},
    **{
        f"{layers}{name}": {"methods": ["diversevit"], "layers": layers, **extra}
        for layers in ("last", "all")
        for name, extra in (("", {}), (", every 4", {"every": 4}), (", 1/4", {"fraction": 0.25}))
    },
}
"""Regularised layers and what is left out: settings of a run."""


def line_of(settings: dict[str, Any]) -> dict[str, Any]:
    """One variant, trained: seconds of a step (median over epochs and seeds), accuracies of the selected head."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(resolve(settings), Path(folder) / "run", console=Console(quiet=True))
        rows = read_csv(done / "metrics.csv")
    speeds = [row["steps_per_second"] for row in rows if row["steps_per_second"]]
    (line,) = [one for one in compare(rows) if one.rule == SELECTED]
    return {"step_ms": round(1e3 / statistics.median(speeds), 2), **_accuracies(line)}


def _accuracies(line: Line) -> dict[str, Any]:
    found = {"test_id": line.test_id, "test_ood": line.test_ood}
    return {name: [round(one.mean, 4), round(one.sd, 4)] for name, one in found.items()}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: cost over ERM's step, accuracies of the selected head."""
    lines = ["| penalty | x erm | ID test | OOD test |", "|---|---|---|---|"]
    for name, row in rows.items():
        accuracies = (f"{mean:.3f} ± {sd:.3f}" for mean, sd in (row["test_id"], row["test_ood"]))
        ratio = row["step_ms"] / rows["erm"]["step_ms"]
        lines.append(f"| {name} | {ratio:.2f} | {' | '.join(accuracies)} |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", required=True, help="prepared MNIST-CIFAR images (.npz)")
    parser.add_argument("--samples", type=int, default=378, help="images per split")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(given)
    shared = {"preset": "quick", "data": "mnist-cifar", "source": options.source}
    shared |= {"samples": options.samples, "epochs": options.epochs, "threads": options.threads}
    shared["seeds"] = list(range(options.seeds))
    rows = {}
    for name, extra in VARIANTS.items():
        rows[name] = line_of({**shared, **extra})
        print(name, rows[name], file=sys.stderr, flush=True)
    print(table(rows))
    recipe = {k: v for k, v in shared.items() if k != "source"}
    print(write("amortised", {"conditions": conditions(), "recipe": recipe, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
