"""The rows of ``pytest benchmarks/``: operators x shapes x dtypes x orders x implementations, and training steps."""

from collections.abc import Sequence

import torch

from benchmarks.critics import CRITICS
from benchmarks.orders import BWD, DOUBLE_BWD, FWD, ORDERS
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
    return cases_of(specs)


def anchor_cases(operator: str) -> list[Case]:
    """Return the rows of a GPU whose shapes others published figures for (``anchors``)."""
    cases = cases_of(anchor_specs(operator)) if DEVICE == "cuda" else []
    return [case for case in cases if not case.implementation.compiled]


def anchor_specs(operator: str) -> list[OperatorSpec]:
    half = torch.bfloat16
    attention, norm = ((32, 32, 512, 64),) * 3, ((16384, 4096), (4096,), (4096,))
    specs = [
        *(OperatorSpec("attention", attention, half, order, "cuda") for order in (FWD, BWD)),
        OperatorSpec("attention", ((512, 12, 512, 64),) * 3, half, DOUBLE_BWD, "cuda", causal=True),
        *(OperatorSpec("layer_norm", norm, half, order, "cuda") for order in (FWD, BWD)),
    ]
    return [spec for spec in specs if spec.operator == operator]


def issue_cases(tiny: bool = False) -> list[Case]:
    """Return the rows of the shape in pytorch/pytorch#116350, a gradient penalty of attention in float16."""
    shape = (2, 3, 7, 8) if tiny else (32, 8, 128, 64)
    cases = cases_of([OperatorSpec("attention", (shape,) * 3, torch.float16, DOUBLE_BWD, DEVICE)])
    return [case for case in cases if not case.implementation.compiled]


def cases_of(specs: Sequence[OperatorSpec]) -> list[Case]:
    """Return a row per group and implementation that serves its order."""
    return [
        Case(spec, one)
        for spec in specs
        for one in IMPLEMENTATIONS[spec.operator]
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


def critic_cases(names: Sequence[str] = tuple(CRITICS), tiny: bool = False) -> list[Case]:
    """Return the rows of the R1 step of critics."""
    specs = [
        StepSpec(
            *("R1 step", 2 if tiny else CRITICS[name].batches[DEVICE], tiny, DEVICE),
            **{"dtype": dtype, "critic": name},
        )
        for name in names
        for dtype in DTYPES
    ]
    return [Case(spec, one) for spec in specs for one in step_implementations("R1 step")]


def all_cases(tiny: bool = False) -> list[Case]:
    """Return every default row."""
    operators = [case for name in IMPLEMENTATIONS for case in operator_cases(name, tiny=tiny)]
    steps = [case for step in STEPS if step != "R1 step" for case in step_cases(step, tiny=tiny)]
    return [*operators, *issue_cases(tiny), *steps, *critic_cases(tiny=tiny)]
