"""What the penalty would cost from ViT-Ti to a ViT of 22 billion parameters, by prediction: nothing is trained.

``python examples/scaling_study.py --json study.json --figure study.png`` prints three tables: a step on one H200 and
with FSDP2 on 8 and 64 of them; what its time is made of; and what the penalty of some steps, or of some samples, saves.
The figure shows the time over that of a step without penalty, beside the steps that were measured. Under two minutes of
one core; ``--quick`` looks at two small models. No GPU is needed. Every number is a prediction of ``dvf.cost``.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import diversevit_fast as dvf

DEVICE, DTYPE = "H200", "bfloat16"
MODELS = {  # name: timm's, and samples on each GPU
    "ViT-Ti": ("vit_tiny_patch16_224", 64),
    "ViT-S": ("vit_small_patch16_224", 64),
    "ViT-B": ("vit_base_patch16_224", 64),
    "ViT-L": ("vit_large_patch16_224", 64),
    "ViT-H": ("vit_huge_patch14_224", 64),
    "ViT-g": ("vit_giant_patch14_224", 64),
    "ViT-G": ("vit_gigantic_patch14_224", 64),
    "ViT-22B": ("", 8),
}
STEPS: dict[str, Any] = {"erm": None, "last": "last", "all": "all"}
FRACTION = {"layers": "all", "fraction": 0.25}
WITH_FRACTION = ("ViT-S", "ViT-L")
EVERY = 8
GPUS = ("alone", "fsdp2:8", "fsdp2:64")
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
COLOURS = {"last": "#0072B2", "all": "#D55E00", f"all, every {EVERY}": "#009E73"}
MARKERS = {"last": "o", "all": "^", f"all, every {EVERY}": "s"}


def model_of(name: str) -> nn.Module:
    """A model without memory. The one of 22B has that model's sizes, not its parallel layers."""
    with torch.device("meta"):
        if name != "ViT-22B":
            return timm.create_model(MODELS[name][0])
        return VisionTransformer(
            patch_size=14, embed_dim=6144, depth=48, num_heads=48, mlp_ratio=24576 / 6144
        )


def rows_of(name: str, with_fraction: bool) -> list[dict[str, Any]]:
    """The predicted steps of one model: each kind of step, alone and with FSDP2."""
    model, batch, rows = model_of(name), MODELS[name][1], []
    steps = {**STEPS, "all, a quarter": FRACTION} if with_fraction else STEPS
    for step, diversity in steps.items():
        one = dvf.cost(model, diversity, batch=batch, dtype=DTYPE, device=DEVICE)
        for by in GPUS:
            found = one.with_parallel(None if by == "alone" else by)
            seconds, kinds = found.seconds, found.kind_seconds
            assert seconds is not None
            assert kinds is not None
            rows.append(
                {
                    **{"model": name, "parameters": found.parameters, "batch": batch},
                    **{"step": step, "by": by, "peak_bytes": found.peak_bytes},
                    "seconds": {k: _short(x) for k, x in seconds._asdict().items()},
                    "limit": seconds.limit,
                    "kinds": {k: _short(x) for k, x in kinds.items() if x},
                }
            )
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The three tables as Markdown, by name: ``sizes``, ``parts``, ``savings``."""
    return {
        "sizes": _table(
            ("model", "parameters", "batch", "GPUs", "no penalty", "last", "all", "peak, all"),
            [_size_line(rows, model, by) for model in _models(rows) for by in GPUS],
        ),
        "parts": _table(
            ("model", "step", "products", "attention", "penalty", "elementwise", "host / device"),
            [_part_line(rows, m, step) for m in _models(rows) for step in ("erm", "all")],
        ),
        "savings": _table(
            ("model", "last", "all", f"all, every {EVERY}", "all, a quarter of the samples"),
            [_saving_line(rows, model) for model in _models(rows)],
        ),
    }


def _size_line(rows: Any, model: str, by: str) -> list[str]:
    erm, last, all_ = (_row(rows, model, step, by) for step in STEPS)
    return [
        model,
        _count(erm["parameters"]),
        str(erm["batch"]),
        {"alone": "1"}.get(by, f"{by.partition(':')[2]}, FSDP2"),
        f"{_ms(erm)}{_waits(erm)}",
        *(f"{_ms(row)}, {_over(row, erm):.2f}x{_waits(row)}" for row in (last, all_)),
        f"{all_['peak_bytes'] / 2**30:,.0f} GiB",
    ]


def _part_line(rows: Any, model: str, step: str) -> list[str]:
    row = _row(rows, model, step, "alone")
    kinds, total = row["kinds"], row["seconds"]["device"]
    attention = sum(x for kind, x in kinds.items() if kind.startswith("attention"))
    parts = (kinds["matrix products"], attention, kinds.get("penalty", 0), kinds["elementwise"])
    shares = [f"{100 * part / total:.0f} %" for part in parts]
    return [model, step, *shares, f"{row['seconds']['host'] / total:.2f}"]


def _saving_line(rows: Any, model: str) -> list[str]:
    erm, last, all_ = (_row(rows, model, step, "alone") for step in STEPS)
    quarter = [r for r in rows if r["model"] == model and r["step"] == "all, a quarter"]
    ratios = [_over(last, erm), _over(all_, erm), _every(all_, erm)]
    said = [f"{x:.2f}x" for x in (*ratios, *(_over(r, erm) for r in quarter[:1]))]
    return [model, *said, *[""] * (4 - len(said))]


def _every(all_: Any, erm: Any) -> float:
    """Of a step in the mean, when one of ``EVERY`` has the penalty, over one without."""
    return (_over(all_, erm) + EVERY - 1) / EVERY


def _over(row: Any, erm: Any) -> float:
    return row["seconds"]["step"] / erm["seconds"]["step"]


def _ms(row: Any) -> str:
    seconds = row["seconds"]["step"]
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _waits(row: Any) -> str:
    return "" if row["limit"] == "device" else f" ({row['limit']})"


def _models(rows: Any) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _row(rows: Any, model: str, step: str, by: str) -> Any:
    wanted = (model, step, by)
    return next(r for r in rows if (r["model"], r["step"], r["by"]) == wanted)


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n > 1e9 else f"{n / 1e6:.0f} M"


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    said = ["| " + " | ".join(line) + " |" for line in (titles, *lines)]
    return "\n".join([said[0], "|---" * len(titles) + "|", *said[1:]])


def measured() -> list[tuple[str, str, str, float]]:
    """Steps that were measured, over those without penalty: where, model, step, ratio."""
    found = []
    kept = json.loads((RESULTS / "cost.json").read_text("utf-8"))["rows"]
    for row in kept:
        if row["dtype"] == DTYPE and row["step"] != "erm":
            key = {k: row[k] for k in ("model", "dtype", "batch")} | {"step": "erm"}
            erm = next(r for r in kept if key.items() <= r.items())
            found.append(("a CPU", row["model"], row["step"], row["seconds"] / erm["seconds"]))
    rows = json.loads((RESULTS / "h200.json").read_text("utf-8"))["rows"]
    group = f"all-layers step ViT-S batch 64 {DTYPE} CUDA graph"
    ours, erm = (
        statistics.median(r["seconds"])
        for who in ("ours", "erm")
        for r in rows
        if (r["group"], r["implementation"]) == (group, who)
    )
    return [*found, ("an H200", "ViT-S", "all", ours / erm)]


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draw the time over that without penalty against parameters: predicted lines, measured points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    sizes = {row["model"]: row["parameters"] for row in rows}
    for step, colour in COLOURS.items():
        line = []
        for model in sizes:
            erm = _row(rows, model, "erm", "alone")
            one = _row(rows, model, "last" if step == "last" else "all", "alone")
            line.append(_over(one, erm) if step in STEPS else _every(one, erm))
        look: Any = {"color": colour, "marker": MARKERS[step], "markersize": 5}
        axis.plot(list(sizes.values()), line, label=f"{step}: predicted, H200", **look)
    for where, model, step, ratio in measured():
        if model in sizes:
            marker = "D" if where == "a CPU" else "*"
            look: Any = {"marker": marker, "facecolors": "none", "edgecolors": COLOURS[step]}
            axis.scatter(sizes[model], ratio, s=50 if marker == "D" else 130, **look)
    for where, marker in (("a CPU", "D"), ("an H200", "*")):
        look: Any = {
            "marker": marker,
            "linestyle": "",
            "markerfacecolor": "none",
            "color": "#55554f",
        }
        axis.plot([], [], label=f"measured on {where}", **look)
    axis.set(xscale="log", yscale="log", ylabel="time of a step over one without penalty")
    axis.set_xticks(list(sizes.values()), [name.removeprefix("ViT-") for name in sizes])
    ticks = (1, 1.5, 2, 3, 4, 5, 7, 10)
    axis.set_ylim(0.85, None)
    axis.set_yticks([x for x in ticks if x < axis.get_ylim()[1]])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("model, by its number of parameters")
    axis.grid(color="#e3e3e0", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small models only")
    parser.add_argument("--json", help="keep all predictions in this file")
    parser.add_argument("--figure", help="draw them into this file, .png or .svg")
    options = parser.parse_args(given)
    rows: list[dict[str, Any]] = []
    for name in list(MODELS)[: 2 if options.quick else None]:
        rows += rows_of(name, name in WITH_FRACTION and not options.quick)
    for table in tables(rows).values():
        print(table, end="\n\n")
    if options.json is not None:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = {"device": DEVICE, "dtype": DTYPE, "torch": torch.__version__}
        text = f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'
        Path(options.json).write_text(text, encoding="utf-8")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
