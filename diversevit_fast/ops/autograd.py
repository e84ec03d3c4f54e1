"""The derivative ladder: each rung's registered derivative is the next rung, the last one's ``third_order``.

A rung is one ``torch.library`` operator and two ``autograd.Function`` with the same two methods:

* the operator is what compilers, tracers, profilers and tensor subclasses want;
* under ``torch.func`` transforms it raises; there the twin is right;
* where nobody watches, the operator's function is called as it stands, and the plain function records it
  where a gradient is wanted. That spares Python, which between large tensors always runs from cold caches.

Forward-mode derivatives have no rung: public functions use the plain formula inside a forward-mode
level, and a rung that meets a tangent all the same raises. On the backend "reference" no operator is
recorded at all: autograd differentiates the plain formulas, to any order.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._torch_internals import (
    any_requires_grad,
    below_autograd,
    dispatch_keys,
    dispatch_modes,
    function_of,
    functorch_active,
    in_forward_mode,
    name_of,
    overload_of,
    profiler_enabled,
    tracing_state,
)
from ..errors import UnsupportedError
from .backends import chosen_backend

Save = Callable[[Any, tuple[Any, ...], Any], None]
Derivative = Callable[..., Any]
Batch = Callable[..., tuple[Any, Any]]


class Rung:
    """One differentiation order of one operator, callable from any autograd system.

    Args:
        operator: the ``torch.library.custom_op``.
        save: ``setup_context(ctx, inputs, output)``.
        derivative: ``backward(ctx, *cotangents)``; calls the next rung.
        batch: ``vmap(call, size, in_dims, args) -> (outputs, out_dims)`` for ``torch.func.vmap``.
    """

    def __init__(
        self,
        operator: torch.library.CustomOpDef,
        *,
        save: Save,
        derivative: Derivative,
        batch: Batch,
    ):
        operator.register_autograd(derivative, setup_context=save)
        self._operator = operator
        self._function = function_of(operator)
        overload = overload_of(operator)
        self._twin = type(
            f"{name_of(operator)}_twin",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(lambda *args: overload(*args)),
                "setup_context": staticmethod(
                    lambda ctx, inputs, output: save(ctx, inputs, output)
                ),
                "backward": staticmethod(derivative),
                "vmap": staticmethod(
                    lambda info, in_dims, *args: batch(self, info.batch_size, in_dims, args)
                ),
            },
        )

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(*args)
            save(ctx, args, output)
            return output

        self._plain = type(
            name_of(operator),
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(derivative)},
        )

    def _run(self, *args: Any) -> Any:
        with below_autograd():
            return self._function(*args)

    def __call__(self, *args: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if functorch_active():
            if compiling:
                raise UnsupportedError(
                    "torch.func transforms inside torch.compile drop second-order terms; call "
                    "torch.func outside torch.compile, or use torch.autograd.grad inside it"
                )
            return self._twin.apply(*args)
        refuse_tangents(args)
        if compiling or _watched(args):
            return self._operator(*args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return self._plain.apply(*args)
        return self._run(*args)


def _watched(args: Sequence[Any]) -> bool:
    """Whether anybody but autograd wants to see the operator: a mode, a profiler, a tracer, a kind of tensor.

    Subclasses, vmapped, lazily negated and functional tensors all have dispatch keys of their own.
    """
    if dispatch_modes() or profiler_enabled() or tracing_state() is not None:
        return True
    tensors = (x for x in args if isinstance(x, Tensor))
    return any(dispatch_keys(x) & ~_ordinary_keys(x.device.type) for x in tensors)


@cache
def _ordinary_keys(device: str) -> int:
    return dispatch_keys(torch.empty(0, device=device))


def any_order() -> bool:
    """Whether ``reference``'s formula is used as it stands: in forward mode, and on its own backend."""
    return in_forward_mode() or chosen_backend() == "reference"


def plainly(formula: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``formula(x, *args)`` in the dtypes given, as an operator computes it under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return formula(x, *args)


def refuse_tangents(args: Sequence[Any]) -> None:
    """Raise if a tensor carries a forward-mode tangent, which an operator would drop silently."""
    if not in_forward_mode():
        return
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError(
                "forward-mode derivative of a backward pass recorded outside the forward-mode "
                "level; compute the forward pass inside it, where the composite formula is used"
            )


def batch_by_loop(
    call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A vmap rule that is right for every operator: one call per element, results stacked."""

    def element(i: int) -> tuple[Any, ...]:
        taken = (
            x.select(dim, i) if dim is not None and isinstance(x, Tensor) else x
            for x, dim in zip(args, in_dims, strict=True)
        )
        result = call(*taken)
        return result if isinstance(result, tuple) else (result,)

    parts = zip(*map(element, range(size)), strict=True)
    stacked: tuple[Any, ...] = tuple(map(torch.stack, parts))
    if len(stacked) == 1:
        return next(iter(stacked)), 0
    return stacked, (0,) * len(stacked)
