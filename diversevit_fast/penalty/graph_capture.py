"""Steps inside a CUDA graph: whether one is being captured, and what Python has to do around its replays.

A capture records what the device computes. What Python decides meanwhile (is it this step's turn, which samples are
drawn on the CPU) is not repeated by a replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.backends import chosen_backend

if TYPE_CHECKING:
    from .head_diversity import HeadDiversity


_rehearsals = 0


def in_graph() -> bool:
    """Whether what is launched now goes into a CUDA graph, and does not run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def rehearsing() -> bool:
    """Whether a step runs as if it were captured."""
    return _rehearsals > 0


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph, or rehearses that."""
    return rehearsing() or in_graph()


@contextmanager
def rehearsal() -> Iterator[None]:
    """A context in which a step runs as if it were captured."""
    global _rehearsals
    _rehearsals += 1
    try:
        yield
    finally:
        _rehearsals -= 1


def refuse_every() -> UnsupportedError:
    """The error for a penalty of every k-th step inside a capture that somebody else makes."""
    return UnsupportedError(
        "every: a captured CUDA graph repeats one step, with the penalty or without it; "
        "use dvf.graph_step(..., diversity=...), or every=1"
    )


class ReplayedPenalty:
    """The part of a ``HeadDiversity``'s step that Python does around the replays of a CUDA graph.

    Args:
        diversity: the penalty of the step; None for a step that has none.
    """

    def __init__(self, diversity: "HeadDiversity | None"):
        self.diversity = diversity

    def is_due(self) -> bool:
        """Whether the next step has the penalty."""
        return self.diversity is None or self.diversity.step % self.diversity.every == 0

    def kind(self) -> tuple[Any, ...]:
        """What the next step's graph depends on: the kernels, whether it has the penalty, and the options of that."""
        one = self.diversity
        if one is None:
            return (chosen_backend(),)
        return (
            chosen_backend(),
            self.is_due(),
            one.every,
            one.wrt,
            one.granularity,
            one.reduction,
            one.target,
            one.check_finite,
        )

    def state(self) -> Any:
        """What ``restore`` takes, to leave no trace of steps in between."""
        one = self.diversity
        return None if one is None else (one.step, one.cosines, one.samples, one._scale.state())

    def restore(self, state: Any) -> None:
        """Put back what ``state`` returned."""
        if self.diversity is not None:
            self.diversity.step, self.diversity.cosines, self.diversity.samples, scale = state
            self.diversity._scale.restore(scale)

    def generators(self) -> list[torch.Generator]:
        """The generator that draws the samples, if it is not PyTorch's own."""
        own = None if self.diversity is None else self.diversity._split.generator
        return [] if own is None else [own]

    def rewind(self, state: Any) -> int:
        """Go back to ``state``, and return the steps that were counted since."""
        if self.diversity is None:
            return 0
        steps = self.diversity.step - state[0]
        self.restore(state)
        return steps

    def check_count(self, steps: int) -> None:
        """Refuse a step that counts several times, some with and some without the penalty.

        Raises:
            UnsupportedError: there are several ``with`` blocks in it, and ``every`` is above 1.
        """
        one = self.diversity
        if one is not None and one.every > 1 and steps > 1:
            raise UnsupportedError(
                f"every: a step of {steps} `with diversity` blocks cannot be captured; use every=1, or one block"
            )

    @contextmanager
    def captured(self, device: torch.device, *, skips: bool) -> Iterator[list[Tensor]]:
        """A context around a capture, in which ``every``, CPU draws and an adaptive factor are allowed.

        Args:
            skips: whether a step is left out whose gradients are not finite, as by ``GradScaler``.

        Yields:
            The draws of samples, complete at the end, for ``before_replay``.
        """
        one = self.diversity
        if one is None:
            yield []
            return
        if skips:
            one._scale.move_to(device)
        one._in_graph_step = True
        try:
            with one._split.drawn_outside() as draws:
                yield draws
        finally:
            one._in_graph_step = False

    def outcome(self) -> Any:
        """What a capture left on the penalty, for ``replayed``."""
        one = self.diversity
        return None if one is None else (one.cosines, one.samples)

    def before_replay(self, draws: list[Tensor]) -> None:
        """Look at earlier steps' logits, and draw the samples of the step that follows."""
        if self.diversity is not None:
            self.diversity._finite.look()
            self.diversity._split.draw(draws)

    def replayed(self, due: bool, steps: int, outcome: tuple[list[Tensor], Tensor | None]) -> None:
        """Count a replay, which wrote its cosines into the tensors of ``outcome``."""
        one = self.diversity
        if one is not None:
            one.step += steps
            one._scale.changed()
            if due:
                one.cosines, one.samples = outcome
