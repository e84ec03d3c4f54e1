"""Recorded results of ``pytest benchmarks/``: rows, and the compact files that keep them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MACHINE = (
    "device",
    "cpu",
    "cores",
    "threads",
    "torch",
    "triton",
    "cuda",
    "python",
    "commit",
    "clock",
)
"""Fields that all rows of a file have in common, and are written once."""
DETAILS = (
    *("dtype", "shape", "first_order_only", "peak_bytes", "compile_seconds", "refused"),
    *("device_seconds", "device_how", "host_seconds", "flops", "bytes"),  # of a GPU
    "largest_batch",  # of a step
)
FAKE = "fake GPU, which computes nothing"
"""The device of rows that are no results."""
DIGITS = 6
"""Significant digits of a time in a file."""


class ReportError(Exception):
    """An error that the user can set right, in one line."""


@dataclass(frozen=True)
class Row:
    """One implementation of one group, with its time in each round, in seconds; none where it was refused."""

    workload: str
    group: str
    implementation: str
    order: str
    times: tuple[float, ...]
    info: dict[str, Any]
    ratio: float | None = None  # its time over ours, by round, median; None: one is not there
    device_ratio: float | None = None  # the same of the device's time

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def fifths(self) -> tuple[float, float]:
        """p20 and p80."""
        if len(self.times) < 2:
            return self.median, self.median
        cut = statistics.quantiles(self.times, n=5, method="inclusive")
        return cut[0], cut[-1]

    @property
    def label(self) -> str:
        return self.implementation + (
            " (first order only)" if self.info["first_order_only"] else ""
        )


def read(path: Path) -> list[Row]:
    """Read the rows of a file, be it compact or pytest-benchmark's own JSON.

    Raises:
        ReportError: not such a file, or one without rows of ours.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in recorded:
            rows = _from_pytest(recorded)
        elif "machine" in recorded:
            rows = _from_compact(recorded)
        else:
            rows = _from_measured(recorded)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: no results of benchmarks ({type(error).__name__})") from None
    if not rows:
        raise ReportError(f"{path}: holds no row of `pytest benchmarks/`")
    if any(row.info["device"] == FAKE for row in rows):
        raise ReportError(f"{path}: measured on a {FAKE}; no results")
    ours = {row.group: row for row in rows if row.implementation == "ours"}
    return [_beside(row, ours.get(row.group)) for row in rows]


def is_measured(path: Path) -> bool:
    """Whether a file is one that ``tools.measure_gpu`` goes on with, not rows alone."""
    return not {"benchmarks", "machine"} & json.loads(path.read_text(encoding="utf-8")).keys()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows compactly: what reports show and no more, a row per line, the machine once."""
    machine = {key: rows[0].info.get(key) for key in MACHINE}
    head = json.dumps({"machine": machine}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(_compact(row)) for row in rows)
    path.write_text(f'{head},\n "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


def _compact(row: Row) -> dict[str, Any]:
    return {
        **{"workload": row.workload, "group": row.group, "order": row.order},
        "implementation": row.implementation,
        **{key: row.info[key] for key in DETAILS if key in row.info},
        "seconds": rounded(row.times),
    }


def rounded(seconds: Sequence[float]) -> list[float]:
    return [float(f"{t:.{DIGITS}g}") for t in seconds]


def _from_compact(recorded: dict[str, Any]) -> list[Row]:
    return [_row(one, one["seconds"], recorded["machine"]) for one in recorded["rows"]]


def _from_pytest(recorded: dict[str, Any]) -> list[Row]:
    return [
        _row({**b["extra_info"], "group": b["group"]}, b["stats"]["data"])
        for b in recorded["benchmarks"]
        if "implementation" in b.get("extra_info", {}) and b["stats"]["data"]
    ]


def _from_measured(recorded: dict[str, Any]) -> list[Row]:
    """Rows of ``tools.measure_gpu``, each measurement with its machine; steps with the largest batch that fits."""
    told = [(one, each) for each in recorded.values() for one in each["rows"]]
    trials: dict[tuple[str, str], dict[int, bool]] = {}
    for one, _ in told:
        if "fits" in one:
            trials.setdefault((one["group"], one["implementation"]), {})[one["batch"]] = one["fits"]
    rows = []
    for one, each in told:
        if "seconds" in one:
            tried = trials.get((one["group"], one["implementation"]))
            more = {"largest_batch": _largest(tried)} if tried else {}
            rows.append(_row({**one, **more}, one["seconds"], each["machine"]))
    return rows


def _largest(tried: dict[int, bool]) -> str:
    """The largest batch that fitted, and the smallest that did not; without the latter the search is not over."""
    fitted = max((n for n, fits in tried.items() if fits), default=0)
    failed = min((n for n, fits in tried.items() if not fits), default=None)
    return f"{fitted} (not {failed})" if failed else f"at least {fitted}"


def _row(
    one: dict[str, Any], seconds: Sequence[float], machine: dict[str, Any] | None = None
) -> Row:
    names = {key: one[key] for key in ("workload", "group", "implementation", "order")}
    info = {key: one[key] for key in (*MACHINE, *DETAILS) if key in one}
    return Row(**names, times=tuple(seconds), info={**(machine or {}), **info})


def _beside(row: Row, ours: Row | None) -> Row:
    """``row`` with its ratios to ours."""
    if ours is None or not (row.times and ours.times):
        return row
    if len(ours.times) == len(row.times):  # rounds are interleaved: compare within a round
        pairs = zip(row.times, ours.times, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
    else:
        ratio = row.median / ours.median
    theirs, mine = (one.info.get("device_seconds") for one in (row, ours))
    return replace(row, ratio=ratio, device_ratio=theirs / mine if theirs and mine else None)
