"""Scale the prediction before its gradient is taken in float16, so that small gradients do not vanish.

The penalty compares directions, so it does not depend on the factor. As in ``torch.amp.GradScaler``, the
factor is halved while the gradients overflow and doubled after many steps without overflow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, usage_error
from . import graph_capture

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
        self._moved: tuple[Tensor, Tensor] | None = None
        self._replayed = False  # whether a graph may have changed what was moved

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, whose factor is on the host."""
        self.state()
        return {**vars(self), "_moved": None}

    def state(self) -> tuple[float, int]:
        """The factor and the steps without overflow, as they are now; waits for them if a graph holds them."""
        if self._moved is not None and self._replayed:
            factor, good = self._moved
            self.value, self._good = factor.item(), int(good.item())
            self._replayed = False
        return self.value, self._good

    def changed(self) -> None:
        """Note that a graph was replayed."""
        self._replayed = True

    def restore(self, state: tuple[float, int]) -> None:
        """Go back to what ``state`` returned."""
        self.value, self._good = state
        self._replayed = False
        if self._moved is not None:
            for mine, value in zip(self._moved, state, strict=True):
                mine.fill_(value)

    def move_to(self, device: torch.device) -> None:
        """Keep the factor on ``device`` from now on, where captured steps read and adapt it."""
        if self.fixed is None and self._moved is None:
            factor = torch.tensor(self.value, device=device, dtype=torch.float32)
            self._moved = factor, torch.tensor(self._good, device=device)

    def apply(
        self,
        tensors: list[Tensor],
        differentiate: Callable[[float | Tensor], list[list[Tensor | None]]],
        note: Callable[[Tensor, float], None],
    ) -> tuple[list[list[Tensor | None]], float]:
        """Return ``differentiate(factor)`` and the factor, halved until nothing overflows.

        In a CUDA graph nothing is tried again. Gradients that overflow give a penalty of NaN, and if the factor
        is not fixed it is halved for the next replay.

        Args:
            note: called inside a graph with whether the gradients are finite, and the fixed factor.

        Raises:
            UnsupportedError: float16 gradients overflow with any factor, or with the fixed one; inside a
                compiled loss, or a capture by hand, without a fixed one.
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
        if graph_capture.capturing():
            return self._apply_captured(differentiate, note), self.value
        self.state()
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
        self.restore((self.value, self._good))
        return grads, factor

    def _apply_captured(
        self,
        differentiate: Callable[[float | Tensor], list[list[Tensor | None]]],
        note: Callable[[Tensor, float], None],
    ) -> list[list[Tensor | None]]:
        if self.fixed is not None:
            grads = differentiate(self.value)
            note(_finite(grads), self.value)
            return grads
        if self._moved is None:
            raise UnsupportedError(
                "float16: a CUDA graph cannot try another factor when gradients overflow; pass grad_scale=, "
                "or use dvf.graph_step(..., diversity=..., scaler=...), or bfloat16"
            )
        factor, good = self._moved
        grads = differentiate(factor.clone())
        finite = _finite(grads)
        with torch.no_grad():
            good.copy_(torch.where(finite, good + 1, 0))
            grown = torch.where(good % GROWTH_INTERVAL == 0, 2 * factor, factor).clamp(max=LARGEST)
            factor.copy_(torch.where(finite, grown, factor / 2))
        return grads


def _finite(grads: list[list[Tensor | None]]) -> Tensor:
    """Whether all are finite, a boolean tensor."""
    given = [g for of_layer in grads for g in of_layer if g is not None]
    if not given:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([torch.isfinite(g.detach()).all() for g in given]).all()
