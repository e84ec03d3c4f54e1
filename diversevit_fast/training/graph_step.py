"""graph_step: a whole training step in one call, on a GPU replayed as one CUDA graph."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .._torch_internals import fsdp_modules, tree_flatten, tree_unflatten
from ..attachment.parallel import is_ddp
from ..errors import UnsupportedError, usage_error
from ..penalty.graph_capture import ReplayedPenalty
from ..penalty.head_diversity import HeadDiversity
from . import cuda_graphs
from .arguments import (
    checked_amp,
    checked_clip,
    checked_count,
    checked_diversity,
    checked_scaler,
    checked_weight,
)
from .cuda_graphs import Recorder, Recording
from .optimizers import DeviceOptions, check_for_graphs, check_optimizer, refuse_host_state
from .reads import KeptTensors, NamesRead, TensorsRead
from .refusals import refusal_of_wait
from .snapshot import Snapshot
from .update import Batch, Loss, Update
from .watch import Watch


def graph_step(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    diversity: HeadDiversity | None = None,
    amp: torch.dtype | None = None,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    weight: Callable[[], float | Tensor] | None = None,
    generators: Iterable[torch.Generator] = (),
    max_graphs: int = 8,
) -> "GraphStep":
    """Make a training step that a GPU replays as one CUDA graph, in tens of microseconds of Python.

    >>> def loss(images, labels):
    ...     with diversity:
    ...         logits = model(images)
    ...     return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits), logits
    >>> step = dvf.graph_step(loss, optimizer, diversity=diversity, amp=torch.bfloat16, clip=1.0)
    >>> for images, labels in loader:
    ...     value, logits = step(images, labels)

    ``step(*batch)`` clears the gradients, calls ``loss(*batch)`` under autocast, runs backward, clips, and takes the
    optimizer's step. With parameters on a CPU that is all it does. Arguments may have names.

    On a GPU the first batch of each signature is captured, and later ones are copied into the captured batch's memory
    (from the CPU too) and replayed. A signature is the shapes and dtypes of the batch, whether this step has the
    penalty (``every``), which modules are in training mode, which parameters are trained, the optimizer's options,
    and the numbers that the loss itself mentions by name. The learning rate may change at no cost with Adam, AdamW and
    any optimizer made with ``fused=True``; where it is part of the signature, each new rate is a new capture. A
    capture is preceded by three steps of warm-up, of which parameters, buffers, optimizer, generators, penalty and
    scaler keep no trace.

    ``loss`` is Python, and replays do not run it. What changes from step to step must be a tensor on the GPU, written
    in place: a penalty's weight for instance, ``weight = torch.tensor(0.0, device="cuda")`` in the loss and
    ``weight.fill_(100.0)`` before a step; or an argument of the step; or ``weight=``, below. A number in the closure of
    ``loss``, in its globals, or an attribute of an object there is captured anew where it changes; one that a function
    called by ``loss`` looks up is not noticed. A loss that reads a tensor on the host (``.item()``) is refused.

    Args:
        loss: returns a scalar tensor, or a tuple of it and anything made of tensors.
        optimizer: of torch.optim, or another whose state is tensors on the device. Its options may change at any time.
        diversity: the ``HeadDiversity`` that ``loss`` enters; ``every`` and draws by a CPU generator need it.
        amp: the dtype of autocast; None leaves autocast as it is around the call.
        clip: the largest norm of all gradients together.
        scaler: a ``GradScaler``, for float16. On a GPU the optimizer must be made with ``fused=True``.
        accumulate: cut each batch into so many equal parts and add up their gradients; the loss is the mean of theirs.
        weight: a function of no arguments, called before each step. ``loss`` gets its number as ``weight=``, a tensor:
            for a penalty's weight that follows a schedule.
        generators: generators of the GPU that ``loss`` draws from, besides PyTorch's own and ``diversity``'s.
        max_graphs: how many captures are kept; the one not used for longest goes.

    Returns:
        ``step``. It returns what ``loss`` returned, detached, in memory that later steps leave alone; of several
        parts the mean loss, and lists of the rest. Gradients are gone after it. ``diversity.cosines`` and
        ``samples`` are overwritten by later replays: clone what you keep.

    Raises:
        UsageError: a wrong argument; from a step, a loss that returns something else.
        UnsupportedError: an optimizer that cannot take such a step; from a step on a GPU, a loss that waits for
            the GPU or draws on the CPU, DDP or FSDP.
    """
    return GraphStep(
        loss,
        optimizer,
        ReplayedPenalty(checked_diversity(diversity)),
        amp=checked_amp(amp),
        clip=checked_clip(clip),
        scaler=checked_scaler(scaler),
        accumulate=checked_count("accumulate", accumulate),
        weight=checked_weight(weight),
        generators=tuple(generators),
        max_graphs=checked_count("max_graphs", max_graphs),
    )


@dataclass
class _Graph:
    """A captured step, the memory it reads and writes, and what it does to the penalty.

    Attributes:
        read: tensors of others that it reads.
    """

    recording: Recording
    batch: list[Tensor]
    results: Any
    due: bool
    draws: list[Tensor]
    steps: int
    outcome: Any
    read: KeptTensors


class GraphStep:
    """What ``graph_step`` returns: call it with a batch to take a step."""

    def __init__(
        self,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        penalty: ReplayedPenalty,
        *,
        amp: torch.dtype | None,
        clip: float | None,
        scaler: Any,
        accumulate: int,
        weight: Callable[[], float | Tensor] | None,
        generators: tuple[torch.Generator, ...],
        max_graphs: int,
    ):
        if not callable(loss):
            hint = "loss(*batch) returns a scalar"
            raise usage_error("loss", "a function", type(loss).__name__, hint)
        check_optimizer(optimizer)
        self._optimizer, self._penalty, self._scaler = optimizer, penalty, scaler
        self._make_update = lambda device, options: Update(
            loss, optimizer, device, amp, clip, scaler, accumulate, options
        )
        self._generators = tuple(dict.fromkeys((*generators, *penalty.generators())))
        self._weight_of = weight
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._max_graphs = max_graphs
        self._renewed, self._warned = 0, False
        self._names = NamesRead(loss)
        self._settle()

    def _settle(self) -> None:
        """Begin anew on the device where the parameters are."""
        self._device = _first_parameter(self._optimizer).device
        self._recorder: Recorder | None = cuda_graphs.recorder_for(self._device)
        if self._recorder is not None:
            check_for_graphs(self._optimizer, self._scaler)
        self._options = DeviceOptions(
            self._optimizer, None if self._recorder is None else self._device
        )
        self._update = self._make_update(self._device, self._options)
        self._graphs.clear()
        self._watch: Watch | None = None

    def __call__(self, *batch: Any, **named: Any) -> Any:
        """Take a step on a batch, and return what the loss returned, detached."""
        if _first_parameter(self._optimizer).device != self._device:
            self._settle()
        if self._weight_of is not None:
            named["weight"] = self._weight_now()
        if self._recorder is None:
            return self._update((batch, named))
        if self._watch is None or not self._watch.is_same():
            self._start_over()
        leaves, layout = tree_flatten((batch, named))
        key = self._signature(leaves, layout)
        graph = self._graphs.get(key)
        if graph is not None and not graph.read.are_same():
            del self._graphs[key]
            self._renewed += 1
            graph = None
        if graph is None:
            return self._first(key, leaves, layout)
        self._graphs.move_to_end(key)
        self._options.refresh()
        return self._replay(graph, leaves)

    @property
    def graphs(self) -> int:
        """How many captured steps are kept; on a CPU none."""
        return len(self._graphs)

    def _weight_now(self) -> Tensor:
        assert self._weight_of is not None
        value = self._weight_of()
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=torch.float32, device=self._device)

    def _start_over(self) -> None:
        """Forget all graphs: they hold addresses of what is no longer there."""
        known = [] if self._watch is None else self._watch.modules
        self._graphs.clear()
        self._options.prepare()
        self._watch = Watch(self._optimizer, known)

    def _signature(self, leaves: list[Any], layout: Any) -> Any:
        assert self._watch is not None
        kind = self._device.type
        described = tuple(
            (x.shape, x.dtype) if isinstance(x, Tensor) else _constant(x) for x in leaves
        )
        return (
            described,
            layout,
            self._penalty.kind(),
            self._watch.modes(),
            self._names.values(),
            self._options.frozen(),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
        )

    def _replay(self, graph: _Graph, leaves: list[Any]) -> Any:
        assert self._watch is not None
        if self._watch.has_gradients():
            self._update.forget_gradients()
        _copy_into(graph.batch, leaves)
        self._penalty.before_replay(graph.draws)
        graph.recording.replay()
        self._penalty.replayed(graph.due, graph.steps, graph.outcome)
        return _copied(graph.results)

    def _first(self, key: Any, leaves: list[Any], layout: Any) -> Any:
        """Capture the step of a new signature, and take it."""
        memory = self._memory_for(key, leaves)
        _copy_into(memory, leaves)
        places = iter(memory)
        batch = tree_unflatten(
            [next(places) if isinstance(x, Tensor) else x for x in leaves], layout
        )
        graph, modules = self._capture(batch, memory)
        assert self._watch is not None
        new_ones = modules.difference(self._watch.modules)
        if new_ones:  # the other graphs do not know of them
            self._graphs.clear()
            self._watch = Watch(self._optimizer, [*self._watch.modules, *new_ones])
        if graph is not None:
            self._keep(graph, leaves, layout)
            return self._replay(graph, leaves)
        before = self._snapshot()
        try:
            assert self._recorder is not None
            _copy_into(memory, leaves)  # the loss may have written there
            result = _copied(self._recorder.run(lambda: self._update(batch)))
            self._watch.note_state()
            graph, _ = self._capture(batch, memory)
        except BaseException:
            before.undo()
            self._watch.note_state()
            raise
        if graph is not None:
            self._keep(graph, leaves, layout)
        return result

    def _snapshot(self) -> Snapshot:
        assert self._watch is not None
        known = (self._device, self._watch.modules, self._generators)
        return Snapshot(self._optimizer, self._penalty, self._scaler, *known)

    def _keep(self, graph: _Graph, leaves: list[Any], layout: Any) -> None:
        self._graphs[self._signature(leaves, layout)] = graph  # which names what is known by now
        self._drop_oldest()

    def _memory_for(self, key: Any, leaves: list[Any]) -> list[Tensor]:
        """Memory for a batch: that of a graph for batches like it, or new."""
        for other, graph in self._graphs.items():
            if other[:2] == key[:2]:
                return graph.batch
        tensors = (x for x in leaves if isinstance(x, Tensor))
        return [torch.empty_like(x, device=self._device, requires_grad=False) for x in tensors]

    def _capture(self, batch: Batch, memory: list[Tensor]) -> tuple[_Graph | None, set[nn.Module]]:
        """Warm up and capture a step without a trace.

        Returns:
            The graph, and all modules that ran. There is no graph where the optimizer has made state: that is its
            own to make, in a step like any other. A graph is captured after it, when there is no such step any
            more whose memory would be needed beside the graph's.
        """
        recorder, penalty, due = self._recorder, self._penalty, self._penalty.is_due()
        read = TensorsRead()
        assert recorder is not None
        snapshot = self._snapshot()
        try:
            steps = self._warm_up(recorder, batch, snapshot, read)
            skips = self._scaler is not None
            with penalty.captured(self._device, skips=skips):
                recorder.rehearse(lambda: self._update(batch))
            if snapshot.has_new_state():
                snapshot.restore()
                return None, snapshot.modules
            penalty.rewind(snapshot.penalty_state)
            snapshot.restore_draws()
            with penalty.captured(self._device, skips=skips) as draws:
                registered = [g for g in self._generators if g.device.type != "cpu"]
                recording, results = recorder.record(lambda: self._update(batch), registered)
            if snapshot.has_drawn_on_host():
                raise UnsupportedError(
                    "loss: draws random numbers on the CPU, which would be the same in all replays; draw on the "
                    "GPU, or outside and pass them to the step as a tensor"
                )
            outcome = penalty.outcome()
        except BaseException as error:
            snapshot.undo()
            refusal = refusal_of_wait(error, self._optimizer)
            if refusal is not None:
                raise refusal from error
            raise
        kept = KeptTensors(snapshot.others(read.alive()), self._device)
        graph = _Graph(recording, memory, results, due, draws, steps, outcome, kept)
        snapshot.restore()
        return graph, snapshot.modules

    def _warm_up(
        self, recorder: Recorder, batch: Batch, snapshot: Snapshot, read: TensorsRead
    ) -> int:
        """Run the step uncaptured, twice: watched, to know what it uses, and as it is, so that all is compiled.

        Returns:
            The steps that the penalty counted in one.
        """
        names = self._names.values()
        with _modules_noted(snapshot), read:
            recorder.run(lambda: self._update(batch))
        steps = self._penalty.rewind(snapshot.penalty_state)
        self._penalty.check_count(steps)
        refuse_host_state(self._optimizer)
        snapshot.note_warm()
        recorder.run(lambda: self._update(batch))
        self._penalty.rewind(snapshot.penalty_state)
        snapshot.refuse_replaced()
        self._names.keep_unchanged(names)
        return steps

    def _drop_oldest(self) -> None:
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)
            self._renewed = self._max_graphs + 1
        if self._renewed > self._max_graphs and not self._warned:
            self._warned = True
            warnings.warn(
                f"graph_step: more than {self._max_graphs} kinds of steps, each captured anew when it comes up again; "
                "use batches of one size, an optimizer made with fused=True if its learning rate changes, a tensor "
                "on the GPU for a number that does, or max_graphs=",
                stacklevel=4,
            )


@contextmanager
def _modules_noted(snapshot: Snapshot) -> Iterator[None]:
    """A context in which every module that is called is first kept in the snapshot."""

    def note(module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # inside a compiled module, which is noted as a whole
            return
        if is_ddp(module) or fsdp_modules(module):
            raise UnsupportedError(
                "model: a CUDA graph of a step under DDP or FSDP is not supported; write the step by hand"
            )
        snapshot.add(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _copy_into(memory: list[Tensor], leaves: list[Any]) -> None:
    given = (x for x in leaves if isinstance(x, Tensor))
    for mine, x in zip(memory, given, strict=True):
        mine.copy_(x, non_blocking=True)


def _copied(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.clone()
    leaves, layout = tree_flatten(results)
    return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], layout)


def _constant(x: Any) -> Any:
    """What is no tensor in a batch belongs to the signature by its value.

    Raises:
        UsageError: it cannot be compared.
    """
    try:
        hash(x)
    except TypeError:
        hint = "make it a tensor"
        raise usage_error("batch", "tensors and constants", type(x).__name__, hint) from None
    return type(x), x


def _first_parameter(optimizer: torch.optim.Optimizer) -> Tensor:
    return next(p for group in optimizer.param_groups for p in group["params"])
