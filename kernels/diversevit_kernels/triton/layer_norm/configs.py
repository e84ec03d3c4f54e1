"""Launch configurations of LayerNorm: tiles of whole rows, about TILE elements. The width is the number of features."""

from ..runtime.plan import ANY_SIZE, ANY_WIDTH, EVERY_CHIP, INTERPRETER, LaunchTable, row

FORWARD = LaunchTable(
    "layer_norm_forward",
    row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, TILE=64),
    row(EVERY_CHIP, ANY_SIZE, (0, 2048), warps=4, stages=1, TILE=2048),
    row(EVERY_CHIP, ANY_SIZE, (2048, 4096), warps=8, stages=1, TILE=4096),
    row(EVERY_CHIP, ANY_SIZE, (4096, 8192), warps=16, stages=1, TILE=8192),
)


def _table(name: str) -> LaunchTable:
    return LaunchTable(
        name,
        row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, TILE=64),
        row(EVERY_CHIP, ANY_SIZE, (0, 1024), warps=8, stages=1, TILE=2048),
        row(EVERY_CHIP, ANY_SIZE, (1024, 2048), warps=16, stages=1, TILE=2048),
        row(EVERY_CHIP, ANY_SIZE, (2048, 4096), warps=16, stages=1, TILE=4096),
        row(EVERY_CHIP, ANY_SIZE, (4096, 8192), warps=16, stages=1, TILE=8192),
    )


BACKWARD = _table("layer_norm_backward")
DOUBLE_BACKWARD = _table("layer_norm_double_backward")
