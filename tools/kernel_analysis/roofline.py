"""Count what every kernel moves and computes, and compare it with what the operator needs at least.

``python -m tools.kernel_analysis.roofline`` runs forward, backward and double backward of every operator in Triton's
interpreter (it sets ``TRITON_INTERPRET=1`` itself) with the launch configurations of each chip, bfloat16, one sample
(attention: one head), counts lane by lane (``tools.interpreter.traffic``), and stores
``tools/kernel_analysis/results/roofline.json``.

* compulsory: each tensor that is read, once, and each result, once.
* unique: distinct bytes read plus distinct bytes written; of an order: over all its launches together.
* requested: bytes of all unmasked lanes, before any cache; operators of PyTorch count in both.
* eager: what PyTorch's operators move for the same three orders of the plain formula (``tensor_traffic``).
* predictions: sum over launches of max(FLOPs / peak, unique / bandwidth). Nothing here is timed.

It exits with 1, one line each, where attention misses a threshold or an operator has no kernels.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks import peaks
from tools.kernel_analysis import RESULTS

ORDERS = ("forward", "backward", "double_backward")


class Peak(NamedTuple):
    """Data-sheet numbers of a chip: dense bfloat16, memory bandwidth."""

    architecture: str
    flops: float
    bandwidth: float


PEAKS = {
    chip: Peak(architecture, peaks.PEAKS[chip].half, peaks.PEAKS[chip].bandwidth)
    for chip, architecture in {"A100": "sm_80", "H100 SXM": "sm_90", "B200": "sm_100"}.items()
}
BATCH, HEADS = 64, 12
"""Predicted times are for so many samples, and heads where the count is per head."""

CHECKED_TOKENS = 197
UNIQUE_LIMIT, REQUESTED_LIMIT, EAGER_FACTOR = 1.3, 4.0, 6.0
"""Thresholds of attention: its double backward's unique and requested bytes over compulsory ones at 197 tokens, and
eager's bytes over ours from there on."""


@dataclass
class Order:
    """One order of one operator, counted."""

    kernels: list[dict[str, Any]]
    unique: int
    requested: int
    compulsory: int
    torch_operators: int  # bytes, within unique and requested
    dot_flops: int
    useful_flops: int


def count(name: str, tokens: int, architecture: str) -> dict[str, Order]:
    """Run an operator's orders in the interpreter with ``architecture``'s launch configurations."""
    import torch

    from diversevit_kernels.triton.runtime import device, launch
    from tools.interpreter.traffic import counting, unique_bytes
    from tools.kernel_analysis.operators import OPERATORS, run_orders
    from tools.kernel_analysis.tensor_traffic import TensorTraffic, bytes_of

    orders: dict[str, Order] = {}
    values = OPERATORS[name].values(tokens, torch.bfloat16)

    def around(order: str, run: Callable[[], Any]) -> Any:
        given = _distinct(values.values())
        with counting() as launches, launch.recording(run=True) as named, TensorTraffic() as other:
            returned = run()
        started = [one for one in named if one.grid[0]]
        results = _distinct(returned if isinstance(returned, tuple) else (returned,))
        needed = [x for x in given if _touched(x, [one.read for one in launches])]
        moved = [unique_bytes([getattr(one, side) for one in launches]) for side in _SIDES]
        orders[order] = Order(
            kernels=[_row(a.name, b) for a, b in zip(started, launches, strict=True)],
            unique=sum(moved) + other.total,
            requested=sum(one.requested for one in launches) + other.total,
            compulsory=sum(map(bytes_of, [*needed, *results])),
            torch_operators=other.total,
            dot_flops=sum(one.dot_flops for one in launches),
            useful_flops=sum(one.useful_flops for one in launches),
        )
        return returned

    with device.pretend(architecture):
        run_orders(name, values, around)
    return orders


_SIDES = ("read", "written")


def _distinct(values: Any) -> list[Any]:
    import torch

    tensors = {x.data_ptr(): x for x in values if isinstance(x, torch.Tensor)}
    return list(tensors.values())


def _touched(x: Any, reads: Sequence[Any]) -> bool:
    """Whether a launch read any element of the tensor."""
    extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    first, last = x.data_ptr(), x.data_ptr() + extent * x.element_size()
    return any(
        bool(((found >= first) & (found < last)).any())
        for one in reads
        for found in one.distinct().values()
    )


def _row(name: str, launched: Any) -> dict[str, Any]:
    fields = ("programs", "dot_flops", "useful_flops", "elementwise", "special", "requested")
    return {"name": name, **{f: getattr(launched, f) for f in fields}, "unique": launched.unique}


def count_eager(name: str, tokens: int) -> dict[str, int]:
    """Return the bytes that PyTorch's operators move for each order of the eager formula, bfloat16."""
    import torch

    from tools.kernel_analysis.operators import run_orders_eagerly
    from tools.kernel_analysis.tensor_traffic import TensorTraffic

    ends: dict[str, int] = {}
    with TensorTraffic() as traffic:
        run_orders_eagerly(name, tokens, torch.bfloat16, lambda o: ends.update({o: traffic.total}))
    before = dict(zip(ORDERS, (0, *ends.values()), strict=False))
    return {order: ends[order] - before[order] for order in ORDERS}


def bound(kernels: Sequence[dict[str, Any]], peak: Peak, scale: int = 1) -> float:
    """Return the seconds that launches take at least: each max(FLOPs / peak, unique bytes / bandwidth)."""
    return scale * sum(
        max(k["dot_flops"] / peak.flops, k["unique"] / peak.bandwidth) for k in kernels
    )


def verdicts(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each threshold that attention misses, or that nothing was counted for."""
    wrong = []
    rows = [row for row in results if row["operator"] == "attention"]
    if not any(row["tokens"] == CHECKED_TOKENS for row in rows):
        wrong.append(f"attention at {CHECKED_TOKENS} tokens was not counted: nothing to check")
    for row in rows:
        where = f"attention N={row['tokens']} {row['chips'][0]}"
        last = row["orders"]["double_backward"]
        ratios = {name: last[name] / last["compulsory"] for name in ("unique", "requested")}
        checked = row["tokens"] == CHECKED_TOKENS
        if checked and ratios["unique"] > UNIQUE_LIMIT:
            wrong.append(
                f"{where}: double backward's unique {ratios['unique']:.2f}x > {UNIQUE_LIMIT}x compulsory"
            )
        if checked and ratios["requested"] > REQUESTED_LIMIT:
            wrong.append(
                f"{where}: double backward's requested {ratios['requested']:.2f}x > {REQUESTED_LIMIT}x"
                " compulsory"
            )
        ours = sum(row["orders"][order]["unique"] for order in ORDERS)
        factor = sum(row["eager"].values()) / ours
        if factor < EAGER_FACTOR and row["tokens"] >= CHECKED_TOKENS:
            wrong.append(f"{where}: eager moves {factor:.2f}x ours < {EAGER_FACTOR}x, all orders")
    return wrong


def configured(name: str, tokens: int, architecture: str) -> tuple[Any, ...]:
    """Return what ``architecture`` launches, and with which tiles: chips that agree are counted once."""
    import torch

    from diversevit_kernels.triton.runtime import device, launch
    from tools.kernel_analysis.operators import OPERATORS, run_orders

    values = OPERATORS[name].values(tokens, torch.bfloat16, "meta")
    with device.pretend(architecture), launch.recording(run=False) as launches:
        run_orders(name, values, lambda _, run: run())
    return tuple((one.name, one.grid, one.configuration.tiles) for one in launches)


def measure(
    operators: Sequence[str], tokens: Sequence[int], chips: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a result per operator, token count (at most ``most_tokens``) and distinct launch configurations."""
    from tools.kernel_analysis.operators import OPERATORS

    results = []
    for name in operators:
        scale = BATCH * (HEADS if name == "attention" else 1)
        most = OPERATORS[name].most_tokens
        for n in dict.fromkeys(n if most is None else min(n, most) for n in tokens):
            alike: dict[tuple[Any, ...], list[str]] = {}
            for chip in chips:
                alike.setdefault(configured(name, n, PEAKS[chip].architecture), []).append(chip)
            for same in alike.values():
                orders = count(name, n, PEAKS[same[0]].architecture)
                predicted = {
                    chip: {
                        order: round(1e6 * bound(one.kernels, PEAKS[chip], scale), 2)
                        for order, one in orders.items()
                    }
                    for chip in same
                }
                results.append(
                    {
                        **{"operator": name, "tokens": n, "chips": same},
                        "orders": {order: asdict(one) for order, one in orders.items()},
                        **{"eager": count_eager(name, n), "predicted_us": predicted},
                    }
                )
    return results


HEADINGS = ("MFLOP", "useful", "req KiB", "uniq KiB", "comp KiB", "req/comp", "uniq/comp")
HEADINGS += ("FLOP/B", "eager/uniq")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the text table: an order per line, its kernels below it, eager and predictions beside it."""
    lines = []
    for row in results:
        lines += ["", f"{row['operator']} N={row['tokens']}, tiles of {', '.join(row['chips'])}"]
        headings = [*HEADINGS, *(f"{chip.split()[0]} us" for chip in row["chips"])]
        lines.append(_line("", headings))
        for order in ORDERS:
            one = row["orders"][order]
            cells = [
                *_amounts(one),
                f"{one['compulsory'] / 1024:.1f}",
                f"{one['requested'] / one['compulsory']:.2f}",
                f"{one['unique'] / one['compulsory']:.2f}",
                f"{one['dot_flops'] / one['unique']:.1f}",
                f"{row['eager'][order] / one['unique']:.1f}",
                *(f"{row['predicted_us'][chip][order]:.1f}" for chip in row["chips"]),
            ]
            lines.append(_line(order, cells))
            for kernel in one["kernels"]:
                intensity = f"{kernel['dot_flops'] / max(1, kernel['unique']):.1f}"
                lines.append(
                    _line(f"  {kernel['name']}", [*_amounts(kernel), "", "", "", intensity])
                )
            if one["torch_operators"]:
                moved = f"{one['torch_operators'] / 1024:.1f}"
                lines.append(_line("  operators of PyTorch", ["", "", moved, moved]))
        ours = sum(row["orders"][order]["unique"] for order in ORDERS)
        lines.append(f"all orders: eager moves {sum(row['eager'].values()) / ours:.1f}x ours")
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:40}" + "".join(f"{cell:>11}" for cell in cells)


def _amounts(x: dict[str, Any]) -> list[str]:
    useful = f"{x['useful_flops'] / x['dot_flops']:.0%}" if x["dot_flops"] else ""
    return [
        f"{x['dot_flops'] / 1e6:.2f}",
        useful,
        f"{x['requested'] / 1024:.1f}",
        f"{x['unique'] / 1024:.1f}",
    ]


def issue_slots(operators: Sequence[str], tokens: Sequence[int], chips: Sequence[str]) -> Any:
    """Run ``issue_slots`` in a process of its own, for it compiles what this one interprets."""
    command = [sys.executable, "-m", "tools.kernel_analysis.issue_slots", "--operators", *operators]
    command += ["--tokens", *map(str, tokens)]
    command += ["--architectures", *dict.fromkeys(PEAKS[chip].architecture for chip in chips)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"rows": [], "wrong": [f"issue slots: {last}"]}
    return json.loads(done.stdout)


def issue_table(slots: Any) -> str:
    """Return a table of the cycles that a pass of each innermost loop takes at least, and the pipe that bounds it."""
    lines = ["", "cycles per pass of each innermost loop, one program alone on a multiprocessor"]
    lines.append(f"{'':66}{'tensor':>9}{'fma':>9}{'mufu':>9}{'lsu':>9}{'issue':>9}  bound by")
    for row in slots["rows"]:
        for loop in row["loops"]:
            known = {pipe: n for pipe, n in loop.items() if n is not None}
            cells = "".join(f"{'?' if n is None else f'{n:.0f}':>9}" for n in loop.values())
            name = f"{row['architecture']} {row['case']} {row['kernel']}"
            name += " (no loop)" if row["straight"] else ""
            lines.append(f"{name:66}{cells}  {max(known, key=lambda pipe: known[pipe])}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577])
    parser.add_argument("--operators", nargs="+", help="default: all")
    parser.add_argument("--chips", nargs="+", choices=list(PEAKS), default=list(PEAKS))
    parser.add_argument("--no-issue-slots", action="store_true", help="compile nothing")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "tools.kernel_analysis.roofline", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})

    from tools.kernel_analysis.operators import OPERATORS, missing

    asked = options.operators or list(OPERATORS)
    if unknown := sorted(set(asked) - set(OPERATORS)):
        parser.error(f"--operators: {unknown[0]} is none of {', '.join(OPERATORS)}")
    wrong = [reason for name in asked if (reason := missing(name))]
    present = [name for name in asked if missing(name) is None]
    results = measure(present, options.tokens, options.chips)
    print(table(results))
    print(
        f"\npredicted us: of {BATCH} samples ({HEADS} heads for attention); a prediction, not timed"
    )
    result: dict[str, Any] = {
        "batch": BATCH,
        "heads": HEADS,
        "peaks": {n: p._asdict() for n, p in PEAKS.items()},
        "results": results,
    }
    if not options.no_issue_slots and present:
        slots = issue_slots(present, options.tokens, options.chips)
        print(issue_table(slots))
        wrong += slots["wrong"]
        result["issue_slots"] = slots["rows"]
    if "attention" in asked:
        wrong += verdicts(results)
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "roofline.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(path)
    for line in wrong:
        print(f"FAILED {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
