"""Looking through the autograd graph of a prediction for what cannot be differentiated twice.

What torch.compile or reentrant checkpointing put there refuses a second derivative, or where it is not asked to
run, drops it. Said before any gradient is taken, it is one line with the hint.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import UnsupportedError

_HINTS = {
    "CompiledFunctionBackward": "runs in torch.compile, whose backward cannot be differentiated; compile "
    "only the blocks below the chosen layers, or the whole loss with dvf.compile_loss",
    "CheckpointFunctionBackward": "runs in reentrant checkpointing; checkpoint only the blocks below the "
    "chosen layers, with use_reentrant=False",
}


def refuse_opaque(score: Tensor, captured: Sequence[Tensor]) -> None:
    """Raise an UnsupportedError if an opaque node made ``captured`` or lies between it and ``score``.

    Where ``score`` depends on none of them: if there is one anywhere below it.
    """
    targets = {get_gradient_edge(x).node for x in captured}
    above: set[Any] = set()  # nodes from which a captured tensor is reached
    opaque: list[tuple[Any, str]] = []
    for node, children in _leaves_first(get_gradient_edge(score).node):
        if node in targets or any(child in above for child in children):
            above.add(node)
        name = type(node).__name__
        if name in _HINTS:
            opaque.append((node, name))
    for node, name in opaque:
        if not above or node in above:
            raise UnsupportedError(f"model: what makes the logits {_HINTS[name]}")


def _leaves_first(root: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every node below ``root`` and its children, each after them."""
    seen, stack = {root}, [(root, False)]
    while stack:
        node, done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if done:
            yield node, children
            continue
        stack.append((node, True))
        for child in children:
            if child not in seen:
                seen.add(child)
                stack.append((child, False))
