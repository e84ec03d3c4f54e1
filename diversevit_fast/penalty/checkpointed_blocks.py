"""Checkpoints around a model's blocks that spare the graph of the pass to the heads' gradients too.

Blocks that a non-reentrant checkpoint runs inside ``HeadDiversity`` are run apart: neither the forward nor that pass
keeps more of a block than what it was given (``again``). The first run makes a graph and drops it: it tells which
weights there are, and whether all that the block reads is known. Where it is not, and wherever somebody else could look
into the block, its forward is run as it is inside PyTorch's checkpoint, which is right and keeps more.
"""

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .._torch_internals import (
    LEAF,
    BatchNorm,
    below_saved_tensors_hooks,
    fsdp_modules,
    functorch_active,
    has_global_hooks,
    has_hooks_inside,
    in_checkpoint,
    in_forward_mode,
    is_looked_at,
    place_in_graph,
    write_count,
)
from ..attachment.class_swap import Wrapper, run_swapped
from ..attachment.graph_checks import is_opaque
from ..attachment.recomputation import recompute_inside
from ..attachment.torch_calls import Forward
from ..errors import UnsupportedError
from . import graph_capture
from .again import Derivative, Found, Tensors, leaves, node
from .ambient import Autocast, Modes, RandomState
from .before_run import BeforeRun
from .captured import Captured, Recording
from .head_gradients import HeadGradients
from .nested import split
from .recomputed_gelu import RecomputedGelu

Penalty = Callable[[HeadGradients, Captured], tuple[Tensor, Tensor]]
"""Computes the penalty and the cosines of a run from its gradients."""
OnPenalty = Callable[[Captured, Tensor, Tensor], None]
"""Is called with a run, its penalty and its cosines."""
Inside = Callable[[], AbstractContextManager[Recording]]
"""Enters a copy of the context, as it was when a block was called, and gives what that records."""


class InnerPass:
    """What the pass to the heads' gradients asks blocks for, while it runs."""

    def __init__(self) -> None:
        self.penalty: Penalty | None = None
        self.found: OnPenalty = lambda run, value, cosines: None

    @contextmanager
    def running(self, penalty: Penalty, found: OnPenalty) -> Iterator[None]:
        """A context in which blocks on the way of a backward pass compute the penalties of their layers."""
        before = self.penalty, self.found
        self.penalty, self.found = penalty, found
        try:
            yield
        finally:
            self.penalty, self.found = before


class _Block:
    """The call of a block, which can be run again; its inputs are a probe, the tensors it is given, its weights."""

    def __init__(self, module: nn.Module, arguments: Any, inside: Inside, inner: InnerPass):
        self.given, self.arguments = split(arguments)
        self.module, self.inner, self._inside = module, inner, inside
        device = next((x.device.type for x in self.given), "cpu")
        self.autocast, self.random = Autocast(device), RandomState(self.given, device)
        self.modes = Modes(module)
        self.weights = 0
        self._known: dict[int, int] = {}  # weight -> how often it was written to
        self.runs: list[Captured] = []

    def gave(self, arguments: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether ``arguments`` are still those around ``tensors``: nothing was put into a list, or taken out."""
        found, others = split(arguments)
        same = len(found) == len(tensors) and all(map(operator.is_, found, tensors))
        return same and self.arguments.is_same(others)

    def know(self, weights: Sequence[Tensor], runs: list[Captured]) -> None:
        """Note what the first run found, and forget the tensors, which the graph's node keeps."""
        self.weights, self._known = len(weights), {id(x): write_count(x) for x in weights}
        self.runs, self.given = runs, ()

    def __call__(self, tensors: Tensors) -> list[Tensor]:
        return self.run(tensors)[0]

    def run(self, tensors: Tensors) -> tuple[list[Tensor], list[Captured], list[Any]]:
        """The outputs with their graph, the runs of layers, and the nodes of linear layers after GELUs.

        Raises:
            UnsupportedError: the block has other weights than in its first run, or hooks on one.
        """
        given = tensors[1 : len(tensors) - self.weights]
        args, kwargs = self.arguments.around(given)
        with self.random(), self.autocast(), self.modes(), self._inside() as recording:
            output = run_swapped(self.module, args, kwargs)
            runs, linears = recording.take_runs()
        outputs = list(split(output)[0])
        weights, name = _read(outputs, given, runs)[0], type(self.module).__name__
        if {id(x): write_count(x) for x in weights} != self._known:
            raise UnsupportedError(
                f"checkpoint: {name} is differentiated with other weights than those it ran with; "
                "replace, change, freeze or thaw weights after the backward pass"
            )
        if any(is_looked_at(x) for x in weights):
            raise UnsupportedError(
                f"checkpoint: a weight of {name} got a hook after the forward, which would be called in each "
                "run; register hooks before it"
            )
        return outputs, runs, linears

    def derivative(self, given: Sequence[int], asked: Sequence[int]) -> Derivative:
        ambient, penalty = Autocast(self.autocast.device), self.inner.penalty
        if penalty is None:
            return Derivative(self, given, asked, ambient)
        return _WithPenalties(self, given, asked, ambient, penalty)


class _WithPenalties(Derivative):
    """The gradient of a block, and after it the penalties of the layers in it."""

    def __init__(self, of: _Block, given: Any, asked: Any, ambient: Any, penalty: Penalty):
        super().__init__(of, given, asked, ambient)
        self._block, self._penalty = of, penalty
        self._cosines: list[Tensor | None] = []

    def differentiate(self, inputs: Tensors, grads: Tensors, twice: bool) -> Found:
        outputs, runs, linears = self._block.run(inputs)
        by = [inputs[i] for i in self.asked]
        captured = [x for run in runs for x in run.tensors]
        with self.ambient():
            found = self.gradients(outputs, [*captured, *by], grads, twice)
            last = max((x for x in outputs if x.grad_fn is not None), key=_place, default=None)
            if twice and last is not None:
                gelu = RecomputedGelu(last, linears)
                for x, grad in zip([*captured, *by], found, strict=True):
                    if grad is not None:
                        gelu.free(x, grad)
            of_runs = iter(found)
            with torch.set_grad_enabled(twice):  # its weights have a gradient
                made = [self._made([next(of_runs) for _ in run.tensors], run) for run in runs]
        self._cosines = [cosines for _, cosines in made]
        return [*found[len(captured) :], *(value for value, _ in made)]

    def _made(self, grads: HeadGradients, run: Captured) -> tuple[Tensor | None, Tensor | None]:
        """The penalty and the cosines of a run; None where what the gradient is taken of does not depend on it."""
        if all(g is None for g in grads):
            return None, None
        value, cosines = self._penalty(grads, run)
        return value, cosines.detach()

    def finish(self, made: Sequence[Tensor | None]) -> None:
        values: Any = made[len(self.asked) :]
        for run, value, cosines in zip(self._block.runs, values, self._cosines, strict=True):
            if cosines is not None:
                self._block.inner.found(run, value, cosines)
        self._cosines = []


class CheckpointedBlocks:
    """Runs blocks apart where a checkpoint runs them.

    Attributes:
        inner: tells blocks what to compute.
        running: a block runs apart, or again.
        left_out: blocks that cannot be run apart, as a run showed.
    """

    def __init__(self) -> None:
        self.inner = InnerPass()
        self.running = False
        self.left_out: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def wrapper_of(
        self,
        module: nn.Module,
        alone: Callable[[], bool],
        recording: Callable[[], Recording],
        copy: Callable[[], Inside],
    ) -> Wrapper:
        """Make the wrapper of a block.

        Args:
            alone: whether the context captures, and is the only one that sees what runs.
            recording: what it records.
            copy: makes what enters a copy of it.
        """
        mixes = any(isinstance(m, BatchNorm) for m in module.modules())  # runs change it

        def run(_: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            apart = not (torch.compiler.is_compiling() or self.running or mixes)
            apart = apart and in_checkpoint(again=True)
            if not apart or not alone() or module in self.left_out or _looked_into(module):
                return forward(*args, **kwargs)
            recompute_inside()
            block = _Block(module, (args, kwargs), copy(), self.inner)
            half = block.autocast.uses(torch.float16)  # may have to be tried with several factors
            half = half or any(x.dtype == torch.float16 for x in block.given)
            if half or not block.arguments.is_plain:
                return forward(*args, **kwargs)
            if (result := self._apart(block, forward, recording())) is not None:
                return result[0]
            self.left_out.add(module)
            block.random.restore()
            return forward(*args, **kwargs)

        return run

    def _apart(self, block: _Block, forward: Forward, recording: Recording) -> tuple[Any] | None:
        """What the block returns, run apart; None if it cannot be."""
        probe = torch.empty(0, requires_grad=True)
        begun, start = len(recording.runs), place_in_graph(probe.view(0).grad_fn)
        dropped: weakref.WeakSet[_Dropped] = weakref.WeakSet()
        before, inputs = BeforeRun(block.module, block.given), leaves(block.given, 0)
        args, kwargs = block.arguments.around(inputs)
        own = [weakref.ref(x) for x in inputs if x.requires_grad]
        self.running = True
        try:
            with saved_tensors_hooks(lambda x: _dropped(dropped), _refuse), block.autocast():
                outputs, results = split(forward(*args, **kwargs))
        finally:
            self.running = False
        before.refuse_changed_inputs(type(block.module).__name__)
        stateful = before.put_buffers_back() or not block.gave((args, kwargs), inputs)
        runs = recording.runs[begun:]
        unfit = stateful or any(x.dtype == torch.float16 for run in runs for x in run.tensors)
        del recording.runs[begun:], args, kwargs
        weights, known = _read(outputs, inputs, runs, start)
        made = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
        runs = [run.without_tensors(probe) for run in runs]
        del outputs, inputs
        kept = bool(dropped) or any(x() is not None for x in own)  # something leads to the graph
        if kept or unfit or not known or any(is_looked_at(x) for x in weights):
            return None
        recording.runs += runs
        tensors = probe, *block.given, *weights
        block.know(weights, runs)
        with below_saved_tensors_hooks():
            return (results.around(node(block, made, tensors)),)


def _looked_into(module: nn.Module) -> bool:
    """Whether what happens inside a block is seen by others, or is not to be done twice."""
    return (
        has_global_hooks()
        or has_hooks_inside(module)
        or bool(fsdp_modules(module))
        or functorch_active()
        or in_forward_mode()
        or graph_capture.capturing()
    )


def _place(made: Tensor) -> int:
    return place_in_graph(made.grad_fn)


class _Dropped:
    """Stands in a dropped graph for a tensor that it would have saved."""


def _dropped(all_of_them: "weakref.WeakSet[_Dropped]") -> _Dropped:
    made = _Dropped()
    all_of_them.add(made)
    return made


def _refuse(_: _Dropped) -> Tensor:
    raise UnsupportedError(
        "checkpoint: a gradient is taken inside a block that a checkpoint runs; take it outside of the block"
    )


def _read(
    outputs: Sequence[Tensor], given: Sequence[Tensor], runs: Sequence[Captured], start: int = -1
) -> tuple[list[Tensor], bool]:
    """The leaves that a block read besides what it was given, and whether it read nothing but leaves.

    Args:
        runs: of layers, whose captured tensors may be leaves that the context made.
        start: how many nodes were recorded before the block's.
    """
    own = {id(x) for x in given} | {id(x) for run in runs for x in run.tensors}
    # a weight may be given back as it is
    returned = (x for x in outputs if x.requires_grad and x.grad_fn is None)
    found = {id(x): x for x in returned if id(x) not in own}
    queue: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen, known = {None, *queue}, True
    for made_by in queue:
        place = place_in_graph(made_by)
        if place == LEAF:
            if id(made_by.variable) not in own:
                found[id(made_by.variable)] = made_by.variable
        elif place < start or is_opaque(made_by):
            known = False
        for child, _ in made_by.next_functions:
            if child not in seen:
                seen.add(child)
                queue.append(child)
    return list(found.values()), known
