"""The rows of ``pytest benchmarks/``: stages x shapes x dtypes x orders x providers, and the steps."""

from collections.abc import Sequence

import torch

from benchmarks.registry import ORDERS, PROVIDERS
from benchmarks.runner import Case
from benchmarks.steps import STEPS, StepSpec, step_providers
from benchmarks.workloads import Spec

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
    stage: str, tokens: int, device: str = DEVICE, tiny: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the stage's inputs: a ViT-B on a GPU and for attention, else a ViT-S."""
    heads = 12 if stage == "attention" else _HEADS[device]
    B, H, d = (2, 3, 8) if tiny else (_BATCH[device][tokens], heads, _WIDTH)
    N = 7 if tiny else tokens
    B = 4 * B if stage == "layer_norm" and not tiny else B
    D = H * d
    return {
        "attention": ((B, H, N, d),) * 3,
        "layer_norm": ((B, N, D), (D,), (D,)),
        "gelu": ((B, N, 4 * D),),
        "head_penalty": ((B, H, N, D),),
        "routed_head_penalty": ((B, N, 3, H, d), (3, H, d, D)),
    }[stage]


def operator_cases(
    stage: str,
    tokens: Sequence[int] = (197,),
    dtypes: Sequence[torch.dtype] = DTYPES,
    tiny: bool = False,
) -> list[Case]:
    """Every row of one operator."""
    specs = [
        Spec(stage, shapes(stage, n, tiny=tiny), dtype, order, DEVICE)
        for n in tokens
        for dtype in dtypes
        for order in ORDERS
    ]
    return [
        Case(spec, provider)
        for spec in specs
        for provider in PROVIDERS[stage]
        if provider.serves(spec.order) and (not provider.compiled or _compiles(spec))
    ]


def _compiles(spec: Spec) -> bool:
    """Compiling takes ten seconds and more: on a CPU for attention alone."""
    return spec.device == "cuda" or spec.stage == "attention"


def step_cases(stage: str, tiny: bool = False) -> list[Case]:
    """Every row of one training step; batch 80 is the paper's."""
    every_layer = {"cpu": (2, 8), "cuda": (64, 64)}[DEVICE]
    batches = {"paper step": (80,), "all-layers step": every_layer}[stage]  # by DTYPES
    graphs = (False, True) if DEVICE == "cuda" and stage == "all-layers step" else (False,)
    specs = [
        StepSpec(stage, 2 if tiny else batch, tiny, DEVICE, dtype=dtype, graph=graph)
        for dtype, batch in zip(DTYPES, batches, strict=False)
        for graph in graphs
    ]
    return [Case(spec, provider) for spec in specs for provider in step_providers(stage)]


def all_cases(tiny: bool = False) -> list[Case]:
    """Every default row."""
    operators = [case for stage in PROVIDERS for case in operator_cases(stage, tiny=tiny)]
    return operators + [case for stage in STEPS for case in step_cases(stage, tiny=tiny)]
