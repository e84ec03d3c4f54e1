"""What a loss reads besides its batch, which replays do not read anew: tensors, and numbers that it finds by name."""

import dis
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_internals import tree_flatten

_PLAIN = (Tensor, nn.Parameter)
"""Subclasses are left out, for a compiler has some without memory."""
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype)


class TensorsRead(TorchFunctionMode):
    """A context that notes which tensors Python hands to PyTorch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inside = () if torch.compiler.is_compiling() else tree_flatten((args, kwargs))[0]
        for x in inside:
            if type(x) in _PLAIN:
                self._seen[id(x)] = weakref.ref(x)
        return func(*args, **(kwargs or {}))

    def alive(self) -> list[Tensor]:
        """Those that are still there; what was made in the context is gone after it."""
        return [x for ref in self._seen.values() if (x := ref()) is not None]


class KeptTensors:
    """Tensors that a graph reads where they are, kept, so that their memory is nobody else's.

    Numbers on the host are read when the graph is captured.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self._tensors = list(tensors)
        self._on_host = [x for x in self._tensors if x.device != device]
        self._before = self._now()

    def are_same(self) -> bool:
        """Whether they are where they were, and numbers on the host what they were."""
        return self._before == self._now()

    def _now(self) -> tuple[list[int], list[Any]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(Tensor.tolist, self._on_host))


class NamesRead:
    """The numbers, words and tensors that a function's own code mentions by name.

    They are looked up in its closure, in its globals, and as attributes and entries of what it finds there.
    """

    def __init__(self, function: Any):
        places = {(id(space), name): (space, name) for space, name in _places(function)}
        self._places = [
            place
            for place in places.values()
            if isinstance(_look_up(*place), (*_CONSTANTS, Tensor))
        ]

    def values(self) -> tuple[Any, ...]:
        """What the names stand for: numbers by value, tensors by identity."""
        return tuple(_described(_look_up(*place)) for place in self._places)

    def keep_unchanged(self, before: tuple[Any, ...]) -> None:
        """Forget the names that stood for something else: the function itself assigns them."""
        pairs = zip(self._places, before, self.values(), strict=True)
        self._places = [place for place, old, new in pairs if old == new]


def _places(function: Any) -> Iterator[tuple[Any, str]]:
    """All places that the function's code may mean: a cell or a dictionary, and a name in it."""
    objects = []
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, (FunctionType, MethodType)):
        function = getattr(function, "__call__", None)  # noqa: B004
    if isinstance(function, MethodType):
        objects.append(function.__self__)
        function = function.__func__
    if not isinstance(function, FunctionType):
        return
    names, attributes = _mentioned(function.__code__)
    for cell in function.__closure__ or ():
        yield cell, "cell_contents"
        objects.append(_look_up(cell, "cell_contents"))
    for name in names & function.__globals__.keys():
        yield function.__globals__, name
        objects.append(function.__globals__[name])
    for x in objects:
        if isinstance(x, (ModuleType, type, FunctionType, Tensor)):
            continue
        space = x if isinstance(x, dict) else getattr(x, "__dict__", {})
        for name in attributes & space.keys():
            yield space, name


def _mentioned(code: CodeType) -> tuple[set[str], set[str]]:
    """The names of globals, and those of attributes and entries, in a function and those inside it."""
    names, attributes = set(), set()
    for line in dis.get_instructions(code):
        if line.opname == "LOAD_GLOBAL":
            names.add(line.argval)
        elif line.opname in ("LOAD_ATTR", "LOAD_METHOD") or isinstance(line.argval, str):
            attributes.add(line.argval)
        elif isinstance(line.argval, CodeType):
            for mine, found in zip((names, attributes), _mentioned(line.argval), strict=True):
                mine |= found
    return names, attributes


def _look_up(space: Any, name: str) -> Any:
    if isinstance(space, CellType):
        try:
            return space.cell_contents
        except ValueError:  # not assigned yet
            return _NOTHING
    return space.get(name, _NOTHING)


_NOTHING = object()


def _described(x: Any) -> Any:
    return (type(x), x) if isinstance(x, _CONSTANTS) else id(x)
