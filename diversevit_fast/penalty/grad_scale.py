"""Scale the prediction before its gradient is taken in float16, so that small gradients do not vanish.

The penalty compares directions, so it does not depend on the factor. As in ``torch.amp.GradScaler``, the
factor is halved while the gradients overflow and doubled after many steps without overflow.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnsupportedError, usage_error

LARGEST = 2.0**15
"""Float16 ends at 65504, and the factor itself is the gradient of the score."""
GROWTH_INTERVAL = 2000


class InnerScale:
    """The factor on the prediction, adapted from step to step.

    Args:
        fixed: the factor; None adapts it where a gradient is float16, and is 1 elsewhere.

    Raises:
        UsageError: a factor that is not a positive number.
    """

    def __init__(self, fixed: float | None = None):
        number = isinstance(fixed, (int, float)) and not isinstance(fixed, bool)
        if fixed is not None and not (number and 0 < fixed < torch.inf):
            raise usage_error(
                "grad_scale", "a positive number or None", repr(fixed), "leave it out"
            )
        self.fixed = fixed
        self.value = LARGEST if fixed is None else float(fixed)
        self._good = 0

    def apply(
        self, tensors: list[Tensor], differentiate: Callable[[float], list[list[Tensor | None]]]
    ) -> tuple[list[list[Tensor | None]], float]:
        """Return ``differentiate(factor)`` and the factor, halved until nothing overflows.

        Raises:
            UnsupportedError: float16 gradients overflow with any factor, or with the fixed one; inside a
                compiled loss without a fixed one.
        """
        half = any(x.dtype == torch.float16 for x in tensors)
        if not half:
            factor = 1.0 if self.fixed is None else self.value
            return differentiate(factor), factor
        if torch.compiler.is_compiling():
            if self.fixed is None:
                raise UnsupportedError(
                    "float16: a compiled loss cannot look for overflow; pass grad_scale=, or use bfloat16"
                )
            return differentiate(self.value), self.value
        while True:
            grads = differentiate(self.value)
            if _finite(grads):
                break
            if self.fixed is not None or self.value < 2.0**-8:
                raise UnsupportedError(
                    f"float16: the gradients of the heads overflow with grad_scale {self.value:g}; "
                    "use torch.autocast with bfloat16, or a smaller grad_scale"
                )
            self.value, self._good = self.value / 2, 0
        factor = self.value
        self._good += 1
        if self.fixed is None and self._good % GROWTH_INTERVAL == 0:
            self.value = min(2 * self.value, LARGEST)
        return grads, factor


def _finite(grads: list[list[Tensor | None]]) -> bool:
    checks = [torch.isfinite(g).all() for of_layer in grads for g in of_layer if g is not None]
    return not checks or bool(torch.stack(checks).all())
