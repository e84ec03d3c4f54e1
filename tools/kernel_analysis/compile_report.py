"""Compile every Triton kernel in its default configuration for every architecture, and check it. No GPU.

``python -m tools.kernel_analysis.compile_report`` prints a table, stores it in ``tools/kernel_analysis/results`` (given
``--operators`` or ``--architectures``, only their rows change) and exits with status 1 if a check fails. Up to
head width 128, in bfloat16, float16 and float32, on sm_80, sm_90 and sm_100 a kernel must not touch local
memory inside a loop, must keep its stack within 64 bytes, and must use tensor cores where its source has a
matrix product; spills that a chip itself preferred (``attention.configs.SPILLING``) are allowed. Everywhere it
must compile and fit the chip's shared (and tensor) memory. Elsewhere spills are notes, and only head width 64
in bfloat16 is looked at; float64 nowhere."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from typing import Any

import torch
import triton

from diversevit_kernels.triton.attention.configs import SPILLING
from diversevit_kernels.triton.runtime.device import INTERPRETED
from tools.kernel_analysis import RESULTS, cases
from tools.kernel_analysis.chips import CHIPS, resident
from tools.kernel_analysis.compiling import (
    Binary,
    Compilation,
    HostCall,
    compile_all,
    fresh_compilers,
    record,
)
from tools.kernel_analysis.machine_code import counts, innermost_loops

REQUIRED = ("sm_80", "sm_90", "sm_100")
STACK_LIMIT = 64


Record = dict[str, Any]
"""One binary in the report, as it is stored."""


def check(compilation: Compilation, binary: Binary) -> tuple[list[str], list[str]]:
    """Return what makes the report fail, and what is only worth a line."""
    chip, code = CHIPS[compilation.architecture], binary.code
    failures, spills = [], []
    if binary.shared > chip.shared_per_program:
        failures.append(f"shared memory {binary.shared} of {chip.shared_per_program} bytes")
    if binary.tensor_columns > chip.tensor_columns:
        failures.append(f"tensor memory {binary.tensor_columns} of {chip.tensor_columns} columns")
    if not failures and not _resident(compilation, binary):
        failures.append("a multiprocessor cannot hold one program")
    preferred = _preferred(compilation)
    if code.local_in_loops and not preferred:
        spills.append(
            f"{code.local_in_loops} local-memory instructions inside loops"
            f" ({code.local_in_innermost} in innermost ones)"
        )
    if code.stack > STACK_LIMIT and not preferred:
        spills.append(f"{code.stack} bytes of stack")
    if binary.multiplies and not code.mnemonics("tensor"):
        spills.append("a matrix product without tensor cores")
    binding = compilation.architecture in REQUIRED and any(
        call.binding for call in compilation.calls
    )
    return (failures + spills, []) if binding else (failures, spills)


def _preferred(compilation: Compilation) -> bool:
    """Whether the chip itself preferred a configuration that spills."""
    first = compilation.calls[0]
    itemsize = cases.DTYPES[first.dtype].itemsize
    widest = SPILLING.get((compilation.launch.name, compilation.architecture, itemsize), 0)
    return first.width <= widest


def _resident(compilation: Compilation, binary: Binary) -> int:
    return resident(
        CHIPS[compilation.architecture],
        binary.code.registers,
        binary.warps,
        binary.shared,
        binary.tensor_columns,
    )


def row(compilation: Compilation, binary: Binary) -> Record:
    first, code, chosen = compilation.calls[0], binary.code, compilation.launch.configuration
    failures, notes = check(compilation, binary)
    total = counts(code.opcodes)
    return {
        "operator": first.operator,
        "kernel": compilation.launch.name,
        "function": compilation.launch.kernel.__name__,
        "cases": list(dict.fromkeys(f"{call.order}: {call.case}" for call in compilation.calls)),
        "dtype": first.dtype,
        "width": first.width,
        "architecture": compilation.architecture,
        "target": binary.target,
        "tiles": dict(chosen.tiles),
        "warps": binary.warps,
        "stages": chosen.stages,
        "registers": code.registers,
        "stack": code.stack,
        "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads,
        "ldl": total["ldl"],
        "stl": total["stl"],
        "local_in_loops": code.local_in_loops,
        "local_in_innermost": code.local_in_innermost,
        "shared": binary.shared,
        "shared_limit": CHIPS[compilation.architecture].shared_per_program,
        "tensor_columns": binary.tensor_columns,
        "resident": _resident(compilation, binary),
        "instructions": code.opcodes.total(),
        "tensor": dict(code.mnemonics("tensor")),
        "loads": dict(code.loads()),
        "loops": [{k: n for k, n in loop.items() if n} for loop in innermost_loops(code)],
        "failures": failures,
        "notes": notes,
    }


_COLUMNS = (
    "operator",
    "kernel",
    "case",
    "dtype",
    "width",
    "arch",
    "tiles",
    "warps",
    "stages",
    "regs",
)
_COLUMNS += ("stack", "spill", "in loops", "shared", "CTAs", "tensor", "loads", "main loop")


def cells(r: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    more = f" +{len(r['cases']) - 1}" if len(r["cases"]) > 1 else ""
    kinds: Counter[str] = Counter()
    for name, n in r["tensor"].items():
        kinds[name.partition(".")[0].removeprefix("v_")[:10]] += n
    loop = {k: n for k, n in (r["loops"][0] if r["loops"] else {}).items() if k != "depth"}
    return [
        *(
            r["operator"],
            r["kernel"],
            r["cases"][0] + more,
            r["dtype"],
            str(r["width"]),
            r["target"],
        ),
        " ".join(f"{k}={n}" for k, n in r["tiles"].items()),
        *(str(r[k]) for k in ("warps", "stages", "registers", "stack")),
        f"{r['spill_stores']}/{r['spill_loads']}",
        *(str(r[k]) for k in ("local_in_loops", "shared", "resident")),
        " ".join(f"{k}:{n}" for k, n in kinds.items()) or "-",
        " ".join(f"{k}:{n}" for k, n in sorted(r["loads"].items())) or "-",
        " ".join(f"{k}:{n}" for k, n in loop.items()) or "-",
    ]


def aligned(lines: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def chosen_calls(
    operators: list[str], dtypes: list[str], widths: list[int], quick: bool
) -> list[HostCall]:
    """Return the calls of operators in all dtypes and widths; in float16 only head width 64."""
    return [
        call
        for operator in operators
        for dtype in dtypes
        for width in widths
        if dtype != "float16" or width == 64
        for call in cases.host_calls(operator, dtype, width, quick)
    ]


def report(asked: dict[str, list[HostCall]], jobs: int) -> tuple[list[Record], list[str]]:
    """Record, compile, read and check calls. Return the rows, sorted, and one line per call that has none.

    Args:
        asked: calls by architecture.
    """
    compilations: list[Compilation] = []
    failures: list[str] = []
    for architecture, some in asked.items():
        found, wrong = record(architecture, some)
        compilations += found
        failures += wrong
    rows = []
    with fresh_compilers():
        for done, (i, result) in enumerate(compile_all(compilations, jobs), 1):
            one = compilations[i]
            label = f"{one.architecture} {one.calls[0]}: {one.launch.name}"
            if isinstance(result, str):
                failures.append(f"{label}: {result}")
            else:
                rows.append(row(one, result))
            if sys.stderr.isatty() or done % 50 == 0:
                print(f"{done} of {len(compilations)} compiled", file=sys.stderr)
    return sorted(rows, key=_order), failures


def text(rows: list[Record], failures: list[str], what: str) -> str:
    notes = [
        f"{r['architecture']} {r['kernel']} {r['cases'][0]} {r['dtype']} width {r['width']}: {note}"
        for r in rows
        for note in r["notes"]
    ]
    return "\n\n".join(
        [
            what,
            aligned([list(_COLUMNS), *map(cells, rows)]),
            "\n".join([f"{len(notes)} notes", *notes]),
            "\n".join([f"{len(failures)} failures", *failures]),
        ]
    )


def stored() -> dict[str, Any]:
    """Return the stored report; an empty one if there is none."""
    path = RESULTS / "compile_report.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"runs": [], "rows": []}


def write(rows: list[Record], wrong: list[str], what: str, asked: set[tuple[str, str]]) -> None:
    """Write ``results/compile_report.json`` (a row per line) and the same as text.

    Rows of other operators and architectures than those ``asked`` for stay as they are stored.
    """
    before = stored()
    kept = [r for r in before["rows"] if (r["operator"], r["architecture"]) not in asked]
    everything = sorted([*kept, *rows], key=_order)
    failures = failures_of(everything) + wrong
    runs = [*before["runs"], what] if kept else [what]
    RESULTS.mkdir(exist_ok=True)
    head = json.dumps({"runs": runs, "failures": failures}, indent=1).removesuffix("\n}")
    lines = ",\n".join(map(json.dumps, everything))
    path = RESULTS / "compile_report.json"
    path.write_text(f'{head},\n "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")
    told = text(everything, failures, "\n".join(runs))
    path.with_suffix(".txt").write_text(told + "\n", encoding="utf-8")


def _order(record: Record) -> tuple[Any, ...]:
    keys = ("operator", "kernel", "architecture", "dtype", "width")
    return [record[k] for k in keys], record["cases"]


def failures_of(rows: list[Record]) -> list[str]:
    """Return one line per failed check."""
    return [
        f"{r['architecture']} {r['operator']} {r['cases'][0]} {r['dtype']} width {r['width']}:"
        f" {r['kernel']}: {why}"
        for r in rows
        for why in r["failures"]
    ]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument(
        "--operators", nargs="+", choices=cases.OPERATORS, default=list(cases.OPERATORS)
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(cases.DTYPES), default=list(cases.DTYPES)
    )
    parser.add_argument("--widths", nargs="+", type=int, default=list(cases.WIDTHS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases; widths 64 and 80 in bfloat16 and float32",
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if INTERPRETED:
        print("compile_report: unset TRITON_INTERPRET, nothing is compiled under it")
        return 2
    asked = {}
    for architecture in options.architectures:
        widths, dtypes = options.widths, options.dtypes
        if architecture not in REQUIRED:
            widths, dtypes = [w for w in widths if w == 64], [d for d in dtypes if d == "bfloat16"]
        elif options.quick:
            widths = [w for w in widths if w in (64, 80)]
            dtypes = [d for d in dtypes if d != "float16"]
        quick = options.quick or architecture not in REQUIRED
        asked[architecture] = chosen_calls(options.operators, dtypes, widths, quick)
    start = time.time()
    rows, wrong = report(asked, options.jobs)
    failures = failures_of(rows) + wrong
    calls = sum(map(len, asked.values()))
    what = (
        f"{calls} host calls, {len(rows)} binaries; Triton {triton.__version__}, "
        f"torch {torch.__version__}; {' '.join(options.architectures)}; {' '.join(options.operators)}"
        f"{'; quick' if options.quick else ''}"
    )
    print(text(rows, failures, what))
    print(f"{time.time() - start:.0f} s", file=sys.stderr)
    if not options.no_write:
        pairs = {(name, a) for name in options.operators for a in options.architectures}
        write(rows, wrong, what, pairs)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
