"""Count how many cycles the inner loop of each compiled kernel must take, by execution pipe.

Not a measurement: instructions of one pass of an innermost loop (of the whole kernel, where it has none;
``machine_code`` reads them) over what a multiprocessor starts per cycle. The largest pipe is a lower bound
on a pass; latencies and bank conflicts are not seen.

``python -m tools.kernel_analysis.issue_slots`` prints JSON; it compiles, so Triton's interpreter must be off.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diversevit_kernels.triton.runtime import device, launch
from tools.kernel_analysis.compiling import HostCall, compile_one, fresh_compilers, record
from tools.kernel_analysis.machine_code import Loop, counts
from tools.kernel_analysis.operators import OPERATORS, WIDTH, missing, run_orders


@dataclass(frozen=True)
class Pipes:
    """Throughput of one multiprocessor, per cycle. Sources: the whitepapers of A100, H100 and Blackwell."""

    tensor: int  # dense bfloat16 floating-point operations
    fma: int  # float32 lanes
    mufu: int = 16  # special-function lanes
    lsu: int = 32  # load and store lanes
    schedulers: int = 4  # warps that may issue


PIPES = {"sm_80": Pipes(2048, 64), "sm_90": Pipes(4096, 128), "sm_100": Pipes(8192, 128)}
LANES = 32
_MEMORY = ("lds", "ldsm", "sts", "ldg", "stg")


def tensor_flops(opcode: str) -> int | None:
    """Return the floating-point operations of one warp's tensor instruction; None if its name does not say."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k // 4  # a group of four warps issues it together
    if found := re.match(r"HMMA\.(16)(8)(8|16)\b", opcode):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k
    return None


def cycles(loop: Loop, warps: int, pipes: Pipes) -> dict[str, float | None]:
    """Return how many cycles one pass of ``loop`` by one program occupies each pipe of a multiprocessor."""
    found = counts(loop.opcodes)
    tensor = {op: n for op, n in loop.opcodes.items() if re.match(r"[A-Z]*MMA(\.|$)", op)}
    flops = [(tensor_flops(op), n) for op, n in tensor.items()]
    known = all(each is not None for each, _ in flops)
    return {
        "tensor": sum((each or 0) * n for each, n in flops) * warps / pipes.tensor
        if known
        else None,
        "fma": found["fma"] * warps * LANES / pipes.fma,
        "mufu": found["mufu"] * warps * LANES / pipes.mufu,
        "lsu": sum(found[kind] for kind in _MEMORY) * warps * LANES / pipes.lsu,
        "issue": loop.opcodes.total() * max(1.0, warps / pipes.schedulers),
    }


def host_calls(name: str, tokens: int, architecture: str) -> list[HostCall]:
    """Return the calls of an operator's three orders on meta tensors, bfloat16."""
    calls: list[HostCall] = []

    def around(order: str, run: Any) -> Any:
        case = f"N={tokens}"
        calls.append(HostCall(name, order, case, "bfloat16", WIDTH, lambda _: run()))
        return run()

    with device.pretend(architecture), launch.recording(run=False):
        run_orders(name, OPERATORS[name].values(tokens, torch.bfloat16, "meta"), around)
    return calls


def measure(operators: Sequence[str], tokens: Sequence[int], architectures: Sequence[str]) -> Any:
    """Return rows of operator, order, tokens, architecture, kernel and cycles per pass; and what went wrong."""
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with fresh_compilers():
        for architecture in architectures:
            calls = [
                call
                for name in operators
                for n in tokens
                for call in host_calls(name, n, architecture)
            ]
            compilations, errors = record(architecture, calls)
            wrong += errors
            for compilation in compilations:
                binary = compile_one(compilation)
                loops = [
                    {k: v if v is None else round(v, 1) for k, v in row.items()}
                    for loop in binary.code.innermost or [Loop(0, True, binary.code.opcodes)]
                    for row in [cycles(loop, binary.warps, PIPES[architecture])]
                ]
                rows += [
                    {
                        **{"operator": call.operator, "order": call.order, "case": call.case},
                        **{"architecture": architecture, "kernel": compilation.launch.name},
                        **{"warps": binary.warps, "loops": loops},
                        "straight": not binary.code.innermost,
                    }
                    for call in compilation.calls
                ]
    return {"rows": rows, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577])
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--architectures", nargs="+", choices=list(PIPES), default=list(PIPES))
    options = parser.parse_args()
    present = [name for name in options.operators if missing(name) is None]
    json.dump(measure(present, options.tokens, options.architectures), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
