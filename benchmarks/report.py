"""Make tables and plots of what ``pytest benchmarks/`` recorded.

    pytest benchmarks/ --benchmark-json=benchmarks/results/<device>.json
    python -m benchmarks.report benchmarks/results/<device>.json [--readme]

Prints Markdown: a table per operator or step, times over ours, and the conditions. Writes the same and a picture per
table next to the JSON file, and the JSON file anew with what the tables show and no more; what ``tools.measure_gpu``
recorded stays as it is. ``--readme`` puts a summary of one line per group between the markers of that device in
``docs/benchmarks.md``, and the eight rows of ``front_page`` between those of ``README.md``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import anchors, front_page, records
from .orders import FWD
from .peaks import peak_of
from .records import ReportError, Row

ROOT = Path(__file__).parents[1]
CONDITIONS = ("device", "cores", "threads", "torch", "triton", "cuda", "python", "commit", "clock")


def markers(device: str) -> tuple[str, str]:
    """Return the lines around the summary of ``benchmarks/results/<device>.json``."""
    return f"<!-- {device}:begin -->", f"<!-- {device}:end -->"


def markdown(rows: Sequence[Row]) -> str:
    """Return a table per workload, and one line of conditions."""
    parts = []
    for workload in dict.fromkeys(row.workload for row in rows):
        parts += [f"### {workload.replace('_', ' ')}", "", *_table(rows, workload), ""]
    if published := anchors.table(rows):
        parts += ["### published figures", "", *published, ""]
    parts.append(conditions(rows))
    return "\n".join(parts) + "\n"


def summary(rows: Sequence[Row], full: str) -> str:
    """Return a line per group with gradients: our time and everybody else's over it, eager's memory over ours.

    Args:
        full: where all rows and their spreads are, for the last line.
    """
    told = [row for row in rows if row.order != FWD and row.times]
    others = list(dict.fromkeys(row.label for row in told if row.implementation != "ours"))
    lines = [
        f"| forward and gradients | ours | {' | '.join(others)} | eager's memory |",
        f"|---|---|{'---|' * len(others)}---|",
    ]
    for group in dict.fromkeys(row.group for row in told):
        found = {row.label: row for row in told if row.group == group}
        ratios = {name: ratio for name, row in found.items() if (ratio := _told(row)) is not None}
        cells = [
            group.replace("_", " "),
            f"{1e3 * _seconds(found['ours']):.3g} ms" if "ours" in found else "",
            *(f"{ratios[name]:.2f}" if name in ratios else "" for name in others),
            _memory_ratio(found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Columns show time relative to this library (2.0: this library is twice as fast); the last column "
        f"shows eager's peak memory relative to ours. Every row, with spreads: `{full}`."
    )
    if any("device_seconds" in row.info for row in told):
        note = f"Operators: the device's time. Steps: a single step's, with the host. {note}"
    return "\n".join([*lines, "", f"{note} {conditions(rows)}"]) + "\n"


def _seconds(row: Row) -> float:
    """The time that a summary shows: the device's own where it was measured."""
    return row.info.get("device_seconds") or row.median


def _told(row: Row) -> float | None:
    return row.ratio if row.device_ratio is None else row.device_ratio


def _memory_ratio(found: dict[str, Row]) -> str:
    """Return eager's peak over ours in a group of rows by label; empty where one is unknown."""
    eager, ours = (
        found[name].info.get("peak_bytes") if name in found else None for name in ("eager", "ours")
    )
    return f"{eager / ours:.1f}" if eager and ours else ""


def _label(row: Row) -> str:
    compile_time = row.info.get("compile_seconds")
    return row.label + (f" (compiled in {compile_time:.0f} s)" if compile_time else "")


def _times(row: Row) -> str:
    low, high = row.fifths
    return f"{1e3 * low:.3g} - {1e3 * high:.3g}"


def _device(row: Row) -> str:
    seconds = row.info.get("device_seconds")
    return "" if seconds is None else f"{_microseconds(seconds)} ({row.info['device_how']})"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.4g} us"


def _rate(row: Row, work: str) -> str:
    """FLOPs or bytes by second of the device, and as a share of what its data sheet promises."""
    done, seconds = row.info.get(work), row.info.get("device_seconds")
    if not (done and seconds):
        return ""
    peak = peak_of(row.info["device"])
    most = peak and (peak.flops(row.info["dtype"]) if work == "flops" else peak.bandwidth)
    rate = done / seconds
    shown = f"{rate / 1e12:.3g} T" if work == "flops" else f"{rate / 1e9:.0f} G"
    return shown + (f" ({rate / most:.0%})" if most else "")


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _size(n: int | None) -> str:
    return "" if n is None else f"{n / 2**20:.1f} MiB"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "implementation": _label,
    "device": _device,
    "device x ours": lambda row: _ratio(row.device_ratio),
    "host": lambda row: _microseconds(row.info.get("host_seconds")),
    "FLOP/s (of peak)": lambda row: _rate(row, "flops"),
    "B/s (of peak)": lambda row: _rate(row, "bytes"),
    "median": lambda row: f"{1e3 * row.median:.3g} ms",
    "p20 - p80": _times,
    "x ours": lambda row: _ratio(row.ratio),
    "peak memory": lambda row: _size(row.info.get("peak_bytes")),
    "largest batch": lambda row: row.info.get("largest_batch", ""),
}
"""Column -> its cell of a row. A column without any content is left out."""


def _table(rows: Sequence[Row], workload: str) -> list[str]:
    mine = [row for row in rows if row.workload == workload]
    timed = [row for row in mine if row.times]
    cells = {name: [cell(row) for row in timed] for name, cell in _COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [f"| shape, dtype, order | {' | '.join(cells)} |", f"|---|{'---|' * len(cells)}"]
    for row, *shown in zip(timed, *cells.values(), strict=True):
        lines.append(f"| {row.group.removeprefix(f'{workload} ')} | {' | '.join(shown)} |")
    refused = {f"{row.info['dtype']}, {row.info['refused']}": None for row in mine if not row.times}
    return [*lines, *(f"\nLeft out: {reason}." for reason in refused)]


def conditions(rows: Sequence[Row]) -> str:
    """Return what the rows were measured on and how, once for all.

    Raises:
        ReportError: rows were measured under different conditions.
    """
    seen = {tuple(str(row.info.get(key)) for key in CONDITIONS) for row in rows}
    if len(seen) > 1:
        raise ReportError("the rows were measured under different conditions; record them again")
    (values,) = seen
    told = [f"{k} {v}" for k, v in zip(CONDITIONS, values, strict=True) if v != "None"]
    rounds = sorted({len(row.times) for row in rows if row.times})
    spread = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return _of_the_device(rows) + (
        f"Median of {spread} interleaved rounds in one process; {', '.join(told)}. Peak memory is above "
        "what was there before, from a run of its own. Every row passed its check against float64 eager first."
    )


def _of_the_device(rows: Sequence[Row]) -> str:
    """What has to be known to read the columns of a GPU; nothing where there are none."""
    if not any("device_seconds" in row.info for row in rows):
        return ""
    chip = rows[0].info["device"]
    shares = "as shares of the data sheet's" if peak_of(chip) else f"no data sheet known of {chip}"
    return (
        "Device: the GPU's own time of one run among many, without the host. Host: until a call returns, the "
        f"GPU idle. FLOP/s and B/s: least work (`benchmarks/work.py`) by the device's time, {shares}. Other times "
        "are of single calls, both together, the L2 cache cold. "
    )


def plot(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Draw bars of time over ours: a picture per workload, a group of bars per shape, dtype and order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for workload in dict.fromkeys(row.workload for row in rows):
        mine = [row for row in rows if row.workload == workload and row.ratio is not None]
        if not mine:
            continue
        groups = list(dict.fromkeys(row.group for row in mine))
        labels = list(dict.fromkeys(row.label for row in mine))
        height = 0.8 / len(labels)
        figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(groups) * len(labels)))
        for i, label in enumerate(labels):
            here = {row.group: row.ratio or 0.0 for row in mine if row.label == label}
            at = [y + i * height for y, group in enumerate(groups) if group in here]
            bars = axes.barh(at, list(here.values()), height, label=label)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.axvline(1.0, color="black", linewidth=0.8)
        middle = 0.4 - height / 2
        axes.set_yticks([y + middle for y in range(len(groups))])
        axes.set_yticklabels([group.removeprefix(f"{workload} ") for group in groups], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("time over ours (longer is slower)")
        axes.set_title(f"{workload.replace('_', ' ')}, {mine[0].info['device']}", fontsize=10)
        axes.legend(fontsize=7)
        figure.tight_layout()
        path = folder / f"{name}_{workload.replace(' ', '_')}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        paths.append(path)
    return paths


def between_markers(text: str, tables: str, device: str, where: str) -> str:
    """``text`` with everything between the markers of ``device`` replaced.

    Raises:
        ReportError: the markers are not there once each, in order.
    """
    begin, end = markers(device)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{where}: needs one line {begin} and after it one line {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{tables}{end}{rest.partition(end)[2]}"


def _rewrite(path: Path, tables: str, name: str) -> None:
    """Put ``tables`` between the markers of ``name`` in the page at ``path``."""
    text = path.read_text(encoding="utf-8")
    path.write_text(between_markers(text, tables, name, path.name), encoding="utf-8")


def recorded() -> dict[str, list[Row]]:
    """Read the rows of every device that the front page shows."""
    return {
        device: records.read(ROOT / f"benchmarks/results/{device}.json")
        for device in front_page.DEVICES
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of the pages")
    parser.add_argument("--readme-path", type=Path, default=ROOT / "docs/benchmarks.md")
    parser.add_argument("--front-path", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plots", type=Path, help="folder of the pictures; default: the results'")
    options = parser.parse_args(arguments)
    try:
        rows = records.read(options.results)
        tables = markdown(rows)
        if not records.is_measured(options.results):
            records.write(options.results, rows)
        page = options.results.with_suffix(".md")
        page.write_text(tables, encoding="utf-8")
        if options.readme:
            _rewrite(
                options.readme_path, summary(rows, f"benchmarks/results/{page.name}"), page.stem
            )
            if page.stem in front_page.DEVICES:
                _rewrite(options.front_path, front_page.table(recorded()), "front")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    print(tables)
    for path in plot(rows, options.plots or options.results.parent, options.results.stem):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
