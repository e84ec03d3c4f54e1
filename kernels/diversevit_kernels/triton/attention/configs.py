"""Launch configurations of attention, by the larger of the head's width and its values'.

Each row is justified by ``python -m tools.kernel_analysis.compile_report`` (no spill in a main loop, at most
64 bytes of stack, shared memory within the chip's limit) and Hopper's rows up to width 128 also by an H200: there tiles
of 64 rows on 4 warps, one warpgroup, took half of the time that they took on 8 and less. ``SPILLING`` lists what spills
and was the fastest.

``_FEW_QUERIES``: at most ``FEW_QUERIES`` of them. ``_ALL_KEYS``: a row tile holds all keys, up to BLOCK_N.
``_PLAIN``: no mask and no groups of heads, either of which costs registers; larger tiles than else, counted and not
timed: a quarter to a third fewer instructions for each pair of a query and a key, and larger matrix instructions.
"""

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
    LaunchTable,
    row,
)

# fmt: off
FORWARD = LaunchTable(
    "attention_forward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMPERE, HALF, (0, 96), warps=8, stages=3, BLOCK_M=128, BLOCK_N=64),
    row(AMPERE, HALF, (96, 112), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(AMPERE + BLACKWELL, HALF, (112, 128), warps=8, stages=3, BLOCK_M=128, BLOCK_N=64),
    row(AMPERE + RTX_BLACKWELL + OLDER, HALF, (128, 256), warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, HALF, (0, 64), warps=4, stages=3, BLOCK_M=64, BLOCK_N=64),
    row(HOPPER, HALF, (64, 128), warps=4, stages=3, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, HALF, (128, 256), warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    row(BLACKWELL, HALF, (64, 112), warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
    row(BLACKWELL, HALF, (128, 256), warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
    row(RTX_BLACKWELL + OLDER, HALF, (0, 128), warps=8, stages=3, BLOCK_M=128, BLOCK_N=64),
    row(AMPERE, SINGLE, (0, 96), warps=8, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(AMPERE + RTX_BLACKWELL + OLDER, SINGLE, (128, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(HOPPER, SINGLE, (0, 64), warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, SINGLE, (64, 256), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(BLACKWELL, SINGLE, (0, 256), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(RTX_BLACKWELL + OLDER, SINGLE, (0, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
)
FORWARD_FEW_QUERIES = LaunchTable(
    "attention_forward_few_queries",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(NVIDIA, HALF, (0, 256), warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    row(NVIDIA, SINGLE, (0, 64), warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    row(NVIDIA, SINGLE, (64, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
)
MASK_GRADIENT = LaunchTable(
    "attention_mask_gradient",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMPERE, HALF, (0, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER + BLACKWELL, HALF, (0, 256), warps=8, stages=1, BLOCK_M=64, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, HALF, (0, 64), warps=8, stages=1, BLOCK_M=64, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, HALF, (64, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(NVIDIA, SINGLE, (0, 16), warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE + HOPPER + RTX_BLACKWELL + OLDER, SINGLE, (16, 128), warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(BLACKWELL, SINGLE, (16, 128), warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER + BLACKWELL, SINGLE, (128, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(AMPERE + RTX_BLACKWELL + OLDER, HALF + SINGLE, (128, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
)
MASK_SUMS = LaunchTable(
    "attention_mask_sums",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=1, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(EVERY_CHIP, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=32, BLOCK_N=32),
)
BACKWARD_FEW_QUERIES = LaunchTable(
    "attention_backward_few_queries",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(NVIDIA, HALF, (0, 256), warps=4, stages=2, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, SINGLE, (0, 112), warps=4, stages=2, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, SINGLE, (112, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(NVIDIA, DOUBLE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
)
BACKWARD_ROWS_ALL_KEYS = LaunchTable(
    "attention_backward_rows_all_keys",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE + RTX_BLACKWELL, HALF, (32, 64), warps=8, stages=1, BLOCK_M=32, BLOCK_N=256),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=1, BLOCK_M=64, BLOCK_N=256),
)
BACKWARD_ROWS = LaunchTable(
    "attention_backward_rows",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMPERE + RTX_BLACKWELL + OLDER, HALF, (0, 64), warps=8, stages=1, BLOCK_M=128, BLOCK_N=64),
    row(AMPERE, HALF, (64, 112), warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(AMPERE, HALF, (112, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(NVIDIA, HALF, (128, 256), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, HALF, (0, 64), warps=4, stages=3, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, HALF, (64, 96), warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER + BLACKWELL, HALF, (96, 112), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(HOPPER, HALF, (112, 128), warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(BLACKWELL, HALF, (0, 96), warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    row(BLACKWELL, HALF, (112, 128), warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, HALF, (64, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(AMPERE, SINGLE, (0, 96), warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(NVIDIA, SINGLE, (128, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(HOPPER, SINGLE, (0, 64), warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, SINGLE, (64, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(BLACKWELL + RTX_BLACKWELL + OLDER, SINGLE, (0, 128), warps=8, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
)
BACKWARD_COLUMNS = LaunchTable(
    "attention_backward_columns",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, HALF, (0, 96), warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    row(AMPERE + HOPPER, HALF, (96, 112), warps=8, stages=2, BLOCK_M=32, BLOCK_N=64),
    row(AMPERE, HALF, (112, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(NVIDIA, HALF, (128, 256), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(HOPPER, HALF, (0, 64), warps=4, stages=2, BLOCK_M=32, BLOCK_N=64),
    row(HOPPER, HALF, (64, 96), warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    row(HOPPER, HALF, (112, 128), warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    row(BLACKWELL + RTX_BLACKWELL + OLDER, HALF, (0, 64), warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
    row(BLACKWELL, HALF, (64, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, HALF, (64, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=64),
    row(AMPERE + BLACKWELL, SINGLE, (0, 64), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(AMPERE, SINGLE, (64, 96), warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(AMPERE + HOPPER + BLACKWELL, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(NVIDIA, SINGLE, (128, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(HOPPER, SINGLE, (0, 64), warps=4, stages=1, BLOCK_M=32, BLOCK_N=64),
    row(HOPPER, SINGLE, (64, 96), warps=4, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(BLACKWELL, SINGLE, (64, 96), warps=8, stages=1, BLOCK_M=32, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, SINGLE, (0, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
)
DOUBLE_BACKWARD_FEW_QUERIES = LaunchTable(
    "attention_double_backward_few_queries",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(NVIDIA, HALF, (0, 64), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, HALF, (64, 128), warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, SINGLE + DOUBLE, (0, 128), warps=8, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(NVIDIA, ANY_SIZE, (128, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
)
DOUBLE_BACKWARD_ROWS_ALL_KEYS = LaunchTable(
    "attention_double_backward_rows_all_keys",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE + RTX_BLACKWELL, HALF, (48, 64), warps=8, stages=1, BLOCK_M=32, BLOCK_N=128),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=1, BLOCK_M=64, BLOCK_N=128),
)
DOUBLE_BACKWARD_ROWS = LaunchTable(
    "attention_double_backward_rows",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(AMPERE, HALF, (0, 64), warps=8, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE, HALF, (64, 96), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, HALF, (96, 112), warps=8, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(AMPERE, HALF, (112, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE, HALF, (128, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(HOPPER, HALF, (0, 64), warps=4, stages=3, BLOCK_M=64, BLOCK_N=16),
    row(HOPPER, HALF, (64, 96), warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER, HALF, (96, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
    row(BLACKWELL, HALF, (64, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    row(RTX_BLACKWELL + OLDER, HALF, (0, 128), warps=8, stages=2, BLOCK_M=64, BLOCK_N=16),
    row(AMPERE, SINGLE, (0, 32), warps=2, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(AMPERE, SINGLE, (32, 80), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, SINGLE, (80, 88), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMPERE, SINGLE, (88, 96), warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, SINGLE, (96, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(HOPPER, SINGLE, (0, 64), warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(HOPPER + BLACKWELL, SINGLE, (64, 96), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(HOPPER + BLACKWELL, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(BLACKWELL, SINGLE, (0, 32), warps=4, stages=1, BLOCK_M=64, BLOCK_N=32),
    row(BLACKWELL, SINGLE, (32, 64), warps=4, stages=1, BLOCK_M=64, BLOCK_N=16),
    row(RTX_BLACKWELL + OLDER, SINGLE, (0, 64), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(RTX_BLACKWELL + OLDER, SINGLE, (64, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(NVIDIA, DOUBLE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(HOPPER + BLACKWELL + RTX_BLACKWELL + OLDER, HALF + SINGLE, (128, 256),
        warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
)
DOUBLE_BACKWARD_COLUMNS = LaunchTable(
    "attention_double_backward_columns",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, HALF, (0, 96), warps=8, stages=2, BLOCK_M=16, BLOCK_N=128),
    row(AMPERE, HALF, (96, 128), warps=8, stages=2, BLOCK_M=16, BLOCK_N=64),
    row(HOPPER, HALF, (0, 64), warps=4, stages=2, BLOCK_M=16, BLOCK_N=64),
    row(HOPPER, HALF, (64, 128), warps=4, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(BLACKWELL + RTX_BLACKWELL + OLDER, HALF, (0, 64), warps=8, stages=2, BLOCK_M=16, BLOCK_N=128),
    row(BLACKWELL + RTX_BLACKWELL + OLDER, HALF, (64, 128), warps=8, stages=2, BLOCK_M=16, BLOCK_N=64),
    row(AMPERE, SINGLE, (0, 32), warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(AMPERE, SINGLE, (32, 64), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(AMPERE + HOPPER, SINGLE, (64, 96), warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(AMPERE, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(HOPPER, SINGLE, (0, 64), warps=8, stages=1, BLOCK_M=16, BLOCK_N=128),
    row(HOPPER, SINGLE, (96, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(BLACKWELL, SINGLE, (0, 128), warps=8, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(RTX_BLACKWELL + OLDER, SINGLE, (0, 128), warps=8, stages=1, BLOCK_M=32, BLOCK_N=32),
    row(NVIDIA, DOUBLE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(NVIDIA, HALF + SINGLE, (128, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    row(AMD + OTHER, ANY_SIZE, (0, 256), warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
)
DOUBLE_BACKWARD_ROWS_PLAIN = LaunchTable(
    "attention_double_backward_rows_plain",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(HOPPER, HALF, (0, 64), warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
)
DOUBLE_BACKWARD_COLUMNS_PLAIN = LaunchTable(
    "attention_double_backward_columns_plain",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=32, BLOCK_N=16),
    row(HOPPER, HALF, (0, 64), warps=4, stages=2, BLOCK_M=32, BLOCK_N=64),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
)
DOUBLE_BACKWARD_HEAD_ALL_KEYS = LaunchTable(
    "attention_double_backward_head_all_keys",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK_M=16, BLOCK_N=32),
    row(AMPERE, HALF, (31, 32), warps=4, stages=1, BLOCK_M=64, BLOCK_N=64),
    row(BLACKWELL, HALF + SINGLE, (31, 32), warps=4, stages=1, BLOCK_M=16, BLOCK_N=64),
    row(BLACKWELL, HALF, (63, 64), warps=4, stages=1, BLOCK_M=32, BLOCK_N=64),
)
DOUBLE_BACKWARD_HEAD = LaunchTable(
    "attention_double_backward_head",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, ROW_TILE=16, ROW_KEYS=16, BLOCK_M=16, BLOCK_N=16),
    row(AMPERE + RTX_BLACKWELL, HALF, (0, 64), warps=8, stages=2, ROW_TILE=64, ROW_KEYS=16, BLOCK_M=16, BLOCK_N=64),
    row(BLACKWELL, HALF, (0, 64), warps=8, stages=1, ROW_TILE=64, ROW_KEYS=32, BLOCK_M=16, BLOCK_N=128),
)
# fmt: on

SPILLING = {
    # 0.5 ms against 1.1; spills with four query heads to a key head
    ("attention_backward_columns", "sm_90", 4): 64,
    # 1.3 ms against 3.9
    ("attention_double_backward_rows", "sm_90", 4): 64,
    # 1.2 ms against 2.9; as the first
    ("attention_double_backward_columns", "sm_90", 4): 64,
    # 0.9 ms against 1.4 at width 128; spills at 112
    ("attention_double_backward_columns", "sm_90", 2): 128,
}
"""(kernel, architecture, itemsize) -> widths up to this, where a configuration that spills was measured to be
faster than those without: on an H200, 197 tokens, 64 x 12 heads of width 64 or 64 x 6 of 128."""
