"""Free what the graph of a penalised step keeps of GELUs, and compute it again where it is read.

GELU works on the hidden layer, four times as wide as the model. The linear layer after it keeps its output, for the
gradient of its weight; the linear layer before it keeps the gradient of its input, for the second derivative of its own
weight. GELU's nodes keep all that the two are computed from, by one elementwise kernel each.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from .._torch_internals import LEAF, place_in_graph, saved_factor, saved_tensors_hooked
from ..ops.gelu import again, backward_again

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class RecomputedGelu:
    """What an inner backward pass keeps of GELUs, freed a layer at a time, while the pass goes on.

    Args:
        score: what the pass differentiates: all its nodes are recorded after the score's own.
        linears: the nodes of the linear layers after GELUs, in the order of the forward pass.
    """

    def __init__(self, score: Tensor, linears: list[Any]):
        self._seen = place_in_graph(score.grad_fn)
        self._linears = linears

    def free(self, run: Tensor, grad: Tensor) -> None:
        """Free what the pass has done with when it reaches a captured tensor, and computes its gradient."""
        if saved_tensors_hooked():
            return
        self._free_gradients(grad.grad_fn)
        reached = place_in_graph(run.grad_fn) if run.grad_fn is not None else -1
        while self._linears and place_in_graph(self._linears[-1]) > reached:
            _free(self._linears.pop(), again)

    def _free_gradients(self, node: Any) -> None:
        """Free what nodes below ``node`` keep that were not seen before."""
        latest, nodes, met = self._seen, [node], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in met:
                continue
            met.add(node)
            place = place_in_graph(node)
            if self._seen < place < LEAF:
                latest = max(latest, place)
                nodes += [before for before, _ in node.next_functions]
                _free(node, backward_again)
        self._seen = latest


def linear_after_gelu(x: Tensor, out: Tensor) -> Any:
    """The node of the matrix product that made ``out`` of ``x``, if ``x`` is the output of a GELU; else None."""
    if again(x.grad_fn) is None or saved_tensors_hooked():
        return None
    node = _without_views(out.grad_fn)
    return None if node is None or saved_factor(node) is None else node


def _free(node: Any, how: Callable[[Any], Callable[[], Tensor] | None]) -> None:
    """Free the first factor that a matrix product keeps, if ``how`` tells how to compute it again."""
    factor = saved_factor(node)
    if factor is None:
        return
    saved, made_by = factor
    compute = how(_without_views(made_by))
    if compute is None:
        return

    def shape_alone(x: Tensor) -> Any:
        return x.shape if x.is_contiguous() else x

    def computed(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else compute().reshape(kept)

    # it may have hooks already: another context watches the same model, or the pass is repeated
    with suppress(RuntimeError):
        saved.register_hooks(shape_alone, computed)


def _without_views(node: Any) -> Any:
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node
