"""The table of the README: eight rows of the recorded results, each against what a user would run otherwise.

``python -m benchmarks.report benchmarks/results/<device>.json --readme`` writes it between the README's markers. Rows
that are slower than PyTorch are among them, and stay in.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .orders import BWD, DOUBLE_BWD
from .records import Row

DEVICES = {"cpu": "CPU", "h200": "H200"}
"""Files of ``benchmarks/results``, and their headings."""
FORMULA, TORCH = "its formula in PyTorch", "PyTorch's own"
SLOWER = 0.995
"""A speed that rounds to less than 1.00."""


class Line(NamedTuple):
    """One line of the table: which group of rows it shows, and whom it compares with."""

    label: str
    instead_of: str
    operator: str
    dtype: str
    tokens: int | None = None
    order: str = DOUBLE_BWD
    model: str = ""  # of a training step
    graph: bool = False
    other: str = "eager"  # the implementation that is compared with

    def shows(self, row: Row) -> bool:
        """Whether ``row`` is of this line's group."""
        words = row.group.split(" ")
        return (
            (row.workload, row.order, row.info["dtype"]) == (self.operator, self.order, self.dtype)
            and (self.tokens is None or row.info["shape"][-2] == self.tokens)
            and (not self.model or self.model in words)
            and ("graph" in words) == self.graph
        )


LINES = (
    Line("attention, 197 tokens, float32", FORMULA, "attention", "float32", 197),
    Line("attention, 577 tokens, bfloat16", FORMULA, "attention", "bfloat16", 577),
    Line("LayerNorm, float32", TORCH, "layer_norm", "float32"),
    Line("GELU, bfloat16", TORCH, "gelu", "bfloat16"),
    Line("head penalty (routed), float32", FORMULA, "routed_head_penalty", "float32"),
    Line(
        "training step, the paper's ViT",
        "the published code",
        "paper step",
        "float32",
        other="published loop",
    ),
    Line(
        "training step, ViT-S, penalty on all layers, bfloat16",
        "PyTorch's operators",
        "all-layers step",
        "bfloat16",
        model="ViT-S",
    ),
    Line(
        "the same, captured in a CUDA graph",
        "the same, captured",
        "all-layers step",
        "bfloat16",
        model="ViT-S",
        graph=True,
    ),
)
WITHOUT_PENALTY = LINES[5]._replace(other="stock erm")
FIRST_ORDER = LINES[1]._replace(order=BWD, other="SDPA fused")


def table(results: Mapping[str, Sequence[Row]]) -> str:
    """The table and what has to be known to read it, from the rows of each of ``DEVICES``."""
    heads = [f"{name}: time | speed | memory" for name in DEVICES.values()]
    lines = [
        f"| forward, backward and double backward of | instead of | {' | '.join(heads)} |",
        f"|---|---|{'---|' * 3 * len(DEVICES)}",
    ]
    for line in LINES:
        cells = [cell for device in DEVICES for cell in _cells(line, results[device])]
        lines.append(f"| {line.label} | {line.instead_of} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _notes(results)]) + "\n"


def _cells(line: Line, rows: Sequence[Row]) -> tuple[str, str, str]:
    """Our time, how many times as fast as the other, how many times less memory; empty where not measured."""
    found = {row.implementation: row for row in rows if line.shows(row)}
    if "ours" not in found or line.other not in found:
        return "", "", ""
    ours, other = found["ours"], found[line.other]
    before, after = (row.info.get("peak_bytes") for row in (other, ours))
    memory = f"{before / after:.1f}" if before and after else ""
    return _time(ours.median), _speed(speed(line, rows)), memory


def speed(line: Line, rows: Sequence[Row]) -> float:
    """The other's time over ours, by round."""
    (ratio,) = [row.ratio for row in rows if line.shows(row) and row.implementation == line.other]
    assert ratio is not None
    return ratio


def _speed(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= SLOWER else f"**{ratio:.2f}**"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _notes(results: Mapping[str, Sequence[Row]]) -> str:
    penalty, first = (
        " and ".join(f"{1 / speed(line, results[d]):.2f} ({name})" for d, name in DEVICES.items())
        for line in (WITHOUT_PENALTY, FIRST_ORDER)
    )
    machines = "; ".join(f"{name}: {_machine(results[d])}" for d, name in DEVICES.items())
    return (
        "Speed: how many times as fast as the second column. Memory: how many times less at the peak. "
        "In bold: slower than that. The penalty's price: the paper's step takes "
        f"{penalty} times as long as the same step without a penalty in PyTorch's own operators. "
        "Without a double backward, attention (577 tokens, bfloat16) takes "
        f"{first} times as long as PyTorch's fused attention, which has none.\n\n"
        f"{machines}. Each row's results passed the [error budget](docs/design/error_budget.md) "
        "before it was timed. Batch sizes differ between "
        "devices; all rows, shapes and spreads: [docs/benchmarks.md](docs/benchmarks.md)."
    )


def _machine(rows: Sequence[Row]) -> str:
    """Device, versions and commit of a device's rows."""
    info = rows[0].info
    cores = f", {info['cores']} cores" if info["device"] == info["cpu"] else ""
    rounds = sorted({len(row.times) for row in rows})
    counted = "-".join(map(str, rounds[:1] + rounds[1:][-1:]))
    versions = f"torch {info['torch']}" + ("" if cores else f", triton {info['triton']}")
    return f"{info['device']}{cores}, {versions}, median of {counted} interleaved rounds, commit {info['commit']}"
