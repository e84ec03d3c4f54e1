"""Keep a sweep's results as compact JSON, and write the tables of its page from that.

``python -m tools.docs.sweep_tables SWEEP_FOLDER RESULTS.json`` keeps them, ``--add`` beside those of other seeds that
are kept there; ``python -m tools.docs.sweep_tables RESULTS.json PAGE.md`` writes the part of the page between
``<!-- results:begin -->`` and ``<!-- results:end -->``.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diversevit_fast.experiment.sweep_folder import SweepFolder
from diversevit_fast.experiment.sweep_grid import Grid, as_text, said_of
from diversevit_fast.experiment.sweep_report import (
    ALL_HEADS,
    BEST_HEAD,
    Contrast,
    Point,
    contrasts,
    points_of,
)
from diversevit_fast.experiment.sweep_results import Results
from diversevit_fast.experiment.verdict import interval_of_mean

KEPT = (
    *("rule", "role", "seed", "commit", "epoch", "heads"),
    *("val_ood", "test_id", "test_ood", "worst_group", "penalty", "cosine", "dead_heads"),
)
_SECTION = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)


def compact(folder: Path) -> dict[str, Any]:
    """Return what a page needs of a sweep: the grid, versions, and rows of the selected head and of all heads."""
    sweep = SweepFolder.open(folder)
    rows = Results(sweep).rows(sweep.progress().done)
    grid = sweep.grid.to_json()
    grid["fixed"] = json.loads(said_of(sweep.grid.fixed, ("seeds", "source", "threads", "workers")))
    return {
        "grid": grid,
        "cells": len(sweep.cells),
        "torch": sweep.record["versions"]["torch"],
        "samples": {
            name: split["samples"]
            for name, split in next(iter(sweep.record["splits"].values())).items()
        },
        "rows": [
            {name: _short(row[name]) for name in (*sweep.grid.varied, *KEPT)}
            for row in rows
            if row["rule"] in (BEST_HEAD, ALL_HEADS)
        ],
    }


def added(kept: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return two sweeps' results as one's: the same settings and data, other seeds.

    Raises:
        ValueError: the sweeps differ in more than seeds, or share one.
    """
    for name in ("fixed", "varied", "pilot_seeds"):
        if kept["grid"][name] != more["grid"][name]:
            raise ValueError(f"the sweeps differ in {name}")
    if kept["samples"] != more["samples"]:
        raise ValueError("the sweeps differ in samples")
    trained = [{row["seed"] for row in results["rows"]} for results in (kept, more)]
    if both := trained[0] & trained[1]:
        raise ValueError(f"both sweeps have trained seed {min(both)}")
    seeds = sorted({*kept["grid"]["seeds"], *more["grid"]["seeds"]})
    settings = kept["cells"] // len(kept["grid"]["seeds"])
    versions = dict.fromkeys((*kept["torch"].split(", "), *more["torch"].split(", ")))
    return {
        **kept,
        "grid": {**kept["grid"], "seeds": seeds},
        "cells": settings * len(seeds),
        "torch": ", ".join(versions),
        "rows": [*kept["rows"], *more["rows"]],
    }


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables of a page: every setting, and every penalty weight against 0."""
    grid = Grid.from_json(results["grid"])
    points = points_of(grid, results["rows"], "reported")
    commits = sorted({row["commit"] for row in results["rows"]})
    done = len(results["rows"]) // 2
    samples = ", ".join(f"{name} {count:,}" for name, count in results["samples"].items())
    lines = [
        f"Commit {', '.join(commits)}, torch {results['torch']}; {done} of {results['cells']} trainings are finished. "
        f"Images: {samples}.",
        "",
        *_table(
            [
                *grid.varied,
                "seeds",
                "OOD test, selected head",
                "OOD test, all heads",
                "ID test, selected head",
                *("penalty", "cosine", "dead heads"),
            ],
            [_setting(point) for point in points],
        ),
        *_table(
            [
                *grid.varied,
                "against 0: OOD test",
                "95 % interval",
                "p",
                "p, Holm",
                "smallest p possible",
                "says",
            ],
            [_contrast(contrast) for contrast in contrasts(grid, points)],
        ),
    ]
    return "\n".join(lines)


def with_tables(page: str, results: Mapping[str, Any]) -> str:
    """Return a page's text with its tables written anew.

    Raises:
        ValueError: it has no place for them.
    """
    if len(_SECTION.findall(page)) != 1:
        raise ValueError("one pair of results:begin and results:end is wanted")
    return _SECTION.sub(lambda found: f"{found[1]}{tables(results)}{found[2]}", page)


def _setting(point: Point) -> list[str]:
    def mean(kind: str, column: str, form: str = "{:.3f}") -> str:
        values = [row[column] for row in getattr(point, kind)]
        return form.format(sum(values) / len(values))

    interval = interval_of_mean(point.of("test_ood"))
    within = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return [
        *map(as_text, point.values.values()),
        str(len(point.seeds)),
        mean("head", "test_ood") + within,
        mean("heads", "test_ood"),
        mean("head", "test_id"),
        mean("head", "penalty", "{:.1e}"),
        mean("head", "cosine"),
        mean("head", "dead_heads", "{:.1f}"),
    ]


def _contrast(contrast: Contrast) -> list[str]:
    verdict = contrast.verdict
    low, high = verdict.interval or (None, None)
    return [
        *map(as_text, contrast.point.values.values()),
        f"{verdict.difference:+.3f}",
        "" if low is None else f"{low:+.3f} to {high:+.3f}",
        f"{verdict.p:.2g}",
        f"{contrast.p_holm:.2g}",
        f"{verdict.least_p:.2g}",
        contrast.said,
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    head = [title.replace("_", " ") for title in titles]
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(*arguments: str) -> None:
    *options, source, target = arguments
    path = Path(target)
    if Path(source).is_dir():
        kept = compact(Path(source))
        if options == ["--add"]:
            kept = added(json.loads(path.read_text("utf-8")), kept)
        rows = ",\n".join(json.dumps(row) for row in kept.pop("rows"))
        text = json.dumps(kept, indent=1)[:-2]
        path.write_text(f'{text},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")
        return
    results = json.loads(Path(source).read_text("utf-8"))
    path.write_text(with_tables(path.read_text("utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
