"""Check that the graph from the captured tensors to the logits can be differentiated twice.

The nodes of torch.compile, of reentrant checkpointing and of functions marked ``once_differentiable`` refuse a second
derivative or silently drop it. They are found before a gradient is taken, and reported in one line with a hint.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .._torch_internals import is_differentiable_once
from ..errors import UnsupportedError

_HINTS = {
    "CompiledFunctionBackward": "runs in torch.compile, whose backward cannot be differentiated; compile "
    "only the blocks below the chosen layers, or the whole loss with dvf.compile_loss",
    "CheckpointFunctionBackward": "runs in reentrant checkpointing, whose backward cannot be differentiated; "
    "pass use_reentrant=False",
}


_ONCE = (
    "runs a Function whose backward is marked once_differentiable; PyTorch drops its second derivative where "
    "single gradients are asked for"
)


def is_opaque(node: Any) -> bool:
    """Whether the node refuses a second derivative, or drops it."""
    return _hint_of(type(node)) is not None


def _hint_of(kind: type) -> str | None:
    """Why nodes of this class are opaque, and what to do; None of others."""
    return _HINTS.get(kind.__name__) or (_ONCE if is_differentiable_once(kind) else None)


def depends_on(
    score: Tensor, captured: Sequence[Sequence[Tensor]], earlier: Iterable[Any] = ()
) -> list[bool]:
    """Tell for each group of captured tensors whether ``score`` depends on one of them.

    Args:
        earlier: nodes of the graph that were there before any of the tensors was made, so that none leads to one.

    Raises:
        UnsupportedError: an opaque node made a captured tensor or lies between it and ``score``; or, where
            ``score`` depends on none of them, there is one anywhere below it.
    """
    groups = [{_node_of(x) for x in group} for group in captured]
    root, targets = _node_of(score), set().union(*groups)
    nodes = _below(root, set(earlier) if targets.isdisjoint(earlier) else set())
    found = [not nodes.isdisjoint(group) for group in groups]
    if not any(found) or any(map(_hint_of, set(map(type, nodes)))):
        _refuse_opaque(root, targets)
    return found


def _below(root: Any, left_out: set[Any]) -> set[Any]:
    """The nodes from ``root`` down, without those ``left_out`` and what only they lead to.

    Every step of a model walks its graph here, so this is lean.
    """
    seen, queue = {root, None, *left_out}, [root]
    for node in queue:
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                queue.append(child)
    return seen - left_out


def _refuse_opaque(root: Any, targets: set[Any]) -> None:
    """Raise if an opaque node is where ``depends_on`` refuses it."""
    above: set[Any] = set()  # nodes from which a captured tensor is reached
    opaque: list[tuple[Any, str]] = []
    for node, children in _leaves_first(root):
        if node in targets or any(child in above for child in children):
            above.add(node)
        if (hint := _hint_of(type(node))) is not None:
            opaque.append((node, hint))
    for node, hint in opaque:
        if not above or node in above:
            raise UnsupportedError(f"model: what makes the logits {hint}")


def _node_of(x: Tensor) -> Any:
    """The node of the graph that the tensor's gradient arrives at."""
    node = x.grad_fn
    return get_gradient_edge(x).node if node is None else node


def _leaves_first(root: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield every node from ``root`` down with its children, each after its children."""
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if done:
            yield node, children
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in children)
