"""A stand-in for CUDA graphs on the CPU: records the operators that a job calls, with their memory, and repeats them.

As in a CUDA graph, Python is not run again: numbers stay what they were, and results are written into the same
memory. Unlike there, recording also computes, and memory of intermediate results is never reused.
"""

import importlib
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diversevit_fast._torch_internals import below_autograd
from diversevit_fast.penalty import graph_capture
from diversevit_fast.training import cuda_graphs

aten = torch.ops.aten
_WAITS = {aten._local_scalar_dense.default, aten.equal.default}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class StandInGraph(TorchDispatchMode):
    """The operators called while it is entered."""

    def __init__(self, keep=True):
        super().__init__()
        self.calls, self.keep, self.replays = [], keep, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _WAITS:
            raise RuntimeError("called a synchronizing CUDA operation")
        out = func(*args, **kwargs)
        if func.overloadpacket.__name__ in _ALLOCATES:
            if not out.is_floating_point():
                out.zero_()  # a capture does not look at values, such as indices; recording here does
        elif self.keep:
            args, kwargs = tree_map(lambda x: x, (args, kwargs))  # lists may change
            self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        self.replays += 1
        with below_autograd():
            for func, args, kwargs, out in self.calls:
                made = func(*args, **kwargs)
                for mine, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                    if isinstance(mine, torch.Tensor) and mine.data_ptr() != new.data_ptr():
                        mine.copy_(new)


class StandInRecorder:
    """Takes the place of ``cuda_graphs.CudaRecorder``."""

    def __init__(self):
        self.graphs, self.recording = [], False

    def run(self, job):
        return job()

    def rehearse(self, job):
        with graph_capture.rehearsal(), StandInGraph(keep=False):
            return job()

    def record(self, job, generators):
        before = torch.get_rng_state()
        graph = StandInGraph()
        self.recording = True
        try:
            with graph:
                results = job()
        finally:
            self.recording = False
        torch.set_rng_state(before)
        self.graphs.append(graph)
        return graph, results


@contextmanager
def stand_in_graphs():
    """A context in which steps of the CPU are recorded and replayed by the recorder that it yields."""
    recorder = StandInRecorder()
    devices = ["cpu", "cuda"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "recorder_for", lambda device: recorder)
        capturing = lambda: recorder.recording or graph_capture.rehearsing()  # noqa: E731
        patch.setattr(graph_capture, "capturing", capturing)
        for name in ("adam", "rmsprop", "nadam"):  # that they may be captured on a CPU
            module = importlib.import_module(f"torch.optim.{name}")
            patch.setattr(module, "_get_capturable_supported_devices", lambda *_: devices)
        yield recorder
