"""Draw the three figures of a report as PNG files, from rows and cosines alone.

They look alike wherever they are drawn: by Agg, in matplotlib's own style and ours, whatever
``MPLBACKEND`` or a ``matplotlibrc`` says. Neither these nor pyplot's figures are touched.
"""

import io
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError, require, usage_error
from ..files import write_atomically
from .metrics import SELECTED, Row, of_run, present
from .progress import NAMES

COLOURS = {"erm": "#0072B2", "diversevit": "#D55E00"}  # Okabe and Ito: blue, vermilion
MARKERS = {"erm": "o", "diversevit": "^"}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e0",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a8a85",
    "axes.labelcolor": "#33332f",
    "xtick.color": "#55554f",
    "ytick.color": "#55554f",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 180,
}
PICTURES = ("curves.png", "heads.png", "cosines.png")


def draw(rows: Sequence[Row], cosines: Mapping[str, Any], folder: Path) -> None:
    """Write ``PICTURES`` into ``folder``."""
    with _own_style():
        figures = (_curves(rows), _heads(rows), _cosines(cosines))
        for name, figure in zip(PICTURES, figures, strict=True):
            data = _png(figure)
            write_atomically(folder / name, lambda file, data=data: file.write(data))


def picture(width: float, height: float, fill: Callable[[Any], object], form: str = "png") -> bytes:
    """Return the PNG or SVG of a figure of a size in inches that ``fill`` has drawn on, in this module's style."""
    with _own_style():
        figure = _figure(width, height)
        fill(figure)
        return _png(figure) if form == "png" else _svg(figure)


def rehearse() -> None:
    """Draw a tiny figure before training, so that a broken matplotlib is reported early.

    Raises:
        UsageError: it is not installed, or cannot draw.
    """
    try:
        with _own_style():
            figure = _figure(1, 1)
            figure.subplots().set_title("0")
            _png(figure)
    except UsageError:
        raise
    except Exception as failure:  # of whatever this installation is made
        got = f"{type(failure).__name__}: {failure}"
        raise usage_error("matplotlib", "one that draws", got, "mend its installation") from None


@contextmanager
def _own_style() -> Iterator[None]:
    matplotlib = _matplotlib()
    style = require("matplotlib.style", extra="train")
    with matplotlib.rc_context(), style.context(["default", _STYLE]):
        yield


def _matplotlib() -> Any:
    """Import matplotlib; an unknown backend in the environment would make its import fail."""
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return require("matplotlib", extra="train")
    backend = os.environ.pop("MPLBACKEND")
    try:
        matplotlib = require("matplotlib", extra="train")
    finally:
        os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend  # pyplot's, if the caller uses that
    return matplotlib


def _png(figure: Any) -> bytes:
    agg = require("matplotlib.backends.backend_agg", extra="train")
    picture = io.BytesIO()
    agg.FigureCanvasAgg(figure)  # the figure's canvas from here on
    figure.savefig(picture, format="png", backend="agg")
    return picture.getvalue()


def _svg(figure: Any) -> bytes:
    """Return the same bytes for the same figure: no date, no random names."""
    matplotlib = require("matplotlib", extra="train")
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diversevit"}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches; made without pyplot, so it needs no display."""
    module = require("matplotlib.figure", extra="train")
    return module.Figure(figsize=(width, height), layout="constrained")


def _curves(rows: Sequence[Row]) -> Any:
    """Draw loss, penalty, ID and OOD accuracy over epochs: each seed thin, the mean thick."""
    panels = (
        ("Training loss", "cross-entropy (nats)", "train", "loss"),
        ("Penalty, ID validation", "mean squared cosine", "val_id", "penalty"),
        ("ID test", "accuracy", "test_id", "accuracy"),
        ("OOD test", "accuracy", "test_ood", "accuracy"),
    )
    figure = _figure(7.2, 5.4)
    axes = figure.subplots(2, 2, sharex=True).flat
    methods, seeds = present(rows)
    for axis, (title, unit, split, column) in zip(axes, panels, strict=True):
        for method in methods:
            runs = [_series(of_run(rows, method, seed), split, column) for seed in seeds]
            _mean_and_seeds(axis, [r for r in runs if r], COLOURS[method], NAMES[method], "-")
            if split == "test_ood":
                best = [_best_head(of_run(rows, method, seed)) for seed in seeds]
                label = f"{NAMES[method]}, best head"
                _mean_and_seeds(axis, [r for r in best if r], COLOURS[method], label, "--")
        axis.set(title=title, ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in figure.axes[2:]:
        axis.set_xlabel("epoch")
    handles, labels = figure.axes[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _series(run: Sequence[Row], split: str, column: str) -> dict[int, float]:
    return {r["epoch"]: r[column] for r in run if (r["split"], r["heads"]) == (split, "all")}


def _best_head(run: Sequence[Row]) -> dict[int, float]:
    """Return, per epoch, the OOD test accuracy of the head that is best on that epoch's OOD validation."""
    tests = {(r["epoch"], r["heads"]): r["accuracy"] for r in run if r["split"] == "test_ood"}
    picks = {
        epoch: SELECTED.pick([r for r in run if r["epoch"] == epoch])
        for epoch in dict.fromkeys(r["epoch"] for r in run)
    }
    return {epoch: tests[epoch, pick["heads"]] for epoch, pick in picks.items()}


def _mean_and_seeds(
    axis: Any, runs: Sequence[Mapping[int, float]], colour: str, label: str, style: str
) -> None:
    for run in runs if len(runs) > 1 else ():
        axis.plot(list(run), list(run.values()), style, color=colour, alpha=0.35, linewidth=0.8)
    epochs = [epoch for epoch in runs[0] if all(epoch in run for run in runs)] if runs else []
    means = [statistics.fmean(run[epoch] for run in runs) for epoch in epochs]
    marker = "." if len(epochs) == 1 else None
    axis.plot(epochs, means, style, color=colour, label=label, marker=marker)


def _heads(rows: Sequence[Row]) -> Any:
    """Draw ID against OOD test accuracy of every head, at the epoch of the selected head."""
    figure = _figure(5.8, 4.8)
    axis = figure.subplots()
    methods, seeds = present(rows)
    for method in methods:
        for seed in seeds:
            if run := of_run(rows, method, seed):
                _heads_of_run(axis, run, COLOURS[method], MARKERS[method])
    _legend_of_heads(axis, methods)
    axis.set(
        title="Heads of the last layer, each seed at the epoch of its selected head",
        xlabel="ID test accuracy",
        ylabel="OOD test accuracy",
    )
    return figure


def _heads_of_run(axis: Any, run: Sequence[Row], colour: str, marker: str) -> None:
    pick = SELECTED.pick(run)
    at = {(r["heads"], r["split"]): r["accuracy"] for r in run if r["epoch"] == pick["epoch"]}
    points = {h: (at[h, "test_id"], at[h, "test_ood"]) for h, split in at if split == "test_id"}
    x, y = zip(*(point for heads, point in points.items() if heads != "all"), strict=True)
    outline = {"facecolors": "none", "edgecolors": colour, "linewidths": 1.5}
    axis.scatter(x, y, s=34, color=colour, marker=marker, alpha=0.75, linewidths=0)
    axis.scatter(*points["all"], s=80, marker="s", **outline)
    axis.scatter(*points[pick["heads"]], s=130, marker=marker, **outline)


def _legend_of_heads(axis: Any, methods: Sequence[str]) -> None:
    def sample(label: str, colour: str, marker: str, **look: Any) -> Any:
        return axis.plot([], [], color=colour, marker=marker, linestyle="", label=label, **look)

    for method in methods:
        sample(f"{NAMES[method]}, one head", COLOURS[method], MARKERS[method], markersize=6)
    hollow = {"markerfacecolor": "none"}
    sample("outlined: selected on OOD validation", "#55554f", "o", markersize=11, **hollow)
    sample("all heads", "#55554f", "s", markersize=8, **hollow)
    axis.figure.legend(loc="outside lower center", ncols=2)


def _cosines(cosines: Mapping[str, Any]) -> Any:
    """Draw mean absolute cosines between heads before and after training, for each method's first seed."""
    first: dict[str, tuple[str, Any]] = {}
    for task, matrices in cosines.items():
        first.setdefault(task.partition("-")[0], (task, matrices))
    height = 0.6 + 2.4 * len(first)
    figure = _figure(5.6, height)
    axes = figure.subplots(len(first), 2, squeeze=False)
    image = None
    for line, (method, (task, matrices)) in zip(axes, first.items(), strict=True):
        for axis, when in zip(line, ("before", "after"), strict=True):
            image = _matrix(axis, matrices[when])
            seed = task.rpartition("seed")[2]
            axis.set_title(f"{NAMES[method]}, seed {seed}, {when}")
    figure.colorbar(image, ax=axes, shrink=0.7, label="mean absolute cosine (no unit)")
    return figure


def _matrix(axis: Any, matrix: Sequence[Sequence[float]]) -> Any:
    """Draw one H x H heat map; the diagonal, always 1, is left out."""
    heads = len(matrix)
    values = [
        [float("nan") if i == j else x for j, x in enumerate(r)] for i, r in enumerate(matrix)
    ]
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1)
    axis.set(xticks=range(heads), yticks=range(heads), xlabel="head", ylabel="head")
    axis.grid(visible=False)
    for i, row in enumerate(values if heads <= 8 else ()):
        for j, value in enumerate(row):
            if i != j:
                colour = "white" if value < 0.5 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    return image
