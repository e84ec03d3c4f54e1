"""Recorded calls: the allocations and launches of an operator, replayed without the Python that decided on them.

The first call with a signature runs the operator's function and records what it allocates and launches. What follows
from the signature alone is frozen: sizes and strides of allocations, grids, compiled kernels, scalar arguments, and for
each pointer the tensor that it points into with an offset. A later call allocates, and starts each kernel by one call
of Triton's launcher in C: no checks, no views, no argument binding.

A signature is all that the host code of this package depends on: shapes, strides, dtypes and the alignment of tensors
(Triton compiles for it), every other argument, the device, PyTorch's precision of float32 products, and autotuning.
The stream is the current one of each call. To build a signature and look it up takes as long as a launch, so a call is
first compared with the latest one, by one comparison in C (``likeness``).

A call is not recorded, and runs as it is, where its function does anything besides allocating and launching, and where
somebody looks at launches or allocations: hooks of Triton's, tools, tests. Nor is it on versions of Triton whose
launcher this module was not tried with, and on chips of other makers than NVIDIA.

Why, and how it was measured: docs/design/host_time.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common.forks import ForkSafe
from ...common.torch_internals import TorchDispatchMode, likeness, stream_lookup
from . import device, launch, tensors
from .launch import Started

_TRIED = torch.version.hip is None and triton.__version__.startswith("3.8.")
"""Whether Triton's launcher takes a flat list of arguments, with pointers as numbers."""
MOST_SIGNATURES = 4096
"""Signatures kept of one operator; beyond that all are forgotten, and recorded again when they come."""

_HARMLESS = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
    "promote_types",
}
"""Operators of PyTorch's that compute nothing on a device. A result that one of them allocates has no elements."""

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor."""


class _Place(NamedTuple):
    """A pointer: the number of a tensor, inputs first and then allocations, and bytes from its first element."""

    tensor: int
    offset: int


@dataclass(frozen=True)
class _Launch:
    """One launch: the compiled kernel, the number of programs, and its arguments with places for pointers."""

    compiled: Any
    programs: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Result:
    """A tensor that a function returns: the number of an allocation, or None for one without elements."""

    tensor: int | None
    layout: _Layout


@dataclass(frozen=True)
class Recording:
    """What a call allocated, launched and returned.

    Attributes:
        allocations: the layout of each.
        single: whether it returned one tensor and not a tuple.
    """

    allocations: list[_Layout]
    launches: list[_Launch]
    results: list[_Result]
    single: bool


class _Computing(TorchDispatchMode):
    """Collects the names of PyTorch's operators that run, besides those that only view or allocate."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().rpartition("::")[2].partition(".")[0]
        writes = name.endswith("_") or "out" in (kwargs or {})
        if name not in _HARMLESS and (writes or not _is_view(result, args)):
            self.names.add(name)
        return result


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether every tensor in ``result`` lies in the memory of one in ``args``."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    memories = {_memory_of(x) for x in args if isinstance(x, Tensor)}
    return all(isinstance(x, Tensor) and _memory_of(x) in memories for x in results)


def _memory_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _NotRecordableError(Exception):
    """The call cannot be replayed from a recording."""


def record(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Recording | None, Any]:
    """Run ``function`` and return what it did, None where that is more than allocating and launching; its result."""
    computing = _Computing()
    with (
        tensors.allocations.collecting() as allocations,
        launch.starts.collecting() as started,
        computing,
    ):
        result = function(*args)
    if computing.names:
        return None, result
    inputs = [x for x in args if isinstance(x, Tensor)]
    try:
        return _recording(inputs, allocations, started, result), result
    except _NotRecordableError:
        return None, result


def _recording(
    inputs: list[Tensor], allocations: list[Tensor], started: list[Started], result: Any
) -> Recording:
    known = _Numbered([*inputs, *allocations])
    launches = [_launch_of(one, known) for one in started]
    single = isinstance(result, Tensor)
    results, layouts = [], list(map(_layout, allocations))
    for x in (result,) if single else result:
        place = None if x.numel() == 0 else known.place(x)
        if place is not None:
            number = place.tensor - len(inputs)
            if number < 0 or place.offset or x.numel() != allocations[number].numel():
                raise _NotRecordableError
            if any(other.tensor == place.tensor for other in results):
                raise _NotRecordableError
            layouts[number] = _layout(x)
        results.append(_Result(None if place is None else place.tensor, _layout(x)))
    return Recording(layouts, launches, results, single)


def _layout(x: Tensor) -> _Layout:
    return tuple(x.shape), x.stride(), x.dtype


class _Numbered:
    """Tensors by number, and where another tensor points into them.

    Inputs may share their memory, and a later call's may not: a view belongs to one of them only if no other has the
    same storage.
    """

    def __init__(self, known: Sequence[Tensor]):
        self._known = known
        self._number = {id(x): i for i, x in reversed(list(enumerate(known)))}
        self._of_storage: dict[int, list[int]] = {}
        for i, x in enumerate(known):
            self._of_storage.setdefault(_memory_of(x), []).append(i)

    def place(self, x: Tensor) -> _Place:
        number = self._number.get(id(x))
        if number is not None:
            return _Place(number, 0)
        among = self._of_storage.get(_memory_of(x), [])
        if len(among) != 1:
            raise _NotRecordableError
        return _Place(among[0], x.data_ptr() - self._known[among[0]].data_ptr())


def _launch_of(started: Started, known: _Numbered) -> _Launch:
    compiled, programs, args = started
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise _NotRecordableError
    kinds = tuple(compiled.src.signature.values())
    given = (*args, *[None] * (len(kinds) - len(args)))  # constants come last
    return _Launch(compiled, programs, tuple(_arguments(kinds, given, known)))


def _arguments(kinds: Sequence[Any], given: Sequence[Any], known: _Numbered) -> Iterator[Any]:
    """The arguments that the compiled kernel takes, without tuples and constants."""
    for kind, value in zip(kinds, given, strict=True):
        if isinstance(kind, tuple):
            yield from _arguments(kind, value, known)
        elif isinstance(value, Tensor):
            yield known.place(value)
        elif kind != "constexpr":
            yield value


def _replay_of(
    recording: Recording, arguments: Sequence[Any], on: torch.device
) -> Callable[..., Any]:
    """Write the function that replays ``recording``: straight code, a line an allocation and a line a launch."""
    from triton.backends.nvidia import driver

    names: dict[str, Any] = {
        "empty": torch.empty_strided,
        "device": on,
        "stream_of": stream_lookup(),
    }
    taken = [f"x{i}" for i in range(len(arguments))]
    inputs = [name for name, x in zip(taken, arguments, strict=True) if isinstance(x, Tensor)]
    numbered = [*inputs, *(f"made{i}" for i in range(len(recording.allocations)))]
    lines = []
    for i, (shape, strides, dtype) in enumerate(recording.allocations):
        names[f"layout{i}"], names[f"dtype{i}"] = (shape, strides), dtype
        lines.append(f"made{i} = empty(*layout{i}, dtype=dtype{i}, device=device)")
    pointed = {
        p.tensor for one in recording.launches for p in one.arguments if isinstance(p, _Place)
    }
    lines += [f"at{i} = {numbered[i]}.data_ptr()" for i in sorted(pointed)]
    lines.append(f"stream = stream_of({on.index})")
    for i, one in enumerate(recording.launches):
        launcher = one.compiled._run
        kernel_argument = driver.PyKernelArg(nested_tuple=None, type=driver.ARG_KERNEL)
        names[f"launch{i}"], names[f"kernel{i}"] = launcher.launch, one.compiled
        names[f"function{i}"], names[f"metadata{i}"] = (
            one.compiled.function,
            one.compiled.packed_metadata,
        )
        names[f"kinds{i}"] = [kernel_argument] * len(one.arguments)
        names[f"signature{i}"] = launcher.kernel_signature
        cooperative, early = launcher.launch_cooperative_grid, launcher.launch_pdl
        given = []
        for j, value in enumerate(one.arguments):
            if isinstance(value, _Place):
                given.append(
                    f"at{value.tensor} + {value.offset}" if value.offset else f"at{value.tensor}"
                )
            else:
                names[f"value{i}_{j}"] = value
                given.append(f"value{i}_{j}")
        lines.append(
            f"launch{i}({one.programs}, 1, 1, stream, function{i}, {cooperative}, {early}, metadata{i}, "
            f"None, None, None, None, None, kinds{i}, signature{i}, ({', '.join(given)},))"
        )
    returned = []
    for i, result in enumerate(recording.results):
        if result.tensor is None:
            names[f"nothing{i}"] = result.layout
            lines.append(f"empty{i} = empty(*nothing{i}[:2], dtype=nothing{i}[2], device=device)")
            returned.append(f"empty{i}")
        else:
            returned.append(numbered[result.tensor])
    lines.append(f"return {returned[0] if recording.single else '(' + ', '.join(returned) + ',)'}")
    body = "\n    ".join(lines)
    exec(f"def replay({', '.join(taken)}):\n    {body}\n", names)
    return names["replay"]


def _matcher(args: Sequence[Any]) -> Callable[..., bool] | None:
    """Write the function that tells whether a call's arguments are like these, None if it would have to say where not.

    It asks what ``signature`` does of them, and that tensors have the same dispatch keys, in a third of the time.
    """
    taken = [f"x{i}" for i in range(len(args))]
    tensors = {name: x for name, x in zip(taken, args, strict=True) if isinstance(x, Tensor)}
    if any(x.data_ptr() & 15 for x in tensors.values()):
        return None
    names: dict[str, Any] = {"alike": likeness(list(tensors.values()))}
    questions = []
    for name, x in zip(taken, args, strict=True):
        if x is None:
            questions.append(f"{name} is None")
        elif name not in tensors:
            names[f"is_{name}"] = x
            questions.append(f"{name} == is_{name}")
    pointers = " | ".join(f"{name}.data_ptr()" for name in tensors)
    questions += [f"alike({', '.join(tensors)})", f"not ({pointers}) & 15"]
    exec(f"def matches({', '.join(taken)}):\n    return {' and '.join(questions)}\n", names)
    return names["matches"]


class _Latest(NamedTuple):
    """The recording that was replayed last, and for which calls it may be replayed again."""

    matches: Callable[..., bool]
    precision: str
    replay: Callable[..., Any]


class Recorded:
    """A function of the operators' kind, replayed where a call with the same signature is recorded.

    Args:
        function: takes tensors on one device and numbers, writes into none of them, and runs kernels of this package.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._replays: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self._latest_of: dict[tuple[Any, ...], _Latest | None] = {}
        self._latest: _Latest | None = None
        self._guard = ForkSafe()

    def __call__(self, *args: Any) -> Any:
        replay = self.ready(*args)
        if replay is not None:
            return replay(*args)
        if _elsewhere(args):
            with torch.cuda.device(args[0].device):  # a kernel is started on the current device
                return self(*args)
        key = signature(args)
        replay = self._replays.get(key)
        if replay is None or _watched():
            return self._first(key, args)
        self._latest = self._latest_like(key, replay, args)
        return replay(*args)

    def ready(self, *args: Any) -> Callable[..., Any] | None:
        """The replay of a call like the latest, or None: found in one comparison, dispatch keys and all."""
        latest = self._latest
        if (
            latest is None
            or not latest.matches(*args)
            or latest.precision != torch.get_float32_matmul_precision()
            or device.autotuning()
            or _elsewhere(args)
            or _watched()
        ):
            return None
        return latest.replay

    def _first(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        if key in self._replays or not _TRIED or _watched():
            return self._function(*args)
        recording, result = record(self._function, args)
        made = None if recording is None else _replay_of(recording, args, args[0].device)
        with self._guard.lock:
            if len(self._replays) >= MOST_SIGNATURES:
                self._replays.clear()
                self._latest_of.clear()
            self._replays[key] = made
        return result

    def _latest_like(
        self, key: tuple[Any, ...], replay: Callable[..., Any], args: tuple[Any, ...]
    ) -> _Latest | None:
        """What tells later calls like this one, which found ``replay`` by its signature ``key``; written once."""
        kinds = (
            (type(x), x.requires_grad, x.is_inference()) for x in args if isinstance(x, Tensor)
        )
        key = (*key, *kinds)
        if key not in self._latest_of:
            matches = None if device.autotuning() else _matcher(args)
            precision = torch.get_float32_matmul_precision()
            with self._guard.lock:
                self._latest_of[key] = matches and _Latest(matches, precision, replay)
        return self._latest_of.get(key)


_several_devices = cache(lambda: torch.cuda.device_count() > 1)


def _elsewhere(args: Sequence[Any]) -> bool:
    """Whether the arguments lie on another device than the current one."""
    return _several_devices() and args[0].get_device() != torch.cuda.current_device()


def signature(args: Sequence[Any]) -> tuple[Any, ...]:
    """All that the launches of a call depend on; ``args`` begin with a tensor, and the others lie on its device."""
    key: list[Any] = [
        torch.get_float32_matmul_precision(),
        device.autotuning(),
        args[0].get_device(),
    ]
    for x in args:
        if isinstance(x, Tensor):
            key += (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)
        else:
            key.append(x)
    return tuple(key)


_hooks = triton.knobs.runtime


def _watched() -> bool:
    """Whether somebody looks at launches or allocations, or changes them."""
    return bool(
        launch.watched()
        or tensors.allocator is not torch.empty
        or device.pretending()
        or getattr(_hooks.launch_enter_hook, "calls", _hooks.launch_enter_hook)
        or getattr(_hooks.launch_exit_hook, "calls", _hooks.launch_exit_hook)
    )
