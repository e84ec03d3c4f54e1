"""Draw what each head does, from the rows of ``metrics.csv`` and the probes of the selected weights.

Everything is told apart by shape as well as by colour; colours are Okabe and Ito's, or viridis.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import require
from ..files import write_atomically
from ..probes.head_probes import HeadProbes
from .metrics import SELECTED, Row, of_run
from .plots import COLOURS, MARKERS, picture
from .progress import NAMES

_GREY = "#55554f"
_ATTRIBUTES = {"core": ("#009E73", ""), "spurious": ("#CC79A7", "////")}  # green; purple, hatched
_SAID = {"core": "core attribute", "spurious": "spurious attribute"}


_First = dict[str, tuple[str, HeadProbes]]
"""By method, the first training and its probes."""


class Picture(NamedTuple):
    """A picture that was drawn: its file, what it shows in words, and how to read it."""

    file: str
    alternative: str
    caption: str


_USE = Picture(
    "use.png",
    "Heads in the plane of the attributes they use",
    "What heads use. Each point is one head of the last layer by itself; right is agreement with the spurious "
    "attribute, up with the core one, both independent here. Dotted: chance. A head that reads one attribute alone "
    "is at the end of one dotted line; hollow points say nearly the same of every image.",
)
_SUBSETS = Picture(
    "subsets.png",
    "Accuracy in and out of distribution of all subsets of heads",
    "Every subset of the last layer’s heads, on both test sets. Dotted: chance. The head that was selected lies well "
    "where no other point is above its ring; points to the right but low rest on the spurious attribute.",
)
_DECODED = Picture(
    "decoded.png",
    "Accuracy of linear probes of each head, beside what the head uses",
    "What heads hold. A bar is the accuracy of a linear classifier of the attribute from the head’s output, on images "
    "it was not fitted on; the line across it is that with shuffled outputs. The diamond is what the head alone "
    "uses: a tall bar with a low diamond is held, and not used.",
)
_MAPS = Picture(
    "maps.png",
    "Attention of the class token for each head on one image of each group",
    "Where heads look: the class token’s attention to the patches of one image of each group, relative to attention "
    "that is spread evenly (1). Colours go with its square root.",
)
_CKA = Picture(
    "cka.png",
    "Linear CKA between heads",
    "How alike the heads’ outputs are (linear CKA over the test images): 1 is the same up to rotation and scale, 0 "
    "unrelated; a dash is a head that is constant. Unlike the cosines above, this compares what heads give, "
    "not what they are asked for.",
)


def draw_heads(
    rows: Sequence[Row], probes: Mapping[str, HeadProbes], folder: Path
) -> list[Picture]:
    """Write the pictures that can be drawn of the probes, by training, into ``folder``; return them in order."""
    first: _First = {}
    for task, found in probes.items():
        first.setdefault(task.partition("-seed")[0], (task, found))
    drawn: dict[Picture, tuple[float, float, Any]] = {}
    methods = len(first)
    if all("kind" in found.table[0] for found in probes.values()):
        drawn[_USE] = (5.8, 5.4, partial(_use, rows, probes))
    if all(found.extra.get("subsets") for found in probes.values()):
        drawn[_SUBSETS] = (3.6 * methods + 0.8, 4.2, partial(_subsets, rows, probes))
    if all("decode_core" in found.table[0] for _, found in first.values()):
        drawn[_DECODED] = (3.4 * methods + 0.4, 3.6, partial(_decoded, first))
    if all(found.extra.get("examples") for _, found in first.values()):
        drawn[_MAPS] = (7.6, _maps_height(first), partial(_maps, first))
    if all(found.cka for _, found in first.values()):
        drawn[_CKA] = (2.9 * methods + 0.8, 3.0, partial(_cka, first))
    for shown, maker in drawn.items():
        data = picture(*maker)
        write_atomically(folder / shown.file, lambda file, data=data: file.write(data))
    return list(drawn)


def _by_method(probes: Mapping[str, HeadProbes]) -> dict[str, list[tuple[str, HeadProbes]]]:
    found: dict[str, list[tuple[str, HeadProbes]]] = {}
    for task, one in probes.items():
        found.setdefault(task.partition("-seed")[0], []).append((task, one))
    return found


def _selected(rows: Sequence[Row], task: str) -> int:
    """Return the head that was selected on OOD validation."""
    method, _, seed = task.partition("-seed")
    return int(SELECTED.pick(of_run(rows, method, int(seed)))["heads"])


def _last(found: HeadProbes) -> list[dict[str, Any]]:
    """Return the rows of the last layer that was probed."""
    return [row for row in found.table if row["layer"] == found.table[-1]["layer"]]


def _use(rows: Sequence[Row], probes: Mapping[str, HeadProbes], figure: Any) -> None:
    axis = figure.subplots()
    for method, trainings in _by_method(probes).items():
        look = {"marker": MARKERS[method], "edgecolors": COLOURS[method]}
        for task, found in trainings:
            heads = _last(found)
            for row in heads:
                face = "none" if row["kind"] == "dead" else COLOURS[method]
                at = row["use_spurious"], row["use_core"]
                axis.scatter(*at, s=38, facecolors=face, alpha=0.75, **look)
            chosen = heads[_selected(rows, task)]
            at = chosen["use_spurious"], chosen["use_core"]
            axis.scatter(*at, s=170, facecolors="none", linewidths=1.6, **{**look, "marker": "o"})
            whole = found.whole["use_spurious"], found.whole["use_core"]
            axis.scatter(*whole, s=60, marker="x", color=COLOURS[method], linewidths=1.6)
    values = next(iter(probes.values())).values
    _chance(axis, 1 / values["spurious"], 1 / values["core"])
    _square(axis)
    axis.set(
        title="Heads of the last layer, at the epoch of the selected head",
        xlabel="agreement with the spurious attribute",
        ylabel="agreement with the core attribute (the label)",
    )
    for method in _by_method(probes):
        _sample(axis, f"{NAMES.get(method, method)}, one head", COLOURS[method], MARKERS[method])
    _sample(axis, "hollow: a dead head", _GREY, "o", markerfacecolor="none")
    _sample(axis, "ringed: selected", _GREY, "o", markersize=11, markerfacecolor="none")
    _sample(axis, "all heads", _GREY, "x")
    figure.legend(loc="outside lower center", ncols=3)


def _subsets(rows: Sequence[Row], probes: Mapping[str, HeadProbes], figure: Any) -> None:
    methods = _by_method(probes)
    axes = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
    most = max(len(s["heads"]) for found in probes.values() for s in found.extra["subsets"])
    points = None
    for axis, (method, trainings) in zip(axes, methods.items(), strict=True):
        for task, found in trainings:
            subsets = found.extra["subsets"]
            x, y = ([s[split] for s in subsets] for split in ("test_id", "test_ood"))
            sizes = [len(s["heads"]) for s in subsets]
            look = {"cmap": "viridis_r", "vmin": 0.5, "vmax": most + 0.5}
            points = axis.scatter(x, y, c=sizes, s=22, marker=MARKERS[method], alpha=0.85, **look)
            pick = sizes.index(1) + _selected(rows, task)
            whole = {"s": 80, "marker": "s", "facecolors": "none", "edgecolors": _GREY}
            axis.scatter(x[-1], y[-1], **whole)
            axis.scatter(x[pick], y[pick], **{**whole, "s": 150, "marker": "o"}, linewidths=1.5)
        chance = 1 / next(iter(trainings))[1].values["core"]
        _chance(axis, chance, chance)
        axis.set(title=NAMES.get(method, method), xlabel="ID test accuracy")
    axes[0].set_ylabel("OOD test accuracy")
    for low, high, limit in (
        (*axes[0].get_xlim(), axes[0].set_xlim),
        (*axes[0].get_ylim(), axes[0].set_ylim),
    ):
        limit(min(low, 0.45), max(high, 0.7))  # a difference of nothing is not drawn large
    axes[0].locator_params(nbins=6)
    ticks = range(1, most + 1)
    figure.colorbar(points, ax=axes, ticks=ticks, shrink=0.7, label="number of heads")
    _sample(axes[0], "ringed: selected head", _GREY, "o", markersize=11, markerfacecolor="none")
    _sample(axes[0], "all heads", _GREY, "s", markersize=8, markerfacecolor="none")
    figure.legend(loc="outside lower center", ncols=2)


def _decoded(first: _First, figure: Any) -> None:
    axes = figure.subplots(1, len(first), squeeze=False, sharey=True)[0]
    for axis, (method, (task, found)) in zip(axes, first.items(), strict=True):
        heads = _last(found)
        width = 0.8 / len(found.values)
        for i, attribute in enumerate(found.values):
            colour, hatch = _ATTRIBUTES[attribute]
            x = [row["head"] - 0.4 + width * (i + 0.5) for row in heads]
            look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            bars = [row[f"decode_{attribute}"] for row in heads]
            axis.bar(x, bars, width * 0.92, label=f"{_SAID[attribute]}, decoded", **look)
            for at, row in zip(x, heads, strict=True):
                control, half = row[f"control_{attribute}"], width * 0.46
                axis.plot([at - half, at + half], [control] * 2, color="black", linewidth=1.6)
            used = [row[f"use_{attribute}"] for row in heads]
            look = {"edgecolors": "black", "facecolors": "white", "marker": "D", "zorder": 3}
            axis.scatter(x, used, s=26, **look)
        axis.set(title=_title(method, task), xlabel="head", xticks=[r["head"] for r in heads])
        axis.set_ylim(0, 1.02)
        axis.grid(visible=False, axis="x")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("accuracy, agreement")
    axes[-1].plot([], [], color="black", linewidth=1.6, label="shuffled outputs")
    _sample(axes[-1], "used by the head alone", "black", "D", markerfacecolor="white")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _maps(first: _First, figure: Any) -> None:
    """Draw a line for each image, and a block of columns for each method's heads."""
    numpy = require("numpy", extra="train")
    blocks = list(first.items())
    lines = blocks[0][1][1].extra["examples"]
    heads = [len(found.extra["examples"][0]["maps"]) for _, (_, found) in blocks]
    height, width = lines[0]["size"]
    columns = 1 + sum(heads)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    relative = [
        numpy.array(maps) * len(maps) * len(maps[0])
        for _, (_, found) in blocks
        for line in found.extra["examples"]
        for maps in line["maps"]
    ]
    top = float(max(numpy.quantile(one, 0.99) for one in relative))
    norm = require("matplotlib.colors", extra="train").PowerNorm(0.5, vmin=0, vmax=top)
    image = None
    for i, line in enumerate(lines):
        pixels = numpy.frombuffer(base64.b64decode(line["image"]), dtype=numpy.uint8)
        axes[i][0].imshow(pixels.reshape(height, width, 3))
        axes[i][0].set_ylabel(line["group"], fontsize=7.5)
        column = 1
        for _, (_, found) in blocks:
            for maps in found.extra["examples"][i]["maps"]:
                values = numpy.array(maps) * len(maps) * len(maps[0])
                extent = (0, width, height, 0)
                image = axes[i][column].imshow(values, cmap="viridis", norm=norm, extent=extent)
                column += 1
    column = 1
    for (method, (_, _)), count in zip(blocks, heads, strict=True):
        for head in range(count):
            axes[0][column + head].set_title(
                f"{NAMES.get(method, method)}\nhead {head}" if head == 0 else f"\n{head}",
                fontsize=8,
            )
        column += count
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        for side in axis.spines.values():
            side.set_visible(False)
    label = "attention, 1 = spread evenly"
    figure.colorbar(image, ax=axes, shrink=0.5, extend="max", label=label)


def _maps_height(first: _First) -> float:
    """Return the height in inches at which the images keep their form."""
    examples = [found.extra["examples"] for _, found in first.values()]
    height, width = examples[0][0]["size"]
    wide = 5.75 / (1 + sum(len(lines[0]["maps"]) for lines in examples))
    return len(examples[0]) * (wide * height / width + 0.08) + 0.9


def _cka(first: _First, figure: Any) -> None:
    axes = figure.subplots(1, len(first), squeeze=False)[0]
    image = None
    for axis, (method, (task, found)) in zip(axes, first.items(), strict=True):
        matrix = found.cka[max(found.cka)]
        heads = len(matrix)
        shown = [[math.nan if i == j else x for j, x in enumerate(r)] for i, r in enumerate(matrix)]
        image = axis.imshow(shown, cmap="cividis", vmin=0, vmax=1)
        axis.set(xticks=range(heads), yticks=range(heads), xlabel="head", ylabel="head")
        axis.set_title(_title(method, task))
        axis.grid(visible=False)
        for i, row in enumerate(shown if heads <= 8 else ()):
            for j, value in enumerate(row):
                if i != j:
                    text = "–" if math.isnan(value) else f"{value:.2f}"
                    colour = "white" if value < 0.5 else "black"
                    axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="linear CKA (no unit)")


def _title(method: str, task: str) -> str:
    return f"{NAMES.get(method, method)}, seed {task.rpartition('seed')[2]}"


def _chance(axis: Any, x: float, y: float) -> None:
    axis.axvline(x, color=_GREY, linestyle=":", linewidth=1, zorder=0)
    axis.axhline(y, color=_GREY, linestyle=":", linewidth=1, zorder=0)


def _square(axis: Any) -> None:
    """Give both axes one scale, as far as 1, and below chance as far as points lie."""
    lowest = min(axis.get_xlim()[0], axis.get_ylim()[0], 0.44)
    axis.set(xlim=(lowest, 1.03), ylim=(lowest, 1.03), aspect="equal")


def _sample(axis: Any, label: str, colour: str, marker: str, **look: Any) -> None:
    axis.plot([], [], color=colour, marker=marker, linestyle="", label=label, **look)
