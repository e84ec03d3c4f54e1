"""The rows of ``pytest benchmarks/``: operators x shapes x dtypes x orders x implementations, and training steps."""

from collections.abc import Sequence

import torch

from benchmarks.orders import ORDERS
from benchmarks.registry import IMPLEMENTATIONS
from benchmarks.runner import Case
from benchmarks.steps import STEPS, StepSpec, step_implementations
from benchmarks.workloads import OperatorSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
TOKENS, LONG_TOKENS = (197, 577), (1025,)
_BATCH = {
    "cpu": {197: 8, 577: 4, 1025: 1},
    "cuda": {197: 64, 577: 16, 1025: 8},
}
_HEADS = {"cpu": 6, "cuda": 12}
_WIDTH = 64


def shapes(
    operator: str, tokens: int, device: str = DEVICE, tiny: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of an operator's inputs: of a ViT-B on a GPU and for attention, else of a ViT-S."""
    heads = 12 if operator == "attention" else _HEADS[device]
    B, H, d = (2, 3, 8) if tiny else (_BATCH[device][tokens], heads, _WIDTH)
    N = 7 if tiny else tokens
    B = 4 * B if operator == "layer_norm" and not tiny else B
    D = H * d
    return {
        "attention": ((B, H, N, d),) * 3,
        "layer_norm": ((B, N, D), (D,), (D,)),
        "gelu": ((B, N, 4 * D),),
        "head_penalty": ((B, H, N, D),),
        "routed_head_penalty": ((B, N, 3, H, d), (3, H, d, D)),
    }[operator]


def operator_cases(
    operator: str,
    tokens: Sequence[int] = (197,),
    dtypes: Sequence[torch.dtype] = DTYPES,
    tiny: bool = False,
) -> list[Case]:
    """Return every row of one operator."""
    specs = [
        OperatorSpec(operator, shapes(operator, n, tiny=tiny), dtype, order, DEVICE)
        for n in tokens
        for dtype in dtypes
        for order in ORDERS
    ]
    return [
        Case(spec, one)
        for spec in specs
        for one in IMPLEMENTATIONS[operator]
        if one.serves(spec.order) and (not one.compiled or _compiles(spec))
    ]


def _compiles(spec: OperatorSpec) -> bool:
    """Whether the compiled implementation is measured: compiling takes long, so on a CPU for attention alone."""
    return spec.device == "cuda" or spec.operator == "attention"


def step_cases(step: str, tiny: bool = False) -> list[Case]:
    """Return every row of one training step; batch 80 is the paper's."""
    every_layer = {"cpu": (2, 8), "cuda": (64, 64)}[DEVICE]
    batches = {"paper step": (80,), "all-layers step": every_layer}[step]  # by DTYPES
    graphs = (False, True) if DEVICE == "cuda" and step == "all-layers step" else (False,)
    specs = [
        StepSpec(step, 2 if tiny else batch, tiny, DEVICE, dtype=dtype, graph=graph)
        for dtype, batch in zip(DTYPES, batches, strict=False)
        for graph in graphs
    ]
    return [Case(spec, one) for spec in specs for one in step_implementations(step)]


def all_cases(tiny: bool = False) -> list[Case]:
    """Return every default row."""
    operators = [case for name in IMPLEMENTATIONS for case in operator_cases(name, tiny=tiny)]
    return operators + [case for step in STEPS for case in step_cases(step, tiny=tiny)]
