"""The tensors captured inside a ``with`` block, which the penalty differentiates by."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..attachment.attention_modules import AttentionLayer
from ..attachment.parallel import OneBackwardPass
from .input_projections import ProjectionOutput, input_projections
from .recomputed_gelu import linear_after_gelu


@dataclass(frozen=True)
class Captured:
    """One run of one attention layer: the tensors whose gradients are the head gradients.

    ``heads`` is the head output ``[B, H, n, d]``, or None where the gradient of the layer's input is
    asked for: that one is computed from ``projections``. ``tokens`` is N. Where n < N only the first n
    queries were computed; the others have zero gradient.
    """

    layer: int
    num_heads: int
    tokens: int
    heads: Tensor | None = None
    projections: tuple[ProjectionOutput, ...] = ()
    probe: Tensor | None = None
    count: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors to differentiate with respect to."""
        if self.probe is not None:
            return [self.probe]
        return [part.tensor for part in self.projections] if self.heads is None else [self.heads]

    @property
    def samples(self) -> int:
        """The batch size of the run, or the number of windows in it."""
        return self.count or len(self.tensors[0])

    def without_tensors(self, probe: Tensor) -> "Captured":
        """The run in a block that was run apart; the gradient's pass gets to it if it gets to ``probe``."""
        return Captured(self.layer, self.num_heads, self.tokens, probe=probe, count=self.samples)


@dataclass
class Recording:
    """The layer runs of one ``with`` block, in order.

    Attributes:
        runs: those that are complete.
        batches: the batch size of each forward of the whole model.
        earlier: nodes of the graph that were there before the first tensor was captured.
        resumed: a tensor was captured before what a checkpoint recomputes.
        linears: nodes of the linear layers that read the output of a GELU.
        one_pass: refuses a second backward pass, where DDP would not average its gradients.
    """

    runs: list[Captured] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    earlier: set[Any] = field(default_factory=set)
    resumed: bool = False
    linears: list[Any] = field(default_factory=list)
    one_pass: OneBackwardPass | None = None
    _projections: list[tuple[ProjectionOutput, Tensor]] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        """True once a tensor is captured: what runs after it may depend on it."""
        return self.resumed or bool(self.runs or self._projections)

    def note_inputs(self, tensors: Iterable[Any]) -> None:
        """Note what makes tensors that the first layer's surroundings are called with."""
        if not self.begun:
            made = (x.grad_fn for x in tensors if isinstance(x, Tensor))
            self.earlier.update(node for node in made if node is not None)

    def start_layer(self) -> None:
        """Forget the projections of a layer that did not get as far as its attention."""
        self._projections = []

    def add_projection(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> None:
        """Record ``out``, a projection of the running layer's input ``x``."""
        rows, by_head = layer.rows_of(roles), out.ndim == x.ndim + 2
        self._projections.append((ProjectionOutput(out, roles, weight, rows, by_head), x))

    def finish_layer(self, layer: AttentionLayer, tokens: int, heads: Tensor | None) -> None:
        """Record a run of ``layer``: its head output, or if None the projections of its input."""
        made = input_projections(layer, self._projections) if heads is None else ()
        self.runs.append(Captured(layer.index, layer.num_heads, tokens, heads, made))
        self._projections = []

    def add_linear(self, x: Tensor, out: Tensor) -> None:
        """Record a linear layer if its input ``x`` can be computed again."""
        if (node := linear_after_gelu(x, out)) is not None:
            self.linears.append(node)

    def take_runs(self) -> tuple[list[Captured], list[Any]]:
        """Return the runs and the linear layers and forget them, and with them the graph."""
        taken = self.runs, self.linears
        self.runs, self.linears, self.earlier = [], [], set()
        return taken
