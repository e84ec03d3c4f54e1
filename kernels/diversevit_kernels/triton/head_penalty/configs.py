"""Launch configurations of the head penalty (by number of heads, padded) and of the routed one (by head width)."""

from torch import Tensor

from ..runtime.device import architecture
from ..runtime.plan import (
    AMD,
    AMPERE,
    ANY_SIZE,
    ANY_WIDTH,
    BLACKWELL,
    DOUBLE,
    EVERY_CHIP,
    HALF,
    HOPPER,
    INTERPRETER,
    NVIDIA,
    OLDER,
    OTHER,
    RTX_BLACKWELL,
    SINGLE,
    UNBOUNDED,
    LaunchTable,
    row,
)

SPAN, INTERPRETER_SPAN = 8192, 32
"""Elements of a part of a sample; few in the interpreter, so that small tests have several parts."""


def part_elements(like: Tensor) -> int:
    """Elements of a part of a sample."""
    return INTERPRETER_SPAN if architecture(like.device) == "interpreter" else SPAN


STATISTICS = LaunchTable(
    "head_penalty_statistics",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_K=16, BLOCK_P=2),
    row(EVERY_CHIP, ANY_SIZE, (0, 16), warps=1, stages=2, BLOCK_K=64, BLOCK_P=4),
    row(EVERY_CHIP, ANY_SIZE, (16, 32), warps=2, stages=2, BLOCK_K=64, BLOCK_P=2),
    row(EVERY_CHIP, ANY_SIZE, (32, 64), warps=4, stages=2, BLOCK_K=64, BLOCK_P=1),
)
CURVATURE = LaunchTable(
    "head_penalty_curvature",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_P=2),
    row(EVERY_CHIP, ANY_SIZE, (0, 16), warps=2, stages=1, BLOCK_P=4),
    row(EVERY_CHIP, ANY_SIZE, (16, 32), warps=4, stages=1, BLOCK_P=2),
    row(EVERY_CHIP, ANY_SIZE, (32, 64), warps=8, stages=1, BLOCK_P=1),
)
PRODUCTS = LaunchTable(
    "head_penalty_products",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_K=16),
    row(EVERY_CHIP, ANY_SIZE, (0, 16), warps=1, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, ANY_SIZE, (16, 32), warps=2, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, ANY_SIZE, (32, 64), warps=4, stages=2, BLOCK_K=32),
)
BACKWARD = LaunchTable(
    "head_penalty_backward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_K=16),
    row(EVERY_CHIP, ANY_SIZE, (0, 16), warps=2, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, ANY_SIZE, (16, 32), warps=4, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, ANY_SIZE, (32, 64), warps=8, stages=2, BLOCK_K=32),
)
DOUBLE_BACKWARD = LaunchTable(
    "head_penalty_double_backward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_K=16),
    row(EVERY_CHIP, ANY_SIZE, (0, 16), warps=2, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, HALF + DOUBLE, (16, 32), warps=4, stages=2, BLOCK_K=64),
    row(EVERY_CHIP, HALF + DOUBLE, (32, 64), warps=8, stages=2, BLOCK_K=32),
    row(EVERY_CHIP, SINGLE, (16, 32), warps=4, stages=2, BLOCK_K=32),
    row(EVERY_CHIP, SINGLE, (32, 64), warps=8, stages=2, BLOCK_K=16),
)

_REST = BLACKWELL + RTX_BLACKWELL + OLDER
# fmt: off
ROUTE = LaunchTable(
    "routed_penalty_route",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_T=16, BLOCK_J=16, BLOCK_E=16),
    row(AMPERE + HOPPER, HALF, (0, 80), warps=4, stages=3, BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    row(AMPERE + HOPPER, HALF, (80, 112), warps=8, stages=3, BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    row(AMPERE + HOPPER, HALF, (112, UNBOUNDED), warps=4, stages=3, BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    row(_REST + OTHER, HALF, ANY_WIDTH, warps=4, stages=3, BLOCK_T=64, BLOCK_J=64, BLOCK_E=128),
    row(AMD, HALF, ANY_WIDTH, warps=4, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    row(AMPERE, SINGLE, (0, 80), warps=8, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    row(AMPERE, SINGLE, (80, 112), warps=8, stages=2, BLOCK_T=32, BLOCK_J=32, BLOCK_E=64),
    row(AMPERE, SINGLE, (112, UNBOUNDED), warps=8, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    row(HOPPER, SINGLE, ANY_WIDTH, warps=4, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    row(_REST + AMD + OTHER, SINGLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
    row(EVERY_CHIP, DOUBLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=64, BLOCK_J=32, BLOCK_E=64),
)
ROUTE_BACK = LaunchTable(
    "routed_penalty_route_back",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_T=16, BLOCK_J=16, BLOCK_E=16),
    row(AMPERE, SINGLE, (0, 80), warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(AMPERE, SINGLE, (80, 112), warps=8, stages=1, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(AMPERE, SINGLE, (112, UNBOUNDED), warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(HOPPER, SINGLE, ANY_WIDTH, warps=4, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(_REST + AMD + OTHER, SINGLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(NVIDIA + OTHER, HALF, ANY_WIDTH, warps=4, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=64),
    row(AMD, HALF, ANY_WIDTH, warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
    row(EVERY_CHIP, DOUBLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=32),
)
WEIGHT = LaunchTable(
    "routed_penalty_weight",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_T=16, BLOCK_J=16, BLOCK_E=16),
    row(HOPPER, SINGLE, ANY_WIDTH, warps=4, stages=1, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
    row(AMPERE + _REST + AMD + OTHER, SINGLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
    row(NVIDIA + OTHER, HALF, ANY_WIDTH, warps=4, stages=2, BLOCK_T=64, BLOCK_J=64, BLOCK_E=64),
    row(AMD, HALF, ANY_WIDTH, warps=8, stages=2, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
    row(EVERY_CHIP, DOUBLE, ANY_WIDTH, warps=8, stages=2, BLOCK_T=32, BLOCK_J=64, BLOCK_E=64),
)
# fmt: on
