"""One derivative order of an operator, callable under any of PyTorch's autograd systems.

An operator has three orders: forward, backward and double backward. The derivative registered for each is the next
one, and the derivative of the double backward is in ``third_order``. Each order is callable in three ways:

1. ``torch.library`` custom operator: under torch.compile, tracing, profiling, dispatch modes and tensor subclasses.
2. ``FunctorchFunction``: under ``torch.func`` transforms, where a custom operator has no derivative.
3. ``EagerFunction``: otherwise. It calls the operator's own function without the dispatcher. For forward, backward and
   double backward of tensors of a few elements this saves 138 of 351 us of host time for attention, 68 of 214 us for
   layer_norm and 59 of 141 us for gelu (one core of a shared Xeon: ``python -m benchmarks.scripts.dispatch``).

On a GPU the first order of some operators is PyTorch's own (``Native``): there 3. needs no look at who watches, since
PyTorch's operators are right for all of 1. but compilers and tracers. What 3. runs on a GPU itself, it replays
(docs/design/host_time.md).

None of them has a forward-mode derivative: public functions use the plain formula inside a forward-mode level, and an
order that meets a tangent all the same raises. On the backend "reference" no operator is recorded at all: autograd
differentiates the plain formulas, to any order.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._torch_internals import (
    any_requires_grad,
    below_autograd,
    dispatch_key_set,
    dispatch_modes,
    function_of,
    functorch_active,
    in_forward_mode,
    name_of,
    node_class,
    operator_node_name,
    overload_of,
    profiler_enabled,
    tensor_arguments,
    tracing_state,
)
from ..errors import UnsupportedError
from .backends import chosen_backend, replayed

Save = Callable[[Any, tuple[Any, ...], Any], None]
Derivative = Callable[..., Any]
Batch = Callable[..., tuple[Any, Any]]


class Native(NamedTuple):
    """PyTorch's own kernels for one order of an operator.

    Attributes:
        takes: whether they take the operator's arguments.
        run: the operator's function by them.
        forward: ``forward(ctx, *args)``, which runs them and saves what ``backward`` reads.
        backward: ``backward(ctx, *cotangents)``, by PyTorch's kernels unless it is differentiated again.
            By default what is saved, and the derivative, are the operator's.
    """

    takes: Callable[..., bool]
    run: Callable[..., Any]
    forward: Callable[..., Any] | None = None
    backward: Derivative | None = None


class Operator:
    """One derivative order of an operator.

    Args:
        operator: the ``torch.library`` operator; its tensors come first, then what else it takes.
        derivative: ``backward(ctx, *cotangents)``; calls the next order.
        batch: ``vmap(call, size, in_dims, args) -> (outputs, out_dims)`` for ``torch.func.vmap``.
        save: ``setup_context(ctx, inputs, output)``; without it the tensors are saved, the rest is ``ctx.options``, and
            absent cotangents are None.
        results: how many of the operator's tensors callers use; the others are only saved. All by default.
        native: PyTorch's own kernels, used on a GPU while the backend is "auto".
    """

    def __init__(
        self,
        operator: torch.library.CustomOpDef,
        *,
        derivative: Derivative,
        batch: Batch,
        save: Save | None = None,
        results: int | None = None,
        native: Native | None = None,
    ):
        count = tensor_arguments(operator)
        given, save = save, save or _save_inputs(count)
        operator.register_autograd(derivative, setup_context=save)
        self._operator, self._function = operator, function_of(operator)
        self._replayed = None
        self._functorch = _functorch_function(operator, self._whole, save, derivative, batch)
        name = name_of(operator)
        forward = _saving(self._run, given, count, results)
        self._eager_apply = _eager_function(name, forward, derivative)
        self._node_name = operator_node_name(operator)
        self._nodes = (node_class(self._eager_apply.__self__),)
        self._native = native
        if native is not None:
            forward = native.forward or _saving(native.run, given, count, results)
            self._native_apply = _eager_function(name, forward, native.backward or derivative)
            self._nodes += (node_class(self._native_apply.__self__),)

    def __call__(self, *args: Any) -> Any:
        if not runs_eagerly():
            if functorch_active():
                if torch.compiler.is_compiling():
                    raise UnsupportedError(
                        "torch.func transforms inside torch.compile drop second-order terms; call "
                        "torch.func outside torch.compile, or use torch.autograd.grad inside it"
                    )
                return self._functorch.apply(*args)
            refuse_tangents(args)
            if torch.compiler.is_compiling() or tracing_state() is not None:
                return self._operator(*args)
        return self.eagerly(*args)

    def again(self, node: Any) -> Callable[[], Any] | None:
        """What computes again what ``node`` recorded, without a graph; None if it recorded anything but this order.

        It raises what autograd raises if the inputs were overwritten, or freed. Only for orders whose inputs are saved.
        """
        if isinstance(node, self._nodes) or (node is not None and node.name() == self._node_name):
            return lambda: self._computed(node)
        return None

    @torch.no_grad()
    def _computed(self, node: Any) -> Any:
        return self(*node.saved_tensors, *node.options)

    def _whole(self, *args: Any) -> Any:
        """A call that returns every tensor, as a vmap rule has to: other levels save those that callers do not use."""
        if functorch_active():
            return self(*args)
        refuse_tangents(args)
        return self._operator(*args)

    def eagerly(self, *args: Any) -> Any:
        """What a call is where ``runs_eagerly()``, which is not asked again."""
        recorded = torch.is_grad_enabled() and any_requires_grad(*args)
        native = self._native
        if native and _on_gpu(args[0]) and chosen_backend() == "auto" and native.takes(*args):
            # right for dispatch modes and any kind of tensor, as PyTorch's own operators are
            return self._native_apply(*args) if recorded else native.run(*args)
        replay = None
        if self._replayed is not None and chosen_backend() in ("auto", "triton"):
            replay = self._replayed.ready(
                *args
            )  # its tensors are as plain as those of an earlier call
        if _watched(args if replay is None else ()):
            return self._operator(*args)
        if recorded:
            return self._eager_apply(*args)
        return self._run(*args) if replay is None else replay(*args)

    def _run(self, *args: Any) -> Any:
        """The results of the order, without a graph."""
        if not _on_gpu(args[0]) or chosen_backend() not in ("auto", "triton"):
            return self._below(*args)
        if self._replayed is None:
            self._replayed = replayed(self._below)
        return self._replayed(*args)

    def _below(self, *args: Any) -> Any:
        with below_autograd():
            return self._function(*args)


class Orders(NamedTuple):
    """The derivative orders of an operator."""

    forward: Operator
    backward: Operator
    double_backward: Operator


def natively() -> bool:
    """Whether a running backward pass of PyTorch's kernels may be theirs: it is not differentiated again."""
    return not torch.is_grad_enabled() and chosen_backend() == "auto"


def _save_inputs(count: int) -> Save:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(False)

    return save


def _functorch_function(
    operator: torch.library.CustomOpDef, call: Any, save: Save, derivative: Derivative, batch: Batch
) -> Any:
    overload = overload_of(operator)
    return type(
        f"{name_of(operator)}_functorch",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: overload(*args)),
            "setup_context": staticmethod(lambda ctx, inputs, output: save(ctx, inputs, output)),
            "backward": staticmethod(derivative),
            "vmap": staticmethod(
                lambda info, in_dims, *args: batch(call, info.batch_size, in_dims, args)
            ),
        },
    )


def _saving(
    run: Callable[..., Any], save: Save | None, count: int, results: int | None
) -> Callable[..., Any]:
    """``forward(ctx, *args)`` that runs ``run``; without ``save`` it saves the first ``count`` inputs."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        if save is None:
            ctx.save_for_backward(*args[:count])
            ctx.options = args[count:]
            ctx.set_materialize_grads(False)
        else:
            save(ctx, args, output)
        return output if results is None else output[:results]

    return forward


def _eager_function(
    name: str, forward: Callable[..., Any], derivative: Derivative
) -> Callable[..., Any]:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    return type(name, (torch.autograd.Function,), methods).apply


def _watched(args: Sequence[Any]) -> bool:
    """Whether anybody but autograd wants to see the operator: a mode, a profiler, a tracer, a kind of tensor.

    Subclasses, vmapped, lazily negated and functional tensors all have dispatch keys of their own.
    """
    if dispatch_modes() or profiler_enabled():
        return True
    for x in args:
        if type(x) is Parameter:  # of all special kinds it can only be a lazily negated one
            if x.is_neg():
                return True
        elif (
            isinstance(x, Tensor)
            and dispatch_key_set(x).raw_repr() not in _ordinary
            and not _is_ordinary(x)
        ):
            return True
    return False


_on_gpu = attrgetter("is_cuda")

_ordinary: set[int] = set()
"""Dispatch keys that were found to be those of ordinary tensors."""


def _is_ordinary(x: Tensor) -> bool:
    keys = dispatch_key_set(x).raw_repr()
    ordinary = not keys & ~dispatch_key_set(torch.empty(0, device=x.device)).raw_repr()
    if ordinary:
        _ordinary.add(keys)
    return ordinary


def runs_eagerly() -> bool:
    """Whether nothing but reverse-mode autograd is at work, and no formula: the question of every call."""
    return not (
        functorch_active()
        or in_forward_mode()
        or torch.compiler.is_compiling()
        or tracing_state() is not None
        or chosen_backend() == "reference"
    )


def uses_formula() -> bool:
    """Whether public functions use the reference's formula: in forward mode, and on its own backend."""
    return in_forward_mode() or chosen_backend() == "reference"


def by_formula(formula: Callable[..., Any], x: Tensor, *args: Any) -> Any:
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

    def element(i: int) -> Any:
        taken = (
            x.select(dim, i) if dim is not None and isinstance(x, Tensor) else x
            for x, dim in zip(args, in_dims, strict=True)
        )
        return call(*taken)

    results = [element(i) for i in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)
