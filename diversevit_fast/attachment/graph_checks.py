"""Check that the graph from the captured tensors to the logits can be differentiated twice.

The nodes of torch.compile and of reentrant checkpointing refuse a second derivative or silently drop it.
They are found before a gradient is taken, and reported in one line with a hint.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .._torch_internals import in_checkpoint
from ..errors import UnsupportedError

_HINTS = {
    "CompiledFunctionBackward": "runs in torch.compile, whose backward cannot be differentiated; compile "
    "only the blocks below the chosen layers, or the whole loss with dvf.compile_loss",
    "CheckpointFunctionBackward": "runs in reentrant checkpointing; checkpoint only the blocks below the "
    "chosen layers, with use_reentrant=False",
}


def depends_on(score: Tensor, captured: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Tell for each group of captured tensors whether ``score`` depends on one of them.

    Raises:
        UnsupportedError: an opaque node made a captured tensor or lies between it and ``score``; or, where
            ``score`` depends on none of them, there is one anywhere below it.
    """
    groups = [{get_gradient_edge(x).node for x in group} for group in captured]
    targets = set().union(*groups)
    found: set[Any] = set()
    above: set[Any] = set()  # nodes from which a captured tensor is reached
    opaque: list[tuple[Any, str]] = []
    for node, children in _leaves_first(get_gradient_edge(score).node):
        if node in targets:
            found.add(node)
        if node in targets or any(child in above for child in children):
            above.add(node)
        name = type(node).__name__
        if name in _HINTS:
            opaque.append((node, name))
    for node, name in opaque:
        if not above or node in above:
            raise UnsupportedError(f"model: what makes the logits {_HINTS[name]}")
    return [not found.isdisjoint(nodes) for nodes in groups]


def refuse_checkpointing() -> None:
    """Refuse activation checkpointing around a chosen layer: it would run again outside the context.

    Raises:
        UnsupportedError: non-reentrant checkpointing is saving tensors here.
    """
    if in_checkpoint():
        raise UnsupportedError(
            "model: a chosen layer runs inside activation checkpointing, which would recompute it "
            "without this context; checkpoint only the blocks below the chosen layers"
        )


def _leaves_first(root: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every node from ``root`` down with its children, each after its children."""
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
