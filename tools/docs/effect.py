"""Draw ``docs/effect.svg``, what the default run shows, from its record: ``python -m tools.docs.effect``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diversevit_fast.experiment.metrics import SELECTED, find, of_run
from diversevit_fast.experiment.progress import NAMES
from diversevit_fast.experiment.verdict import Verdict, mean_of_pairs, verdicts
from tools.docs.default_run import RESULT, rows_of
from tools.docs.svg import LINE, picture, text

PICTURE = Path(__file__).parents[2] / "docs/effect.svg"
COLORS = {
    "erm": "#0072b2",
    "diversevit": "#d55e00",
}  # Okabe and Ito's, told apart by colour-blind readers too
WIDTH, HEIGHT = 860, 330
TOP, BOTTOM = 92, 268  # pixels of the panels' upper and lower end
GRID, MARK = "#d5dee7", 6


class Training(NamedTuple):
    """What is drawn of one training.

    Attributes:
        method: ``"erm"`` or ``"diversevit"``.
        alike: the mean absolute cosine of two heads' gradients after the last epoch.
        whole, alone: accuracy on the OOD test set of all heads, and of the selected head with the same weights.
    """

    method: str
    alike: float
    whole: float
    alone: float


class Axis(NamedTuple):
    """A vertical axis from ``low`` to ``high`` with a line at each of ``ticks``."""

    left: int
    right: int
    low: float
    high: float
    ticks: tuple[float, ...]

    def y(self, value: float) -> float:
        """The height of ``value`` in pixels from the top."""
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def draw(self) -> list[str]:
        """Return the lines and their numbers."""
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts += [
                f'<path d="M{self.left} {y:.1f}H{self.right}" stroke="{GRID}"/>',
                text(self.left - 8, y + 4, 12, f"{tick:g}", anchor="end", color=LINE),
            ]
        return parts


def trainings(result: Mapping[str, Any]) -> list[Training]:
    """Return what is drawn, by method and seed."""
    rows, found = rows_of(result), []
    for method in COLORS:
        for seed in result["settings"]["seeds"]:
            run = of_run(rows, method, seed)
            picked = SELECTED.pick(run)
            at = picked["epoch"], "test_ood"
            alike = mean_of_pairs(result["cosines"][f"{method}-seed{seed}"]["after"])
            whole, alone = (find(run, *at, heads)["accuracy"] for heads in ("all", picked["heads"]))
            found.append(Training(method, alike, whole, alone))
    return found


def draw(result: Mapping[str, Any]) -> str:
    """The SVG: gradients of heads by method on the left, accuracy before and after pruning on the right."""
    told = {verdict.claim: verdict for verdict in verdicts(rows_of(result), result["cosines"])}
    found = trainings(result)
    left = Axis(90, 370, 0.0, 0.15, (0.0, 0.05, 0.1, 0.15))
    right = Axis(500, 780, 0.4, 0.7, (0.4, 0.5, 0.6, 0.7))
    parts = [
        *_panel(left, "The penalty makes heads read differently", told["differ"]),
        *_panel(right, "Pruning to the selected head helps", told["prune"]),
        text(
            left.left,
            TOP - 14,
            13,
            "mean |cosine| of two heads' gradients",
            anchor="start",
            color=LINE,
        ),
        text(
            right.left, TOP - 14, 13, "OOD test accuracy, same weights", anchor="start", color=LINE
        ),
    ]
    columns = dict(zip(COLORS, (left.left + 80, left.right - 80), strict=True))
    for method, x in columns.items():
        parts.append(text(x, BOTTOM + 24, 14, NAMES[method], weight="bold", color=COLORS[method]))
    ends = right.left + 60, right.right - 60
    for x, label in zip(ends, ("all heads", "selected head"), strict=True):
        parts.append(text(x, BOTTOM + 24, 14, label, weight="bold"))
    seen = dict.fromkeys(COLORS, 0)
    for one in found:
        color, mark = COLORS[one.method], MARKS[one.method]
        aside = 14 * (seen[one.method] - 2)
        seen[one.method] += 1
        parts.append(mark(columns[one.method] + aside, left.y(one.alike), color))
        heights = right.y(one.whole), right.y(one.alone)
        parts.append(
            f'<path d="M{ends[0]} {heights[0]:.1f}L{ends[1]} {heights[1]:.1f}" stroke="{color}" '
            'stroke-width="1.5" opacity="0.7"/>'
        )
        parts += [mark(x, y, color) for x, y in zip(ends, heights, strict=True)]
    count = len(result["settings"]["seeds"])
    parts.append(
        text(
            WIDTH / 2,
            HEIGHT - 12,
            12,
            f"A mark is a training: {count} seeds of each method.",
            color=LINE,
        )
    )
    return picture(WIDTH, HEIGHT, parts)


def _panel(axis: Axis, title: str, verdict: Verdict) -> list[str]:
    said = f"{verdict.said}, p = {verdict.p:.2g}"
    return [
        text(axis.left - 40, 28, 17, title, weight="bold", anchor="start"),
        text(axis.left - 40, 49, 13, said, anchor="start", color=LINE),
        *axis.draw(),
    ]


def _circle(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:.1f}" r="{MARK}" fill="{color}" fill-opacity="0.8"/>'


def _square(x: float, y: float, color: str) -> str:
    side = 2 * MARK - 1
    corner = f'x="{x - side / 2:g}" y="{y - side / 2:.1f}"'
    return f'<rect {corner} width="{side}" height="{side}" fill="{color}" fill-opacity="0.8"/>'


MARKS: dict[str, Callable[[float, float, str], str]] = {"erm": _square, "diversevit": _circle}


def main() -> None:
    """Draw the picture again."""
    PICTURE.write_text(draw(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
