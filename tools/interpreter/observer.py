"""Observe Triton's interpreter: every launch, memory access, product and elementwise operation.

The interpreter's builder is patched for the length of a ``with`` block and restored after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


class Observer:
    """The base class of those whom ``observed`` reports to; each method may raise."""

    def begin(self, kernel: str, tensors: list[Tensor], programs: int) -> None: ...
    def access(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None: ...
    def dot(self, a: np.ndarray, b: np.ndarray) -> None: ...
    def elementwise(self, results: int, special: bool) -> None: ...


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Report every launch, access, product and elementwise operation of the interpreter.

    Raises:
        RuntimeError: Triton compiles its kernels in this process.
    """
    if not knobs.runtime.interpret:
        raise RuntimeError(
            "counting needs the interpreter: set TRITON_INTERPRET=1 before importing triton"
        )
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    reducer = interpreter.ReduceScanOpInterface
    saved = [
        (owner, name, vars(owner)[name])
        for owner, names in (
            (builder, ("create_masked_load", "create_masked_store", "create_dot", "create_erf")),
            (builder, ("binary_op", "unary_op", "create_rsqrt", "create_fma")),
            (builder, ("create_atomic_cas", "create_atomic_rmw")),
            (executor, ("__call__",)),
            (reducer, ("apply",)),
        )
        for name in names
    ]
    try:
        for owner, name, original in saved:
            setattr(owner, name, _WRAPPERS[name](original, observer))
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def _lanes(ptrs: Any, mask: Any) -> tuple[np.ndarray, int]:
    """Return the addresses of the unmasked lanes, and bytes per lane."""
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    addresses = np.asarray(ptrs.data)
    if mask is None:
        return addresses.reshape(-1), size
    kept = (
        mask.data if isinstance(mask, interpreter.TensorHandle) else mask
    )  # descriptors: an array
    return addresses[np.broadcast_to(kept, addresses.shape).astype(bool)], size


def _wrap_load(original, observer):
    def create_masked_load(self, ptrs, mask, *rest, **options):
        observer.access(*_lanes(ptrs, mask), False)
        return original(self, ptrs, mask, *rest, **options)

    return create_masked_load


def _wrap_store(original, observer):
    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        observer.access(*_lanes(ptrs, mask), True)
        return original(self, ptrs, value, mask, *rest, **options)

    return create_masked_store


def _wrap_cas(original, observer):
    def create_atomic_cas(self, ptr, *rest):
        for stored in (False, True):
            observer.access(*_lanes(ptr, None), stored)
        return original(self, ptr, *rest)

    return create_atomic_cas


def _wrap_rmw(original, observer):
    def create_atomic_rmw(self, operation, ptr, value, mask, *rest):
        for stored in (False, True):
            observer.access(*_lanes(ptr, mask), stored)
        return original(self, operation, ptr, value, mask, *rest)

    return create_atomic_rmw


def _wrap_dot(original, observer):
    def create_dot(self, a, b, *rest):
        observer.dot(a.data, b.data)
        return original(self, a, b, *rest)

    return create_dot


def _wrap_elementwise(special_functions: tuple[Any, ...] | None):
    """Return a wrapper that counts those of ``special_functions`` (None: all that it wraps) as special."""

    def wrap(original, observer):
        def operation(self, *args):
            result = original(self, *args)
            if result.dtype.scalar.is_floating():
                special = special_functions is None or args[-1] in special_functions
                observer.elementwise(result.data.size, special)
            return result

        return operation

    return wrap


def _wrap_reduction(original, observer):
    def apply(self, values):
        # the original calls itself with a tuple
        if not isinstance(values, tuple) and values.dtype.is_floating():
            observer.elementwise(values.handle.data.size, False)
        return original(self, values)

    return apply


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in _tensors(y)]
    base = getattr(x, "base", x) if not isinstance(x, Tensor) else x
    return [base] if isinstance(base, Tensor) else []


def _wrap_launch(original, observer):
    def __call__(self, *args, **options):  # noqa: N807
        grid = self.grid if not callable(self.grid) else ()
        tensors = _tensors((*args, *options.values()))
        observer.begin(self.fn.__name__, tensors, int(np.prod(grid)))
        try:
            with (
                _disable_current_modes()
            ):  # what the interpreter asks of PyTorch is nobody's traffic
                return original(self, *args, **options)
        except InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, AssertionError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    return __call__


_WRAPPERS = {
    "create_masked_load": _wrap_load,
    "create_masked_store": _wrap_store,
    "create_atomic_cas": _wrap_cas,
    "create_atomic_rmw": _wrap_rmw,
    "create_dot": _wrap_dot,
    "create_erf": _wrap_elementwise(None),
    "create_rsqrt": _wrap_elementwise(None),
    "create_fma": _wrap_elementwise(()),
    "binary_op": _wrap_elementwise(()),
    "unary_op": _wrap_elementwise((np.exp, np.exp2, np.log, np.log2, np.sqrt, np.sin, np.cos)),
    "apply": _wrap_reduction,
    "__call__": _wrap_launch,
}
