"""Read machine code: resources, instructions and loops of one kernel, without a GPU.

NVIDIA's is read by ``cuobjdump`` and ``nvdisasm``, which Triton ships; AMD's is the assembly text that Triton keeps.
A loop is a strongly connected part of the control flow graph. Its inner loops are what stays connected without its
first instruction, so loops that share their first instruction count as one. A loop is not a range of addresses:
ptxas moves spin waits behind the epilogue, and jumps back from there.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
from triton import knobs

_FLOAT = r"(pk_)?(fma|fmac|fmaak|fmamk|mac|add|sub|subrev|mul|mad)_(mix\w*_)?(legacy_)?f(16|32|64)"
CATEGORIES = {
    "tensor": r"[A-Z]*MMA(\.|$)|v_(mfma|smfmac|wmma)",
    "fma": rf"(FFMA|FADD|FMUL|HFMA|HADD|HMUL|DFMA|DADD|DMUL)2?(\.|$)|v_{_FLOAT}",
    "mufu": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "lds": r"LDS(\.|$)|ds_read",
    "ldsm": r"LDSM",
    "ldg": r"(LDG|LDGSTS|UTMALDG|UBLKCP)(\.|$)|(global|buffer|flat)_load",
    "sts": r"STS(M|\.|$)|ds_write",
    "stg": r"(STG|UTMASTG)(\.|$)|(global|buffer|flat)_store",
    "shfl": r"SHFL|REDUX|ds_b?permute|ds_swizzle|v_permlane|v_\w+_dpp",
    "bar": r"BAR(\.|$)|WARPSYNC|s_barrier",
    "ldl": r"LDL(\.|$)|scratch_load",
    "stl": r"STL(\.|$)|scratch_store",
}
"""Category -> pattern of the beginning of instructions' names (SASS, then AMD)."""
_COUNTED = {name: re.compile(pattern) for name, pattern in CATEGORIES.items()}


@dataclass(frozen=True)
class Loop:
    """The instructions that one pass of a loop may execute, including those of its inner loops."""

    depth: int  # 0: in no other loop
    innermost: bool  # has no inner loop but waits
    opcodes: Counter[str]

    @property
    def waits(self) -> bool:
        """Whether it only spins until a barrier opens."""
        return not any(counts(self.opcodes).values())


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spill_stores: int  # bytes per thread; -1: unknown
    spill_loads: int
    opcodes: Counter[str]
    loops: list[Loop] = field(default_factory=list)

    @property
    def local_in_loops(self) -> int:
        """Number of local-memory instructions (spills, mostly) inside any loop."""
        outer = [counts(loop.opcodes) for loop in self.loops if loop.depth == 0]
        return sum(c["ldl"] + c["stl"] for c in outer)

    @property
    def local_in_innermost(self) -> int:
        """Number of local-memory instructions inside innermost loops, where they cost most."""
        inner = [counts(loop.opcodes) for loop in self.innermost]
        return sum(c["ldl"] + c["stl"] for c in inner)

    @property
    def innermost(self) -> list[Loop]:
        """The loops where the time goes, longest first."""
        some = [loop for loop in self.loops if loop.innermost and not loop.waits]
        return sorted(some, key=lambda loop: -loop.opcodes.total())

    def mnemonics(self, category: str) -> Counter[str]:
        """Count each instruction of a category, by full name."""
        return Counter({op: n for op, n in self.opcodes.items() if _COUNTED[category].match(op)})

    def loads(self) -> Counter[str]:
        """Count global loads by kind and width in bits: ``LDG.128``, ``LDGSTS.64``, ``load.32``."""
        widths: Counter[str] = Counter()
        for op, n in self.mnemonics("ldg").items():
            widths[_width(op)] += n
        return widths


def counts(opcodes: Counter[str]) -> dict[str, int]:
    """Count the instructions of a loop or a kernel in each of ``CATEGORIES``."""
    total = dict.fromkeys(CATEGORIES, 0)
    for op, n in opcodes.items():
        for name, pattern in _COUNTED.items():
            if pattern.match(op):
                total[name] += n
    return total


def innermost_loops(code: Code) -> list[dict[str, int]]:
    """Return for each innermost loop its depth, the number of instructions (``all``), and that of each category."""
    return [
        {"depth": loop.depth, "all": loop.opcodes.total(), **counts(loop.opcodes)}
        for loop in code.innermost
    ]


def _width(op: str) -> str:
    if not op.isupper():  # AMD
        sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
        return f"load.{next((n for name, n in sizes.items() if name in op), 16)}"
    kind, *parts = op.split(".")
    if kind.startswith("U"):
        return kind  # a bulk copy has no width per thread
    known = (re.fullmatch(r"[US]?(8|16|64|128|256)", p) for p in parts)
    return f"{kind}.{next((m[1] for m in known if m), '32')}"


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    jumps: bool = False  # to ``target``
    falls: bool = True  # to the next instruction
    target: str | None = None
    calls: bool = False  # ``target``, and comes back


class Program:
    """A kernel's instructions and labels in order, with their control flow graph."""

    def __init__(self) -> None:
        self.code: list[_Instruction] = []
        self.labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def graph(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.code)))
        for i, instruction in enumerate(self.code):
            if instruction.falls and i + 1 < len(self.code):
                graph.add_edge(i, i + 1)
            if instruction.jumps:
                graph.add_edge(i, self.labels[instruction.target or ""])
        return graph

    def opcodes(self, nodes: Any) -> Counter[str]:
        return Counter(self.code[i].opcode for i in nodes)

    def loops(self) -> list[Loop]:
        graph = self.graph()
        found = list(_components(graph, set(graph), 0))
        whole = [(self._with_callees(graph, nodes), depth) for nodes, depth in found]
        made = [Loop(depth, True, self.opcodes(nodes)) for nodes, depth in whole]
        for i, (nodes, _) in enumerate(whole):
            inner = [m for m, (other, _) in zip(made, whole, strict=True) if other < nodes]
            made[i] = Loop(made[i].depth, all(m.waits for m in inner), made[i].opcodes)
        return made

    def _with_callees(self, graph: nx.DiGraph, nodes: set[int]) -> set[int]:
        called = {self.code[i].target or "" for i in nodes if self.code[i].calls}
        starts = [self.labels[name] for name in called]
        return nodes.union(starts, *(nx.descendants(graph, start) for start in starts))


def _components(graph: nx.DiGraph, within: set[int], depth: int) -> Iterator[tuple[set[int], int]]:
    """Yield the loops inside ``within`` and their depths. An instruction that jumps to itself is padding."""
    for nodes in nx.strongly_connected_components(graph.subgraph(within)):
        if len(nodes) > 1:
            yield nodes, depth
            entered = [i for i in nodes if any(j not in nodes for j in graph.predecessors(i))]
            yield from _components(graph, nodes - {min(entered or nodes)}, depth + 1)


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<if>@!?\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<args>[^;]*);")
_LABEL = re.compile(r"([.$\w]+):\s*$")
_SYMBOL = re.compile(r"`\(([^)]+)\)")


def sass_program(text: str, name: str) -> Program:
    """Parse kernel ``name`` from what ``nvdisasm -c`` printed."""
    program, inside = Program(), False
    for line in text.splitlines():
        if section := re.match(r"//-+ \.(\S+)", line):
            inside = section[1] == f"text.{name}"
        elif inside and (label := _LABEL.match(line)):
            program.label(label[1])
        elif inside and (found := _SASS.match(line)):
            program.code.append(_sass_instruction(found["op"], found["if"], found["args"]))
    if not program.code:
        raise ValueError(f"{name}: no instruction in what nvdisasm printed")
    return program


def _sass_instruction(op: str, predicate: str | None, operands: str) -> _Instruction:
    kind, symbol = op.partition(".")[0], _SYMBOL.search(operands)
    target = symbol[1] if symbol else None
    if kind in ("BRX", "JMX", "JMP"):
        raise ValueError(f"{op}: a jump through a register; its loops cannot be read")
    if kind == "CALL" and target is not None and not target.startswith(".L_"):
        return _Instruction(op, target=target, calls=True)
    if kind in ("BRA", "CALL") and target is not None:
        maybe = kind == "CALL" or predicate is not None or "," in operands.partition("`")[0]
        return _Instruction(op, jumps=True, falls=maybe, target=target)
    return _Instruction(op, falls=kind not in ("EXIT", "RET") or predicate is not None)


def _tool(tool: Any, *arguments: str) -> str:
    command = [tool.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_cubin(cubin: bytes, name: str, ptxas_log: str = "") -> Code:
    """Read a kernel compiled for NVIDIA. Spilled bytes are in ptxas' log only (``-v``)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool(knobs.nvidia.cuobjdump, "--dump-resource-usage", str(path))
        program = sass_program(_tool(knobs.nvidia.nvdisasm, "-c", str(path)), name)
    found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{name}: not in what cuobjdump printed")
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    stores, loads = (int(spills[1]), int(spills[2])) if spills else (-1, -1)
    opcodes = program.opcodes(range(len(program.code)))
    return Code(int(found[1]), int(found[2]), stores, loads, opcodes, program.loops())


_AMD = re.compile(r"\s+(?P<op>[a-z]\w+)(?P<args>[^;]*)")
_AMD_LABEL = re.compile(r"([.$\w]+):")


def read_amdgcn(text: str, name: str) -> Code:
    """Read a kernel compiled for AMD, from its assembly."""
    program, inside = Program(), False
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            inside = (inside or label[1] == name) and not label[1].startswith(".Lfunc_end")
            if inside:
                program.label(label[1])
        elif inside and (found := _AMD.match(line)):
            program.code.append(_amd_instruction(found["op"], found["args"]))
    number = {
        key: int(value)
        for key, value in re.findall(r"\.(\w+(?:_count|_fixed_size)):\s+(\d+)", text)
    }
    spilled = 4 * number["vgpr_spill_count"]
    opcodes = program.opcodes(range(len(program.code)))
    return Code(
        number["vgpr_count"],
        number["private_segment_fixed_size"],
        spilled,
        spilled,
        opcodes,
        program.loops(),
    )


def _amd_instruction(op: str, operands: str) -> _Instruction:
    if op == "s_setpc_b64":
        raise ValueError(f"{op}: a jump through a register; its loops cannot be read")
    if op.startswith(("s_branch", "s_cbranch")):
        return _Instruction(op, jumps=True, falls=op != "s_branch", target=operands.strip())
    return _Instruction(op, falls=op != "s_endpgm")
