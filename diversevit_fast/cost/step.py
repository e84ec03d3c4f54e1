"""One training step on tensors without memory: the library's own, counted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import set_multithreading_enabled
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from .._torch_internals import tree_leaves
from ..errors import UnsupportedError, UsageError, usage_error
from ..penalty.head_diversity import HeadDiversity
from .counting import Call, StepCounter
from .fake import Disguise, needs_values, without_memory
from .memory import Peak
from .sdpa import FakeGpuCalls
from .torch_internals import FakeTensorMode, around_backward, fake_gpu_tensors, is_fake_failure

WEIGHT = 100.0
"""Of the penalty in the loss; costs do not depend on it."""
Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class StepSpec(NamedTuple):
    """A step to be counted.

    Attributes:
        model: on any device, ``meta`` included; no numbers are read.
        diversity: the arguments of ``HeadDiversity``, or None for a step without penalty.
        sample: shape and dtype of one sample, the model's input.
        batch: samples.
        dtype: of autocast; float32 for none.
        optimizer: makes the optimizer of parameters.
        architecture: of the GPU as Triton names it; None for a CPU.
        checkpointing: whether activations are recomputed, by the model's own switch.
    """

    model: nn.Module
    diversity: Mapping[str, Any] | None
    sample: Tensor
    batch: int
    dtype: torch.dtype
    optimizer: Optimizers
    architecture: str | None = None
    checkpointing: bool = False


class Counted(NamedTuple):
    """What was counted of a step."""

    calls: Mapping[Call, int]
    peak: Peak
    parameter_bytes: int
    trained_bytes: int  # of the parameters with a gradient
    state_bytes: int  # of the optimizer
    buffer_bytes: int


def count_step(spec: StepSpec) -> Counted:
    """Run a step on tensors without memory, and count it.

    Raises:
        UnsupportedError: the model cannot run without numbers, or the penalty does not take it.
        UsageError: from ``HeadDiversity``.
    """
    device = "cpu" if spec.architecture is None else "cuda"
    disguise = Disguise(device)
    counter = StepCounter(spec.architecture, disguise)
    with _fake(disguise), set_multithreading_enabled(False), counter, _one_line():
        return _run(spec, counter, torch.device(device))


def _run(spec: StepSpec, counter: StepCounter, device: torch.device) -> Counted:
    model = without_memory(spec.model, device).train()
    if spec.checkpointing:
        switch_checkpointing(model)
    parameters = list(model.parameters())
    buffers = list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    optimizer = _made(spec, trained)
    state = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
    sample = spec.sample
    batch = torch.empty((spec.batch, *sample.shape), dtype=sample.dtype, device=device)
    labels = torch.empty((spec.batch,), dtype=torch.int64, device=device)
    diversity = None
    if spec.diversity is not None:
        diversity = HeadDiversity(model, **spec.diversity)
    memory = counter.memory
    memory.add([*parameters, *buffers], "parameters")
    memory.add(state, "optimizer state")
    memory.add([batch, labels], "batch")
    edges = [get_gradient_edge(p) for p in trained]  # made before autocast looks on, see Disguise
    take_step(model, diversity, (batch, labels), spec.dtype, optimizer, counter)
    del edges
    return Counted(
        dict(counter.calls),
        memory.peak(),
        _bytes(parameters),
        _bytes(trained),
        _bytes(state),
        _bytes(buffers),
    )


def take_step(
    model: nn.Module,
    diversity: HeadDiversity | None,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    counter: StepCounter,
) -> None:
    """Take a training step: logits, loss, penalty, backward, update; gradients are gone after it.

    This is the step that is counted, and on real tensors the one that is measured.
    """
    images, labels = batch
    narrow = None if dtype == torch.float32 else dtype
    device = images.device.type
    with torch.autocast(device, narrow, enabled=narrow is not None):
        counter.phase = "forward"
        with diversity or nullcontext():
            logits = _logits(model, images)
        loss = F.cross_entropy(logits, labels)
        if diversity is not None:
            counter.phase = "penalty"
            loss = loss + WEIGHT * diversity.penalty(logits)
        counter.phase = "forward"
    counter.phase = "backward"
    del logits
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    counter.memory.relabel(grads, "gradients")
    del grads
    counter.phase = "optimizer"
    optimizer.step()
    optimizer.zero_grad()
    counter.phase = None


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        output = model(images)
    except (AssertionError, ValueError, TypeError, RuntimeError) as failure:
        ours = isinstance(failure, UsageError | UnsupportedError)
        if ours or is_fake_failure(failure) or is_too_large(failure):
            raise
        wanted, shape = "a model that takes its batch", list(images.shape)
        hint = "say another batch or inputs"
        raise usage_error("model", wanted, f"of {shape} {_said(failure)}", hint) from failure
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"model: expected logits [B, classes] as its output, got {got}; wrap it in a module that returns them"
        )
    return logits


def is_too_large(failure: Exception) -> bool:
    """Whether PyTorch refused a tensor since no machine could address it."""
    return isinstance(failure, RuntimeError) and any(
        word in str(failure) for word in ("overflow", "exceeds")
    )


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__} ({' '.join(str(failure).split())[:200]})"


def _made(spec: StepSpec, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer, with what it keeps.

    Raises:
        UsageError: there is nothing to train, or it is none for these parameters.
    """
    if not trained:
        raise usage_error("model", "parameters with a gradient", "none", "thaw some of them")
    try:
        optimizer = spec.optimizer(trained)
        _make_state(optimizer, trained)
    except (AttributeError, ValueError, TypeError, RuntimeError) as failure:
        wanted, hint = "one that steps all trained parameters", "say 'adamw'"
        raise usage_error("optimizer", wanted, _said(failure), hint) from failure
    return optimizer


def switch_checkpointing(model: Any) -> None:
    """Switch on checkpoints by a model's own switch, timm's or that of transformers.

    Raises:
        UnsupportedError: it has none.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        raise UnsupportedError(
            f"checkpointing: {type(model).__name__} has no switch for it (set_grad_checkpointing of timm, "
            "gradient_checkpointing_enable of transformers); wrap its blocks in checkpoints and count that"
        )


def _make_state(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """Let the optimizer allocate what it keeps, as its first step does."""
    for p in trained:
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {id(s): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())


@contextmanager
def _fake(disguise: Disguise) -> Iterator[None]:
    mode: Any = FakeTensorMode(allow_non_fake_inputs=False)
    if disguise.device.type == "cpu":
        with mode:
            yield
        return
    calls = FakeGpuCalls(disguise)
    with fake_gpu_tensors(), mode, calls, around_backward(lambda: calls):
        yield


@contextmanager
def _one_line() -> Iterator[None]:
    """Say in one line why a model cannot run on fake tensors."""
    try:
        yield
    except (UsageError, UnsupportedError):
        raise
    except Exception as failure:
        if is_fake_failure(failure):
            raise needs_values(" ".join(str(failure).split())[:200]) from None
        raise
