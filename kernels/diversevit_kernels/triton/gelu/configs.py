"""Launch configurations of GELU: elements of a program, on every chip and at every width."""

from ..runtime.plan import ANY_SIZE, ANY_WIDTH, EVERY_CHIP, INTERPRETER, LaunchTable, row


def _table(name: str) -> LaunchTable:
    return LaunchTable(
        name,
        row(INTERPRETER, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK=32),
        row(EVERY_CHIP, ANY_SIZE, ANY_WIDTH, warps=4, stages=1, BLOCK=1024),
    )


FORWARD = _table("gelu_forward")
BACKWARD = _table("gelu_backward")
DOUBLE_BACKWARD = _table("gelu_double_backward")
