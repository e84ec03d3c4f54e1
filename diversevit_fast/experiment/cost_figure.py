"""Draw what a step with the penalty costs over one without it, against the sizes of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cost.sizes import ERM, Sized, over_erm
from ..errors import usage_error
from ..files import write_atomically
from .plots import picture

FORMS = ("png", "svg")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_MARKERS = "o^sDvP"
_TICKS = (1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
_LABELS = {
    "width": "model width",
    "depth": "layers",
    "tokens": "tokens of an image",
    "batch": "samples of a step",
}


def form_of(path: str) -> str:
    """The form of a figure that the ending of its file's name asks for: ``"png"`` or ``"svg"``.

    Raises:
        UsageError: another ending.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in FORMS:
        wanted = "a name that ends in .png or .svg"
        raise usage_error("figure", wanted, repr(path), "say --figure cost.png")
    return form


def draw_sizes(found: Sequence[Sized], title: str, path: str) -> None:
    """Write the figure of ``cost_by_size``: a panel per axis, a line per step, both axes logarithmic.

    Args:
        found: steps that include ``"erm"``, over whose cost the others stand.
        title: says what the sizes are varied of.
        path: of the file, which ends in ``.png`` or ``.svg``.
    """
    form, ratios = form_of(path), over_erm(found)
    axes = list(dict.fromkeys(axis for axis, _ in ratios))
    steps = [step for step in dict.fromkeys(step for _, step in ratios) if step != ERM]
    timed = found[0].cost.seconds is not None

    def fill(figure: Any) -> None:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            for i, step in enumerate(steps):
                _line(panel, ratios[axis, step], step, i)
            _scales(panel, list(ratios[axis, steps[0]]))
            panel.axhline(1, color="#8a8a85", linewidth=0.8)
            panel.set(title=axis, xlabel=_LABELS[axis])
        panels[0].set_ylabel(f"{'time' if timed else 'FLOPs'} of a step over ERM's")
        _ratio_ticks(panels[0], [x for line in ratios.values() for x in line.values()])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))

    data = picture(2.4 * len(axes) + 0.6, 3.2, fill, form)
    write_atomically(Path(path), lambda file: file.write(data))


def _line(panel: Any, points: Mapping[int, float], step: str, i: int) -> None:
    look = {"color": _COLOURS[i % 6], "marker": _MARKERS[i % 6], "markersize": 5}
    panel.plot(list(points), list(points.values()), label=f"penalty: {step}", **look)


def _scales(panel: Any, sizes: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()


def _ratio_ticks(panel: Any, ratios: Sequence[float]) -> None:
    low, high = 0.96 * min(ratios), 1.08 * max(ratios)
    ticks = [x for x in _TICKS if low <= x <= high]
    panel.set_ylim(min(low, 0.96), max(high, 1.25))
    panel.set_yticks(ticks, [f"{x:g}" for x in ticks])
    panel.minorticks_off()
