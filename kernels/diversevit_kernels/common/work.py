"""What one call of a backend's function asks of the machine, counted from shapes: for predictions, not for timing.

Each operator's folder of a backend has a module ``work`` with the functions of the operator's protocol
(``contracts``) under the same names. They take the same operands, read shapes, strides and dtypes of them and no
values, and return a ``Work``.
"""

from typing import NamedTuple


class Work(NamedTuple):
    """The work of one call. What a kernel computes again, to keep less memory, counts as often as it does so.

    Attributes:
        products: floating-point operations of matrix products, two for each multiplication with its addition.
        elementwise: other operations, one for each number that an addition, exponential, ... makes.
        launches: kernels that are started.
        workspace: bytes allocated besides the results, alive at once.
        narrow: of how many products of narrower numbers one product of the operands is made.
    """

    products: int = 0
    elementwise: int = 0
    launches: int = 1
    workspace: int = 0
    narrow: int = 1


SCORE_OPERATIONS = {"forward": 5, "backward": 9, "double_backward": 22}
"""Operations on each of attention's scores besides the products: (1)-(2), (3)-(4), (7)-(8); an exponential is one."""
GRAM_OPERATIONS = {"forward": 6, "backward": 8, "double_backward": 30}
"""Operations on each element of a Gram matrix: (30)-(32), (33)-(34) and (36)-(38)."""
GELU_OPERATIONS = {"forward": 8, "backward": 9, "double_backward": 19}
"""Operations on each element: a function of about eight for each of (20), its derivatives, and their products, (26)."""


def layer_norm_operations(order: str, parameters: int, cotangents: int = 0) -> int:
    """Operations on each element of LayerNorm: (10)-(12), (14), (15)-(19).

    Args:
        parameters: how many the forward applies, or how many gradients of them are asked for.
        cotangents: those of a double backward that are there.
    """
    first = {"forward": 5, "backward": 9, "double_backward": 10}[order]
    return first + parameters * (1 if order == "forward" else 2) + 6 * cotangents
