"""The derivative of a double backward: right in what is linear in it, refused in what is not.

Of an operator y = f(x) the double backward maps x, the cotangent dy and a direction A to gx = dy f''(x) A and
gdy = f'(x) A. Hessian-vector products by reverse mode alone (``torch.autograd.functional.hvp``, the graph of
``functional.jvp``) differentiate that in A, in dy, and gdy alone in x: second derivatives of f, all of them,
which the backward and the double backward there are compute. Only gx in x is a third one. Equations (50)-(52) of
``kernels/README.md``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_internals import will_run
from ..errors import UnsupportedError

Tensors = Sequence[Tensor | None]


class Places(NamedTuple):
    """Where among a double backward's tensors the three kinds stand that have derivatives."""

    inputs: slice  # x
    cotangents: slice  # dy
    directions: slice  # A, in the order of x


class Derivatives(NamedTuple):
    """What (50)-(52) are made of; results are in the order of x, None or anything where there is none."""

    first: Callable[..., Tensors]  # V, of the kinds of dy -> V f'(x)
    second: Callable[[Tensors, Tensors], Tensors]  # dy, A -> dy f''(x) A
    along_two: Callable[[Tensors, Tensors], Tensors]  # A, U -> f''(x)[A, U]


def gradients(
    name: str,
    ctx: Any,
    places: Places,
    derivatives: Derivatives,
    u: Tensors,
    v: Tensors,
) -> tuple[Tensor | None, ...]:
    """The gradients of everything that a double backward was given, all of whose tensors ``ctx`` saved.

    Args:
        name: the public operator's.
        u: the cotangents of gx.
        v: the cotangents of gdy.

    Raises:
        UnsupportedError: a third derivative of f is asked for.
    """
    tensors = ctx.saved_tensors
    asked = wanted(ctx, tensors)
    curved, pulled = (any(x is not None for x in given) for given in (u, v))
    if curved and any(asked[places.inputs]):
        raise UnsupportedError(
            f"{name} is differentiable twice, not three times; run forward and backward inside "
            "dvf.use_backend('reference') for any order (plain PyTorch, N x N memory)"
        )
    dy, a = tensors[places.cotangents], tensors[places.directions]
    grads: list[Tensor | None] = [None] * len(tensors)
    if pulled and any(asked[places.inputs]):
        found = derivatives.second(v, a)  # (51)
        grads[places.inputs] = _chosen(found, asked[places.inputs])
    if curved and any(asked[places.cotangents]):
        found = derivatives.along_two(a, u)  # (52)
        grads[places.cotangents] = _chosen(found, asked[places.cotangents])
    if any(asked[places.directions]):
        of_gx = _chosen(derivatives.second(dy, u) if curved else (), asked[places.directions])
        of_gdy = _chosen(derivatives.first(*v) if pulled else (), asked[places.directions])
        grads[places.directions] = map(added, of_gx, of_gdy)  # (50)
    return *grads, *(None for _ in ctx.options)


def formula_along_two(f: Callable[..., Any], x: Tensors, a: Tensors, u: Tensors) -> Tensors:
    """(52)  f''(x)[A, U] of a plain formula, by two forward modes; a result for each of f's."""
    pairs = [
        (i, y, *(torch.zeros_like(y) if z is None else z for z in (along, other)))
        for i, (y, along, other) in enumerate(zip(x, a, u, strict=True))
        if y is not None and not (along is None and other is None)
    ]
    places, values, along, other = (tuple(kind) for kind in zip(*pairs, strict=True))

    def of_moved(*moved: Tensor) -> Any:
        full = [*x]
        for place, y in zip(places, moved, strict=True):
            full[place] = y
        return f(*full)

    def slope(*moved: Tensor) -> Any:
        return torch.func.jvp(of_moved, moved, along)[1]

    with torch.autocast(values[0].device.type, enabled=False):
        result = torch.func.jvp(slope, values, other)[1]
    return result if isinstance(result, tuple) else (result,)


def wanted(ctx: Any, tensors: Tensors) -> list[bool]:
    """Tell for each tensor whether the running backward pass asks for its gradient.

    ``ctx.needs_input_grad`` says which have one, be it asked for or not.
    """
    edges = iter(ctx.next_functions)
    return [x is not None and _will_run(next(edges)[0]) for x in tensors]


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return will_run(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for, or an engine that does not say
        return True


def _chosen(grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    missing = (None,) * (len(wanted) - len(grads))
    return [x if w else None for x, w in zip((*grads, *missing), wanted, strict=True)]


def added(a: Any, b: Any) -> Any:
    """The sum of two tensors, or the one that there is; None if there is none."""
    return a if b is None else b if a is None else a + b
