"""``sweep.html`` and ``sweep.png``: curves over the penalty weight, tables, exact tests, and the best setting.

Pilot seeds and reported seeds never meet: ``choose`` sees rows of pilot seeds alone, and everything else rows of
reported seeds alone. Without pilot seeds nothing is called best.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import require
from ..files import write_atomically
from .metrics import SELECTED, Row, Rule
from .run_files import printable, write_text
from .sweep_folder import SweepFolder
from .sweep_grid import Grid, as_text
from .sweep_plots import draw_curves
from .sweep_results import rule_name
from .verdict import LEVEL, Verdict, by_labels, interval_of_mean

ALL_HEADS = rule_name(Rule("val_ood", single=False))
BEST_HEAD = rule_name(SELECTED)
PAGE, PICTURE = "sweep.html", "sweep.png"


@dataclass(frozen=True)
class Point:
    """The trainings of one combination of settings on the seeds of one role.

    Attributes:
        key: the combination, as ``key_of`` gives it.
        values: of the varied settings, by name.
        seeds: of its finished trainings.
        head, heads: rows of ``results.csv``: the selected head's, and those of all heads.
    """

    key: str
    values: dict[str, Any]
    seeds: list[int]
    head: list[Row]
    heads: list[Row]

    def of(self, column: str) -> list[float]:
        """Return what the selected heads have in a column."""
        return [row[column] for row in self.head]

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {as_text(value)}" for name, value in self.values.items())


@dataclass(frozen=True)
class Contrast:
    """A penalty weight against 0, all else equal.

    Attributes:
        verdict: on the selected heads' accuracy on the OOD test set.
        p_holm: of this contrast, corrected for all contrasts of the sweep by Holm's method.
    """

    point: Point
    control: Point
    verdict: Verdict
    p_holm: float

    @property
    def said(self) -> str:
        if self.p_holm >= LEVEL:
            return "cannot tell"
        return "better" if self.verdict.difference > 0 else "worse"


@dataclass(frozen=True)
class Choice:
    """The settings that pilot seeds chose.

    Attributes:
        point: the chosen combination on reported seeds; None if none of those is finished.
        label: of the combination.
        pilot: mean accuracy on OOD validation of the selected heads, on pilot seeds.
        among: how many combinations were tried.
    """

    point: Point | None
    label: str
    pilot: float
    among: int


def points_of(grid: Grid, rows: Sequence[Row], role: str) -> list[Point]:
    """Return the combinations that have finished trainings on the seeds of ``role``, in the grid's order."""
    kept = [row for row in rows if row["role"] == role]
    found = []
    for settings in grid.settings():
        names = {name: getattr(settings, name) for name in grid.varied}
        key = key_of(names)
        own = [row for row in kept if key_of({name: row[name] for name in names}) == key]
        head = [row for row in own if row["rule"] == BEST_HEAD]
        heads = [row for row in own if row["rule"] == ALL_HEADS]
        if head:
            found.append(Point(key, names, [row["seed"] for row in head], head, heads))
    return found


def key_of(values: Mapping[str, Any]) -> str:
    """Return what tells combinations apart."""
    return json.dumps({name: as_text(value) for name, value in values.items()}, sort_keys=True)


def contrasts(grid: Grid, points: Sequence[Point]) -> list[Contrast]:
    """Return every penalty weight's contrast with 0 at equal other settings.

    ``every`` and ``fraction`` mean nothing without a penalty, so one training of ERM is the control of them all.
    """
    pairs = []
    for point in points:
        if point.values.get("penalty_weight", 0) == 0:
            continue
        wanted = {**point.values, "penalty_weight": 0}
        wanted |= {k: v for k, v in {"every": 1, "fraction": 1.0}.items() if k in wanted}
        control = next((p for p in points if p.key == key_of(wanted)), None)
        if control is not None:
            found = by_labels("better", point.of("test_ood"), control.of("test_ood"))
            pairs.append((point, control, found))
    corrected = holm([verdict.p for _, _, verdict in pairs])
    return [
        Contrast(point, control, verdict, p)
        for (point, control, verdict), p in zip(pairs, corrected, strict=True)
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979, Scand. J. Statist. 6, 65-70)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def choose(pilots: Sequence[Point], seeds: int) -> tuple[Point, float] | None:
    """Return the combination with the highest mean on OOD validation, the first at a tie; with that mean.

    Args:
        pilots: of pilot seeds; a test set's numbers are not looked at.
        seeds: how many each combination must have; None is returned if one has fewer.
    """
    if not pilots or any(len(point.seeds) < seeds for point in pilots):
        return None
    means = [sum(values) / len(values) for values in (p.of("val_ood") for p in pilots)]
    best = max(range(len(pilots)), key=lambda i: (means[i], -i))
    return pilots[best], means[best]


def choices(grid: Grid, rows: Sequence[Row]) -> dict[str, Choice]:
    """Return what pilot seeds chose, by kind: with a penalty, and without; empty if pilots are missing."""
    pilots, reported = points_of(grid, rows, "pilot"), points_of(grid, rows, "reported")
    if not grid.pilot_seeds or len(pilots) < len(grid.settings()):
        return {}
    found = {}
    for kind, wanted in (("with a penalty", False), ("without", True)):
        own = [p for p in pilots if (_weight(grid, p) == 0) is wanted]
        best = choose(own, len(grid.pilot_seeds))
        if best is not None:
            there = next((p for p in reported if p.key == best[0].key), None)
            found[kind] = Choice(there, best[0].label, best[1], len(own))
    return found


def _weight(grid: Grid, point: Point) -> float:
    return point.values.get("penalty_weight", grid.fixed.penalty_weight)


def write_sweep_report(sweep: SweepFolder, rows: Sequence[Row]) -> Path:
    """Draw the picture and write the page from the rows of ``results.csv``.

    Raises:
        UsageError: a package is missing, or a file cannot be written.
    """
    grid = sweep.grid
    reported = points_of(grid, rows, "reported")
    picture = draw_curves(grid, reported) if reported else None
    if picture is not None:
        write_atomically(sweep.path / PICTURE, lambda file: file.write(picture))
    jinja = require("jinja2", extra="train")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = as_text
    progress, chosen = sweep.progress(), choices(grid, rows)
    page = environment.get_template("sweep.html.jinja").render(
        title=printable(sweep.path.name),
        grid=grid,
        record=sweep.record,
        progress=progress,
        cells=len(sweep.cells),
        points=[_described(point) for point in reported],
        pivots=_pivots(grid, reported),
        contrasts=contrasts(grid, reported),
        choices=chosen,
        compared=_compared(chosen),
        intervals={kind: _mean_with_interval(c.point) for kind, c in chosen.items()},
        picture=base64.b64encode(picture).decode("ascii") if picture else None,
        settings=len(grid.settings()),
        columns=COLUMNS,
        fixed=_fixed(grid),
    )
    write_text(sweep.path / PAGE, page)
    return sweep.path / PAGE


def _compared(chosen: Mapping[str, Choice]) -> Verdict | None:
    """Return the verdict on the best setting with a penalty against the best without, on reported seeds."""
    pair = [chosen[kind].point for kind in ("with a penalty", "without") if kind in chosen]
    if len(pair) < 2 or pair[0] is None or pair[1] is None:
        return None
    return by_labels("better", pair[0].of("test_ood"), pair[1].of("test_ood"))


def _mean_with_interval(point: Point | None) -> str:
    if point is None:
        return "no reported seed is finished"
    values = point.of("test_ood")
    interval = interval_of_mean(values)
    within = "" if interval is None else f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})"
    return f"{sum(values) / len(values):.3f}{within} over {len(values)} seeds"


_TABLE = {
    "OOD test": ("head", "test_ood"),
    "worst group": ("head", "worst_group"),
    "ID test": ("head", "test_id"),
    "OOD test, all heads": ("heads", "test_ood"),
    "penalty": ("head", "penalty"),
    "cosine": ("head", "cosine"),
    "dead heads": ("head", "dead_heads"),
}
COLUMNS = tuple(_TABLE)


def _fixed(grid: Grid) -> dict[str, Any]:
    """Return the settings that do not vary and are set at all."""
    left_out = (*grid.varied, "methods", "seeds", "erm_lr", "workers", "tensorboard", "fsdp")
    return {k: v for k, v in grid.fixed.to_json().items() if k not in left_out and v is not None}


def _described(point: Point) -> dict[str, Any]:
    return {"values": point.values, "seeds": len(point.seeds), "means": _means([point])}


def _means(points: Sequence[Point]) -> dict[str, str]:
    """Return means over all trainings of ``points``, as the tables show them."""
    found = {}
    for title, (kind, column) in _TABLE.items():
        values = [row[column] for point in points for row in getattr(point, kind)]
        mean = sum(values) / len(values)
        found[title] = f"{mean:.2g}" if column == "penalty" else f"{mean:.3f}"
    return found


def _pivots(grid: Grid, points: Sequence[Point]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each varied setting, a line per value: means over everything else."""
    return {
        name: [
            {
                "value": value,
                "trainings": sum(len(p.seeds) for p in own),
                "settings": len(own),
                "means": _means(own),
            }
            for value in values
            if (own := [p for p in points if as_text(p.values[name]) == as_text(value)])
        ]
        for name, values in grid.varied.items()
    }
