"""The arguments that backward and double backward of LayerNorm share."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What the forward took and returned, and the cotangent of its result."""

    x: Tensor  # [*lead, *normalized]
    weight: Tensor | None  # [*normalized]
    mean: Tensor  # [*lead]
    rstd: Tensor  # [*lead]
    dy: Tensor  # [*lead, *normalized]
    axes: int  # how many axes are normalized
