"""Launch configurations of LayerNorm: tiles of whole rows, at most TILE elements. The width is the number of features.

Registers hold 12 elements a thread of rows in three pieces: docs/design/kernel_counts.md.
"""

from ..runtime.plan import (
    AMD,
    AMPERE,
    ANY_SIZE,
    ANY_WIDTH,
    BLACKWELL,
    EVERY_CHIP,
    HOPPER,
    INTERPRETER,
    OLDER,
    OTHER,
    RTX_BLACKWELL,
    LaunchTable,
    row,
)

_REST = AMPERE + HOPPER + RTX_BLACKWELL + OLDER + AMD + OTHER

FORWARD = LaunchTable(
    "layer_norm_forward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, TILE=64),
    row(EVERY_CHIP, ANY_SIZE, (0, 2048), warps=4, stages=1, TILE=2048),
    row(EVERY_CHIP, ANY_SIZE, (2048, 4096), warps=8, stages=1, TILE=4096),
    row(EVERY_CHIP, ANY_SIZE, (4096, 8192), warps=16, stages=1, TILE=8192),
)


BACKWARD = LaunchTable(
    "layer_norm_backward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, TILE=64),
    row(BLACKWELL, ANY_SIZE, (0, 512), warps=16, stages=1, TILE=6144),  # 8 spill
    row(BLACKWELL, ANY_SIZE, (512, 2048), warps=8, stages=1, TILE=3072),
    row(_REST, ANY_SIZE, (0, 2048), warps=8, stages=1, TILE=3072),
    row(EVERY_CHIP, ANY_SIZE, (2048, 4096), warps=16, stages=1, TILE=6144),
    row(EVERY_CHIP, ANY_SIZE, (4096, 8192), warps=16, stages=1, TILE=8192),
)
DOUBLE_BACKWARD = LaunchTable(
    "layer_norm_double_backward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, TILE=64),
    row(EVERY_CHIP, ANY_SIZE, (0, 2048), warps=8, stages=1, TILE=3072),
    row(EVERY_CHIP, ANY_SIZE, (2048, 4096), warps=16, stages=1, TILE=6144),
    row(EVERY_CHIP, ANY_SIZE, (4096, 8192), warps=16, stages=1, TILE=8192),
)
