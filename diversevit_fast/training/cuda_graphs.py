"""Recording a function's launches as a CUDA graph: the only part of a captured step that needs a GPU."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..penalty.graph_capture import rehearsal

Job = Callable[[], Any]
_REGISTERS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
"""Whether a graph has to be told of generators; later versions do it by themselves, and complain if they are told."""


class Recording(Protocol):
    """What a job launched, ready to be launched again."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs jobs so that they can be recorded, and records them."""

    def run(self, job: Job) -> Any:
        """Run the job now, where it will be recorded."""
        ...

    def rehearse(self, job: Job) -> Any:
        """Run the job now, and raise where it waits for the device, which cannot be recorded."""
        ...

    def record(self, job: Job, generators: Iterable[torch.Generator]) -> tuple[Recording, Any]:
        """Record the job without running it; return the recording and the memory that replays write into."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all on one stream and in one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, job: Job) -> Any:
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream), _with_earlier_losses():
                return job()
        finally:
            outside.wait_stream(self._stream)

    def rehearse(self, job: Job) -> Any:
        """Run the job in PyTorch's mode that raises before a wait; a wait inside a capture would spoil the graph."""
        with rehearsal(), _waits_are_errors():
            return self.run(job)

    def record(
        self, job: Job, generators: Iterable[torch.Generator]
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Record a graph; other threads, a loader's for instance, may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        if _REGISTERS:
            for generator in generators:
                graph.register_generator_state(generator)
        outside = torch.cuda.current_stream(self.device)
        failure: BaseException | None = None
        results = None
        try:
            with (
                _with_earlier_losses(),
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    results = job()
                except BaseException as error:  # the end of the capture may raise another
                    failure = error
        except BaseException as error:
            failure = failure or error
        finally:
            torch.cuda.set_stream(outside)  # a capture that fails at its end stays on its own
        if failure is not None:
            raise failure
        return graph, results


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records steps of that device, or None where steps are run as they are."""
    return CudaRecorder(device) if device.type == "cuda" else None


@contextmanager
def _with_earlier_losses() -> Iterator[None]:
    """A context in which the loss of an earlier step, on another stream, may still be in somebody's hands.

    It keeps nodes of autograd alive that belong to its stream, which a capture must not wait for.
    """
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)  # 2.14
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        if override is not None:
            override(True)
        try:
            yield
        finally:
            if override is not None:
                override(False)


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    """A context in which what waits for the GPU raises. Not for captures: there the first random number raises too."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(before)


def is_wait(error: BaseException) -> bool:
    """Whether an error of PyTorch says that something waited for the GPU, or was not allowed while recording."""
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "synchronizing CUDA operation" in said or "captur" in said.lower()
    )
