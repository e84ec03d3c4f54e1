"""A faster interpreter for Triton kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_FRAME: dict[str, Any] = {}
_LOCALS = " = ".join(f"x{i}" for i in range(20_000))
exec(f"def in_large_frame(f):\n    if f:\n        return f()\n    {_LOCALS} = 0", _FRAME)
_in_large_frame = _FRAME["in_large_frame"]


@contextmanager
def quick() -> Iterator[None]:
    """Interpret three times as fast inside the block, with the same results.

    Triton's interpreter does three things that cost time. It patches the language at every call of a device function,
    although the launch has patched it already: here each set of language modules is patched once a launch. It repeats
    32-bit arithmetic in 64 bits to find overflows: not here. And its deep calls make CPython map and unmap memory
    whenever the depth crosses the end of a chunk of its frame stack: here a launch runs inside one large frame, so
    that all calls fit into one chunk.
    """
    builder = interpreter.interpreter_builder
    options = builder.options
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
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

    builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
    try:
        yield
    finally:
        builder.options = options
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, run
