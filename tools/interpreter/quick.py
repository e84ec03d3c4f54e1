"""A faster interpreter for Triton kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_FRAME: dict[str, Any] = {}
_LOCALS = " = ".join(f"x{i}" for i in range(20_000))
exec(f"def in_large_frame(f):\n    if f:\n        return f()\n    {_LOCALS} = 0", _FRAME)
_in_large_frame = _FRAME["in_large_frame"]


def _bfloat16_bits(x: Any) -> Any:
    """float32 rounded to the nearest bfloat16, as its bits: a tie goes to the even one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (np.where(np.isnan(x), bits | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(
        np.uint16
    )


@contextmanager
def quick() -> Iterator[None]:
    """Interpret three times as fast inside the block, with the same results but for conversions to bfloat16.

    Those are to the nearest, as a chip's; Triton's interpreter cuts off.

    Triton's interpreter does three things that cost time. It patches the language at every call of a device function,
    although the launch has patched it already: here each set of language modules is patched once a launch. It repeats
    32-bit arithmetic in 64 bits to find overflows: not here. And its deep calls make CPython map and unmap memory
    whenever the depth crosses the end of a chunk of its frame stack: here a launch runs inside one large frame, so
    that all calls fit into one chunk.
    """
    builder = interpreter.interpreter_builder
    options = builder.options
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    convert = interpreter._convert_float
    languages: dict[Any, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        if function not in languages:
            seen = function.__globals__.values()
            languages[function] = frozenset(x.__name__ for x in seen if x is tl or x is tl.core)
        if languages[function] in patched:
            return interpreter._LangPatchScope()
        patched.add(languages[function])
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return _in_large_frame(lambda: run(self, *args, **kwargs))
        finally:
            patched.clear()

    def convert_to_nearest(x: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if given == tl.float32 and wanted == tl.bfloat16:
            return _bfloat16_bits(x)
        return convert(x, given, wanted, rounding)

    builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
    interpreter._convert_float = convert_to_nearest
    try:
        yield
    finally:
        builder.options = options
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, run
        interpreter._convert_float = convert
