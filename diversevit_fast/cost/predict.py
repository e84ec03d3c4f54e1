"""``cost``: what one training step asks of a machine, from shapes alone."""

import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .._torch_internals import fsdp_modules
from ..attachment.parallel import is_ddp
from ..errors import UnsupportedError, require, usage_error
from ..penalty.head_diversity import HeadDiversity
from .counting import KINDS, PHASES, Call
from .devices import Device, device_of
from .memory import Peak
from .parallel import (
    Layout,
    Parallel,
    Traffic,
    layout_of,
    memory_change,
    parallel_of,
    sending_seconds,
    traffic_of,
)
from .samples import sample_of
from .step import Counted, Optimizers, StepSpec, count_step, is_too_large

MOST_BATCH = 1 << 31
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONS = (
    *("wrt", "granularity", "reduction", "target", "every", "fraction"),
    *("check_finite", "checkpoint_blocks"),
)


class Seconds(NamedTuple):
    """Predicted seconds of a step.

    Attributes:
        device: of its kernels, one after the other; on a CPU of its operators.
        host: of Python and C++ that starts them on a GPU; 0 in a CUDA graph.
        communication: of what DDP, FSDP2 or HSDP sends, if nothing hid it.
        step: the largest of the three, which overlap at best.
    """

    device: float
    host: float
    communication: float
    step: float

    @property
    def limit(self) -> str:
        """Which of the three a step waits for: ``"device"``, ``"host"`` or ``"communication"``."""
        return max(("device", "host", "communication"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Cost:
    """The cost of one training step; with ``every`` above 1 the mean over so many steps, and the largest memory.

    Attributes:
        calls: kind of call -> how often a step of one process alone makes it (a mean, with ``every``).
        peak_alone: the largest memory at once of one process alone, in bytes, and its parts.
        parameters: their number.
        spec: what was counted.
        every: the penalty is that of every so many steps.
        device: the machine whose times are predicted; None: none are.
        parallel: DDP, FSDP2 or HSDP, and how many processes; memory and times are those of each.
        graph: whether a GPU replays the step as a CUDA graph.
    """

    calls: Mapping[Call, float]
    peak_alone: Peak
    parameters: int
    spec: StepSpec
    every: int
    counted: Counted
    device: Device | None = None
    parallel: Parallel | None = None
    graph: bool = False

    @property
    def flops(self) -> dict[str, float]:
        """Operations by kind: of products, and in ``"elementwise"`` all others."""
        found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for call, times in self._own_calls():
            found[call.kind] += times * call.flops
            found["elementwise"] += times * call.elementwise
        return found

    @property
    def launches(self) -> dict[str, float]:
        """Kernels, on a CPU operators, by phase of the step."""
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for call, times in self.calls.items():
            found[call.phase] += times * call.launches
        return found

    @property
    def bytes_moved(self) -> float:
        """Bytes that operators read and write, each operand and result once."""
        return sum(times * call.moved for call, times in self._own_calls())

    @property
    def peak(self) -> Peak:
        """The largest memory at once of a process, in bytes, and its parts."""
        alone = self.peak_alone
        if self.parallel is None:
            return alone
        parts = memory_change(self.parallel, alone.parts, self._layout)
        return Peak(alone.total + sum(parts.values()) - sum(alone.parts.values()), parts)

    @property
    def peak_bytes(self) -> int:
        return self.peak.total

    @property
    def sent_bytes(self) -> dict[str, float]:
        """Bytes that each process sends, in rings, by collective operation."""
        return self._traffic.sent

    @property
    def collectives(self) -> dict[str, float]:
        """How many collective operations each process takes part in, by name."""
        return self._traffic.calls

    @property
    def _layout(self) -> Layout:
        return layout_of(self.spec.model, self.spec.diversity)

    @property
    def _traffic(self) -> Traffic:
        return traffic_of(self.parallel, self._layout, self.every)

    @property
    def seconds(self) -> Seconds | None:
        """The predicted times of a step; None without a device."""
        device = self.device
        if device is None:
            return None
        computing = sum(times * device.seconds(call) for call, times in self._own_calls())
        host = 0.0
        if device.is_gpu and not self.graph:
            for call, times in self.calls.items():
                host += times * (device.host_operator if call.ours else device.host * call.launches)
        sending = 0.0
        if self.parallel is not None:
            sent = self.sent_bytes
            sending = sending_seconds(self.parallel, sent, device.link, device.network)
        return Seconds(computing, host, sending, max(computing, host, sending))

    @property
    def kind_seconds(self) -> dict[str, float] | None:
        """The device's seconds by kind of call, as ``flops`` has them; None without a device."""
        if self.device is None:
            return None
        found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for call, times in self._own_calls():
            found[call.kind] += times * self.device.seconds(call)
        return found

    @property
    def samples_per_second(self) -> float | None:
        """Samples of all processes together."""
        found, ranks = self.seconds, 1 if self.parallel is None else self.parallel.ranks
        return None if found is None else ranks * self.spec.batch / found.step

    def with_parallel(self, parallel: str | None) -> "Cost":
        """The same step on each of several processes; nothing is counted again.

        Args:
            parallel: as ``cost`` takes it, each process with the same batch; None: one process.

        Raises:
            UsageError: it says something else.
        """
        return replace(self, parallel=parallel_of(parallel))

    def _own_calls(self) -> Iterator[tuple[Call, float]]:
        """The calls of a process: with FSDP2 each updates its share of the parameters alone."""
        shards = 1 if self.parallel is None else self.parallel.shards
        for call, times in self.calls.items():
            if shards > 1 and call.phase == "optimizer":
                less = {"flops": -(-call.flops // shards), "moved": -(-call.moved // shards)}
                call = call._replace(**less)
            yield call, times

    def largest_batch(self, memory: int) -> int:
        """The largest batch, on each process, whose peak is at most ``memory`` bytes; 0 if none is.

        A few steps are counted; an allocator's gaps need room besides.
        """
        number = isinstance(memory, int | float) and not isinstance(memory, bool)
        if not number or not 0 < memory < float("inf"):
            raise usage_error("memory", "bytes, more than 0", reprlib.repr(memory), "80e9 is 80 GB")
        most = 1 << 24

        def fits(batch: int) -> int:
            found = _cost_of(self.spec._replace(batch=batch), self.every, self.parallel)
            return found.peak_bytes

        one, two = fits(1), fits(65)
        if one > memory:
            return 0
        guess = min(most, max(1, 1 + int((memory - one) * 64 / max(1, two - one))))
        for _ in range(4):  # the peak may move to another moment: look, and mend
            size = fits(guess)
            if size <= memory:
                more = guess + int((memory - size) * guess / max(1, size))
                if more == guess or more > most or fits(guess + 1) > memory:
                    return guess
                guess = more
            else:
                guess = max(1, min(guess - 1, int(guess * memory / size)))
        while guess > 1 and fits(guess) > memory:
            guess -= 1
        return guess


def cost(
    model: nn.Module | str,
    diversity: HeadDiversity | Mapping[str, Any] | str | Sequence[int] | None = None,
    *,
    batch: int,
    dtype: torch.dtype | str = torch.float32,
    optimizer: Optimizers | torch.optim.Optimizer | str = "adamw",
    checkpointing: bool = False,
    inputs: object = None,
    parallel: str | None = None,
    device: Device | str = "cpu",
    graph: bool = False,
) -> Cost:
    """Predict what one training step costs, from shapes alone: nothing is computed, and no memory is taken.

    The library's own step runs on tensors without memory: model, loss, penalty, backward and optimizer.

    >>> with torch.device("meta"):
    ...     model = timm.create_model("vit_giant_patch14_224")
    >>> dvf.cost(model, "last", batch=64, dtype=torch.bfloat16).peak_bytes

    Args:
        model: on any device, ``meta`` included; or a name of timm's.
        diversity: a ``HeadDiversity``, its arguments as a mapping, or its ``layers``; None: no penalty.
        batch: samples of a step.
        dtype: of autocast; float32 for none.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``, one of torch.optim as an example, or a function that makes it
            of a list of parameters.
        checkpointing: whether activations are recomputed, by the model's own switch.
        inputs: a batch as the model takes it, or the shape of a sample; None: images as the model says.
        parallel: ``"ddp:8"``, ``"fsdp2:8"`` or ``"hsdp:2x8"`` (2 replicas of 8 processes), each process with that
            batch; ``:keep`` after the last two is ``reshard_after_forward=False``. None: one process.
        device: ``"cpu"``; a GPU of the table (``"A100"``, ``"H100"``, ``"H200"``, ``"B200"``, ``"MI300X"``);
            ``"cuda"``, the one that was measured; or a ``Device``. Times of ``"cpu"`` and all of ``"cuda"`` need
            ``diversevit cost --calibrate``.
        graph: whether a GPU replays the step as a CUDA graph (``graph_step``).

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: the model cannot run on tensors without memory.
    """
    model = _model_of(model)
    options = options_of(diversity)
    every = options.pop("every", 1) if options is not None else 1
    machine = device_of(device)
    architecture = None if machine is None else machine.architecture
    spec = StepSpec(
        model,
        options,
        sample_of(model, inputs),
        check_batch(batch),
        _dtype_of(dtype),
        _optimizer_of(optimizer, architecture is not None),
        architecture,
        bool(checkpointing),
    )
    ranks = parallel_of(parallel)
    found = _cost_of(spec, _every_of(every), ranks)
    return replace(found, device=machine, graph=bool(graph))


def _cost_of(spec: StepSpec, every: int, parallel: Parallel | None = None) -> Cost:
    counted = _count(spec)
    calls: dict[Call, float] = {call: float(n) for call, n in counted.calls.items()}
    peak = counted.peak
    if every > 1:
        plain = _count(spec._replace(diversity=None))
        mean: Counter[Call] = Counter()
        for share, step in ((1 / every, counted), (1 - 1 / every, plain)):
            for call, times in step.calls.items():
                mean[call] += share * times  # pyright: ignore[reportArgumentType]
        calls = dict(mean)
        peak = max(counted.peak, plain.peak, key=lambda one: one.total)
    parameters = sum(p.numel() for p in spec.model.parameters())
    return Cost(calls, peak, parameters, spec, every, counted, parallel=parallel)


def _count(spec: StepSpec) -> Counted:
    try:
        return count_step(spec)
    except RuntimeError as failure:
        if is_too_large(failure):
            got = f"{spec.batch} of {list(spec.sample.shape)}"
            raise usage_error(
                "batch", "samples whose tensors any machine can address", got, "make it smaller"
            ) from None
        raise


def options_of(diversity: object) -> dict[str, Any] | None:
    """The arguments of ``HeadDiversity`` that ``diversity`` stands for; None for no penalty.

    Raises:
        UsageError: it stands for none.
    """
    if diversity is None:
        return None
    if isinstance(diversity, HeadDiversity):
        layers = [layer.index for layer in diversity.layers]
        return {"layers": layers, **{name: getattr(diversity, name) for name in _OPTIONS}}
    if isinstance(diversity, Mapping):
        return dict(diversity)
    if isinstance(diversity, str | Sequence):
        return {"layers": diversity}
    wanted = "a HeadDiversity, its arguments, its layers, or None"
    raise usage_error("diversity", wanted, reprlib.repr(diversity), "say 'last'")


def _model_of(model: object) -> nn.Module:
    if isinstance(model, str):
        timm = require("timm", extra="train")
        if not timm.is_model(model.partition(".")[0]):
            hint = "timm.list_models('vit*') lists them"
            raise usage_error("model", "a name of timm's", reprlib.repr(model), hint)
        try:
            with torch.device("meta"):
                return timm.create_model(model)
        except RuntimeError as failure:  # a tag that there is not
            got = f"{reprlib.repr(model)} ({failure})"
            raise usage_error("model", "a name of timm's", got, "leave the tag out") from None
    if not isinstance(model, nn.Module):
        wanted, got = "a module, or a name of timm's", type(model).__name__
        raise usage_error("model", wanted, got, "pass the model itself")
    if is_ddp(model):
        raise UnsupportedError("model: is inside DDP; pass its .module, and say parallel='ddp:8'")
    if fsdp_modules(model):
        raise UnsupportedError(
            "model: is sharded by fully_shard; pass it as it was before, and say parallel='fsdp2:8'"
        )
    return model


def check_batch(batch: object) -> int:
    """Return ``batch`` if it is a number of samples; raise ``UsageError`` if not."""
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MOST_BATCH:
        wanted = f"a whole number from 1 to {MOST_BATCH}"
        raise usage_error("batch", wanted, reprlib.repr(batch), "try 64")
    return batch


def _every_of(every: object) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise usage_error(
            "every", "a whole number of at least 1", reprlib.repr(every), "1 is each step"
        )
    return every


def _dtype_of(dtype: object) -> torch.dtype:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        wanted = "float32, bfloat16 or float16"
        raise usage_error("dtype", wanted, reprlib.repr(dtype), "float32 is no autocast")
    return found


def _optimizer_of(optimizer: object, on_gpu: bool) -> Optimizers:
    """A function that makes the optimizer: fused on a GPU, on a CPU as PyTorch makes it."""
    fused: Any = {"fused": True} if on_gpu else {}
    made: dict[str, Optimizers] = {
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-4, **fused),
        "adam": lambda ps: torch.optim.Adam(ps, lr=1e-4, **fused),
        "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, **fused),
    }
    if isinstance(optimizer, str) and optimizer in made:
        return made[optimizer]
    if isinstance(optimizer, torch.optim.Optimizer):
        kind: Any = type(optimizer)
        return lambda ps: kind(ps, **optimizer.defaults)
    if callable(optimizer):
        return optimizer  # pyright: ignore[reportReturnType]
    wanted = "adamw, adam, sgd, an optimizer or a function that makes one"
    raise usage_error("optimizer", wanted, reprlib.repr(optimizer), "say 'adamw'")
