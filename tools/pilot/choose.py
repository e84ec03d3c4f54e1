"""What the measured cells choose, by the rule of docs/science/plan.md."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

MEASURED = ("all", "head", "selected", "live")
MOST_ALL = 0.55  # of all heads: the digit leads
LEAST_LIVE = 3
LEAST_HEAD = 0.55  # of the best head: there is something to select

Means = dict[str, float]


def means(lines: Sequence[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], Means]:
    """Return the means over the lines that agree in ``keys``, by the values of these, in order."""
    grouped = defaultdict(list)
    for line in lines:
        grouped[tuple(line[key] for key in keys)].append(line)
    return {
        cell: {name: fmean(line[name] for line in found) for name in MEASURED}
        for cell, found in sorted(grouped.items())
    }


def headroom(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[float, float], Means]:
    """Return the means of each (correlation, learning rate) of ERM, with its ``headroom``."""
    core = means([line for line in lines if line["kind"] == "core"], "lr")
    erm = means([line for line in lines if line["kind"] == "erm"], "correlation", "lr")
    return {
        (correlation, lr): {**found, "headroom": core[(lr,)]["all"] - found["selected"]}
        for (correlation, lr), found in erm.items()
    }


def choose_regime(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float, str]:
    """Return correlation, learning rate, and the conditions under which they were chosen."""
    cells = headroom(lines)
    conditions: list[tuple[str, Callable[[Means], bool]]] = [
        ("all heads at most 0.55", lambda cell: cell["all"] <= MOST_ALL),
        ("3 live heads", lambda cell: cell["live"] >= LEAST_LIVE),
        ("best head at least 0.55", lambda cell: cell["head"] >= LEAST_HEAD),
    ]
    for kept in (conditions, conditions[:2], conditions[:1]):
        fit = {
            where: cell for where, cell in cells.items() if all(holds(cell) for _, holds in kept)
        }
        if fit:
            best = max(fit, key=lambda where: fit[where]["headroom"])
            names = ", ".join(name for name, _ in kept)
            return *best, f"largest headroom ({fit[best]['headroom']:.3f}) where {names}"
    best = min(cells, key=lambda where: cells[where]["all"])
    return *best, "smallest accuracy of all heads; no cell meets a condition"


def choose_weight(lines: Sequence[Mapping[str, Any]], correlation: float, lr: float) -> float:
    """Return the penalty weight with the best selected head, the smallest at a tie."""
    here = [line for line in lines if (line["correlation"], line["lr"]) == (correlation, lr)]
    found = means(here, "penalty_weight")
    return max(found, key=lambda weight: found[weight]["selected"])[0]  # sorted: the first at a tie


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the means over seeds as a Markdown table."""
    head = "| trained | correlation | lr | weight | all | head | selected | live | headroom |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    kinds = {line["kind"] for line in lines}
    rooms = headroom(lines) if {"erm", "core"} <= kinds else {}
    for (kind, *cell), found in means(lines, "kind", "correlation", "lr", "penalty_weight").items():
        room = rooms.get((cell[0], cell[1])) if kind == "erm" else None
        last = f"{room['headroom']:.3f}" if room else ""
        where = "" if kind == "core" else f"{cell[0]:g}"
        weight = f"{cell[2]:g}" if kind == "diversevit" else ""
        numbers = " | ".join(f"{found[name]:.3f}" for name in ("all", "head", "selected"))
        rows.append(
            f"| {kind} | {where} | {cell[1]:g} | {weight} | {numbers} | {found['live']:.1f} | {last} |"
        )
    return "\n".join(rows)
