"""Keep sweeps of models of several widths, and write the tables of docs/science/widths.md from them.

``python -m tools.docs.widths WIDTH_FOLDER... --cpu-seconds N`` keeps what the page needs of finished sweeps, one per
width, in docs/science/results/widths.json. Then, and without folders, it writes the tables between the page's markers.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diversevit_fast.experiment.sweep_costs import COSTS
from diversevit_fast.experiment.sweep_folder import SweepFolder
from diversevit_fast.experiment.sweep_grid import Grid, as_text
from diversevit_fast.experiment.sweep_report import Contrast, Point, contrasts, holm, points_of
from diversevit_fast.experiment.sweep_results import Results
from diversevit_fast.experiment.verdict import interval_of_mean
from diversevit_fast.models import DiverseViT
from tools.docs.kept_run import write_tables
from tools.docs.sweep_tables import compact

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/science/widths.md"
RESULT = ROOT / "docs/science/results/widths.json"
FLOPS, PEAK = COSTS[:2]


def kept_of(folder: Path) -> dict[str, Any]:
    """What the page needs of one width's sweep, with the predicted costs of a step by penalty weight."""
    kept = compact(folder)
    sweep = SweepFolder.open(folder)
    rows = Results(sweep).rows(sweep.progress().done)
    costs = {as_text(row["penalty_weight"]): [row[FLOPS], row[PEAK]] for row in rows}
    return {**kept, "costs": costs}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by the names of their markers."""
    sweeps = result["sweeps"]
    grids = [Grid.from_json(sweep["grid"]) for sweep in sweeps]
    points = [points_of(g, s["rows"], "reported") for g, s in zip(grids, sweeps, strict=True)]
    found = [c for g, own in zip(grids, points, strict=True) for c in contrasts(g, own)]
    corrected = holm([contrast.verdict.p for contrast in found])
    samples = sweeps[0]["samples"]
    counts = ", ".join(f"{name} {count:,}" for name, count in samples.items())
    commits = sorted({row["commit"] for sweep in sweeps for row in sweep["rows"]})
    done, planned = sum(len(s["rows"]) // 2 for s in sweeps), sum(s["cells"] for s in sweeps)
    fixed = grids[0].fixed
    facts = [
        f"* commit {', '.join(commits)}, torch {sweeps[0]['torch']}, one thread; {done} of {planned} trainings are "
        "finished",
        f"* seeds {', '.join(map(str, grids[0].seeds))}; {fixed.epochs} epochs in batches of {fixed.batch_size}; "
        f"learning rate {fixed.lr:g}",
        f"* images: {counts}",
        f"* {result['cpu_seconds']:.0f} s of processor time in all processes",
    ]
    return {
        "facts": "\n".join(facts),
        "widths": _table(
            (
                *("width", "parameters", "penalty weight", "FLOPs of a step", "peak of a step"),
                *("OOD test, selected head", "OOD test, all heads", "ID test, all heads"),
                "cosine",
            ),
            [
                _width_line(point, sweep, grid)
                for own, sweep, grid in zip(points, sweeps, grids, strict=True)
                for point in own
            ],
        ),
        "contrasts": _table(
            (
                *("width", "penalty 10 against 0: OOD test", "95 % interval", "p", "p, Holm"),
                *("smallest p possible", "says"),
            ),
            [
                _contrast_line(contrast, p, grid)
                for contrast, p, grid in zip(found, corrected, grids, strict=True)
            ],
        ),
    }


def _width_line(point: Point, sweep: Mapping[str, Any], grid: Grid) -> list[str]:
    weight = as_text(point.values["penalty_weight"])
    flops, peak = sweep["costs"][weight]
    low, high = interval_of_mean(point.of("test_ood")) or (float("nan"), float("nan"))
    return [
        str(grid.fixed.model["dim"]),
        f"{_parameters(grid) / 1e3:,.0f} k",
        weight,
        f"{flops / 1e9:.2f} G",
        f"{peak / 2**20:.0f} MiB",
        f"{_mean(point.head, 'test_ood'):.3f} ({low:.3f} to {high:.3f})",
        f"{_mean(point.heads, 'test_ood'):.3f}",
        f"{_mean(point.heads, 'test_id'):.3f}",
        f"{_mean(point.head, 'cosine'):.3f}",
    ]


def _contrast_line(contrast: Contrast, p: float, grid: Grid) -> list[str]:
    verdict = contrast.verdict
    low, high = verdict.interval or (float("nan"), float("nan"))
    says = "cannot tell" if p >= 0.05 else "better" if verdict.difference > 0 else "worse"
    return [
        str(grid.fixed.model["dim"]),
        f"{verdict.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{verdict.p:.2g}",
        f"{p:.2g}",
        f"{verdict.least_p:.2g}",
        says,
    ]


def _parameters(grid: Grid) -> int:
    return sum(p.numel() for p in DiverseViT(**grid.fixed.model).parameters())


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep sweeps, if some are given, and write the page."""
    parser = argparse.ArgumentParser("python -m tools.docs.widths", description=__doc__)
    parser.add_argument("sweeps", nargs="*", type=Path)
    parser.add_argument("--cpu-seconds", type=float)
    given = parser.parse_args(arguments)
    if given.sweeps:
        if given.cpu_seconds is None:
            parser.error("sweeps need --cpu-seconds")
        sweeps = [kept_of(folder) for folder in given.sweeps]
        result = {"cpu_seconds": given.cpu_seconds, "sweeps": sweeps}
        RESULT.write_text(json.dumps(result) + "\n", encoding="utf-8")
    write_tables(PAGE, tables(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
