"""Draw the curves of a sweep: accuracy and penalty over the penalty weight, or over another varied number."""

from collections.abc import Sequence
from typing import Any

from .plots import picture
from .sweep_grid import Grid, as_text
from .verdict import interval_of_mean

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_MARKERS = "o^sDvP"
_PANELS = (
    ("OOD test", "accuracy", (("head", "test_ood", "-"), ("heads", "test_ood", "--"))),
    ("ID test", "accuracy", (("head", "test_id", "-"), ("heads", "test_id", "--"))),
    ("Penalty, ID validation", "mean squared cosine", (("head", "penalty", "-"),)),
)


def draw_curves(grid: Grid, points: Sequence[Any]) -> bytes | None:
    """Draw the figure as PNG; None if no number varies.

    Args:
        points: ``sweep_report.Point`` of reported seeds.

    A line is a combination of the other varied settings, at most six of them, for the selected head (solid) and all
    heads (dashed); bars are 95 % bootstrap intervals over seeds, from three seeds on.
    """
    axis_name = _horizontal(grid)
    if axis_name is None:
        return None
    values = sorted(grid.varied[axis_name])
    places = {value: i for i, value in enumerate(values)}  # even steps: 0 has no logarithm
    lines: dict[str, list[Any]] = {}
    for point in points:
        rest = {k: v for k, v in point.values.items() if k != axis_name}
        label = ", ".join(f"{k} {as_text(v)}" for k, v in rest.items())
        lines.setdefault(label, []).append(point)

    def fill(figure: Any) -> None:
        axes = figure.subplots(1, 3)
        shown = list(lines.items())[: len(_COLOURS)]
        for axis, (title, unit, curves) in zip(axes, _PANELS, strict=True):
            for i, (label, own) in enumerate(shown):
                shift = 0.06 * (i - (len(shown) - 1) / 2)
                for kind, column, dash in curves:
                    name = f"{label}, " if label else ""
                    name += "selected head" if kind == "head" else "all heads"
                    look = {"color": _COLOURS[i], "marker": _MARKERS[i], "linestyle": dash}
                    _curve(axis, own, (axis_name, kind, column), places, shift, look, name)
            axis.set(title=title, ylabel=unit, xlabel=axis_name.replace("_", " "))
            axis.set_xticks(range(len(values)), [as_text(value) for value in values])
            if unit != "accuracy":
                axis.set_yscale("log")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))

    return picture(9.0, 3.4, fill)


def _curve(
    axis: Any,
    points: Sequence[Any],
    what: tuple[str, str, str],
    places: dict[Any, int],
    shift: float,
    look: dict[str, Any],
    name: str,
) -> None:
    axis_name, kind, column = what
    ordered = sorted(points, key=lambda point: places[point.values[axis_name]])
    x, means, below, above = [], [], [], []
    for point in ordered:
        values = [row[column] for row in getattr(point, kind)]
        mean = sum(values) / len(values)
        low, high = interval_of_mean(values) or (mean, mean)
        x.append(places[point.values[axis_name]] + shift)
        means.append(mean)
        below.append(max(0.0, mean - low))
        above.append(max(0.0, high - mean))
    axis.errorbar(x, means, yerr=[below, above], label=name, capsize=2, markersize=4, **look)


def _horizontal(grid: Grid) -> str | None:
    """Return the setting on the horizontal axis: the penalty weight, else the first varied number."""
    numbers = [
        name
        for name, values in grid.varied.items()
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    ]
    return "penalty_weight" if "penalty_weight" in numbers else next(iter(numbers), None)
