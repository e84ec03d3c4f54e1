"""Published figures, quoted and not measured here, beside the rows of ours that they can be compared with.

Rates of attention are in the papers' convention: a backward is 2.5 forwards of 4 N^2 d FLOPs per head, since it
computes the scores again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .orders import BWD, DOUBLE_BWD, FWD
from .peaks import peak_of
from .records import Row

FA3 = "FlashAttention-3 paper, figure of H100 speeds at head width 64, not causal, 16k tokens"
HOG = "Flash-HOG, tk_bwdbwd/BENCHMARKS.md: a Hessian-vector product, causal"
CUDNN = "cudnn-frontend, benchmark/norms/results/h200: RMSNorm"
LIGER = "Liger, all_benchmark_data.csv: LayerNorm 4096x16384 float32"
ATTENTION = "attention 32x32x512x64 bfloat16"
HVP = "attention 512x12x512x64 bfloat16 causal"
NORM = "layer_norm 16384x4096 bfloat16"


class Anchor(NamedTuple):
    """One published figure, and what of ours stands beside it."""

    rows: str  # of these groups, without the order
    quantity: str
    published: str
    source: str


FORWARD_RATE, BACKWARD_RATE = "forward, TFLOP/s", "backward, TFLOP/s"
FORWARD_SHARE, BACKWARD_SHARE = "forward, share of bandwidth", "backward, share of bandwidth"
ALL_ORDERS = "to second order, ms"

ANCHORS = (
    Anchor(ATTENTION, FORWARD_RATE, "333 (FA3), 335 (cuDNN), 340 (Triton); H100", FA3),
    Anchor(ATTENTION, BACKWARD_RATE, "272 (FA3), 266 (cuDNN), 198 (FA2); H100", FA3),
    Anchor(HVP, ALL_ORDERS, "27.7 (Pallas), 18.3 (ThunderKittens); H200", HOG),
    Anchor(NORM, FORWARD_SHARE, "77 % (cuDNN); H200", CUDNN),
    Anchor(NORM, BACKWARD_SHARE, "79 % (cuDNN); H200", CUDNN),
    Anchor(NORM, FORWARD_SHARE, "87 % (Liger); H100", LIGER),
)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of the figures that rows of ours stand beside; none if there are none."""
    lines = []
    for anchor in ANCHORS:
        ours = figure(anchor, rows)
        if ours is not None:
            cells = (anchor.rows.replace("_", " "), anchor.quantity, anchor.published, ours)
            lines.append(f"| {' | '.join(cells)} | {anchor.source} |")
    head = [
        "| shape | quantity | published, not measured here | ours | source |",
        "|---|---|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def figure(anchor: Anchor, rows: Sequence[Row]) -> str | None:
    """Return the quantity of an anchor as our rows have it; None where they were not measured."""
    of = {row.group: row for row in rows if row.implementation == "ours" and _seconds(row)}
    if anchor.quantity == ALL_ORDERS:
        found = of.get(f"{anchor.rows} {DOUBLE_BWD}")
        return None if found is None else f"{1e3 * _seconds(found):.3g}"
    first, both = of.get(f"{anchor.rows} {FWD}"), of.get(f"{anchor.rows} {BWD}")
    if first is None or both is None:
        return None
    backward = _seconds(both) - _seconds(first)
    if backward <= 0:
        return None
    work = {
        FORWARD_RATE: (first.info["flops"], _seconds(first)),
        BACKWARD_RATE: (2.5 * first.info["flops"], backward),
        FORWARD_SHARE: (first.info["bytes"], _seconds(first)),
        BACKWARD_SHARE: (both.info["bytes"] - first.info["bytes"], backward),
    }
    amount, seconds = work[anchor.quantity]
    if anchor.quantity in (FORWARD_RATE, BACKWARD_RATE):
        return f"{amount / seconds / 1e12:.3g}"
    peak = peak_of(first.info["device"])
    return f"{amount / seconds / 1e9:.0f} GB/s" + (
        f", {amount / seconds / peak.bandwidth:.0%}" if peak else ""
    )


def _seconds(row: Row) -> float:
    return row.info.get("device_seconds") or 0.0
