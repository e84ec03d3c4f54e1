"""Train as one process, or as the ranks that ``torchrun`` started.

Every batch of the single-process order is split over the ranks, and each rank's loss is weighted by its
share, so the averaged gradient is that of the whole batch, uneven shares included: the penalty is a
mean over samples. Everything that decides what comes next (a loss that is not finite, an error while
preparing) is agreed on by all ranks before any of them acts, so none waits for one that left.
"""

import atexit
import gc
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedError, UsageError, usage_error
from ..files import FileError
from .machine import choose_device

T = TypeVar("T")
TORCHRUN = "torchrun --nproc-per-node {} --no-python diversevit"
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_UNSET = f"start with torchrun, or unset {', '.join(_LAUNCH)} to train in one process"
_FAREWELL = timedelta(seconds=10)  # the most that a rank waits for rank 0 to say what is wrong


class ReportedError(UsageError):
    """A failure known to every rank, raised on ranks other than 0; rank 0 reports it."""


class OneProcess:
    """The interface of ``Ranks`` for a training in a single process.

    Attributes:
        rank, count: this rank and how many there are.
        device: what this rank computes on.
    """

    rank, count, launched = 0, 1, False

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def first(self) -> bool:
        """True if this rank prints and writes files."""
        return self.rank == 0

    def distribute(self, model: nn.Module, fsdp: bool) -> nn.Module:
        """Wrap ``model`` for training steps; calling the wrapper gives the same result."""
        return model

    def collect(self, trained: nn.Module, model: nn.Module) -> None:
        """Copy the trained weights back from the wrapper that ``distribute`` made into ``model``."""

    def share(self, *batch: Tensor) -> tuple[Sequence[Tensor], int]:
        """Return this rank's part of tensors ``[B, ...]`` and the number of its samples that count."""
        return batch, len(batch[0])

    def backward(self, loss: Tensor, kept: int, batch: int) -> None:
        """Backpropagate ``loss``, the mean over ``kept`` samples, weighted to give the mean over ``batch``."""
        loss.backward()

    def mean(self, values: Sequence[float], kept: int) -> list[float]:
        """Average means over this rank's ``kept`` samples into means over the whole batch."""
        return list(values)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks."""
        return values

    def gathered(self, value: T) -> list[T]:
        """Return every rank's ``value``, on every rank."""
        return [value]

    def together(self, job: Callable[[], T]) -> T:
        """Run ``job`` on every rank; an exception on one rank is raised on all."""
        return job()

    def on_first(self, job: Callable[[], T]) -> T:
        """Run ``job`` on rank 0 and return its result on every rank; its exception is raised on all."""
        return job()

    def agreed(self, error: UsageError) -> UsageError:
        """Return the exception this rank raises for an ``error`` that every rank knows of."""
        return error


class Ranks(OneProcess):
    """This process as one rank of a ``torch.distributed`` group.

    Gradients travel in the default group; everything else in a gloo group of its own, so that it
    neither mixes with them nor needs a GPU.
    """

    launched = True

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.control: Any = dist.new_group(backend="gloo")

    def distribute(self, model: nn.Module, fsdp: bool) -> nn.Module:
        if not fsdp:
            return nn.parallel.DistributedDataParallel(model)
        return shard(deepcopy(model), self.device)

    def collect(self, trained: nn.Module, model: nn.Module) -> None:
        if isinstance(trained, nn.parallel.DistributedDataParallel):
            return  # it trains ``model`` itself
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True))
        model.load_state_dict(whole)

    def share(self, *batch: Tensor) -> tuple[Sequence[Tensor], int]:
        own = [x.tensor_split(self.count)[self.rank] for x in batch]
        kept = len(own[0])
        # of a batch smaller than the ranks: one sample without weight, for the collectives' sake
        return (own if kept else [x[:1] for x in batch]), kept

    def backward(self, loss: Tensor, kept: int, batch: int) -> None:
        with warnings.catch_warnings():
            # DDP means axes of length 1, the class token's; it copies them rightly
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            (loss * (kept * self.count / batch)).backward()  # gradients are averaged over the ranks

    def mean(self, values: Sequence[float], kept: int) -> list[float]:
        sums = torch.tensor([*(v * kept for v in values), kept], dtype=torch.float64)
        *sums, samples = self.total(sums).tolist()
        return [value / samples for value in sums]

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.control)
        return values

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, job: Callable[[], T]) -> T:
        result, failure = _attempt(job)
        for rank, failed in enumerate(self.gathered(failure)):
            if failed is not None:
                where = f" (on rank {rank})" if rank else ""
                raise self.agreed(UsageError(f"{failed}{where}"))
        return result  # pyright: ignore[reportReturnType] (there was no failure)

    def on_first(self, job: Callable[[], T]) -> T:
        outcome = [_attempt(job) if self.first else (None, None)]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        result, failure = outcome[0]
        if failure is not None:
            raise self.agreed(failure)
        return result  # pyright: ignore[reportReturnType] (there was no failure)

    def agreed(self, error: UsageError) -> UsageError:
        return error if self.first else ReportedError(str(error))

    def wait_for_farewell(self) -> None:
        """Wait until rank 0 has printed: the launcher ends all ranks with the first that leaves."""
        with suppress(RuntimeError):  # rank 0 is gone, as awaited, or took too long
            awaited = dist.irecv(torch.empty(1), src=0, group=self.control)
            if awaited is not None:
                awaited.wait(_FAREWELL)


def launched() -> bool:
    """Return True if a launcher such as ``torchrun`` started this process as one of its ranks."""
    return dist.is_available() and all(name in os.environ for name in _LAUNCH)


def first_rank() -> bool:
    """Return True if this process prints and writes files (rank 0)."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def open_ranks(device: str, *, fsdp: bool = False) -> Iterator[OneProcess]:
    """Open the process group that the launcher started, or a single process without one.

    The process group stays open, for the next run of this process: it cannot be opened twice.
    ``close_ranks`` closes it; after a failure the end of the process does, which the others notice.

    Args:
        device: as in ``Settings``; ``"cuda"`` is the GPU of each rank's own number on its machine.
        fsdp: whether FSDP is asked for, which one process without a launcher cannot do.

    Raises:
        UsageError: a device not there for every rank, ``fsdp`` without ranks, or an environment that is
            no launcher's.
    """
    if not launched():
        if fsdp:
            hint = f"start it with: {TORCHRUN.format(2)} ..."
            raise usage_error("fsdp", "several ranks", "one process", hint)
        yield OneProcess(choose_device(device))
        return
    _check_launch()
    chosen, failure = _attempt(lambda: _own_device(device))
    if not dist.is_initialized():
        _meet(_backends(chosen))
        atexit.register(_leave)
    ranks = Ranks(chosen or torch.device("cpu"))
    try:
        ranks.together(lambda: _reraise(failure))
        kinds = sorted(set(ranks.gathered(ranks.device.type)))
        if len(kinds) > 1:
            got = " and ".join(kinds)
            raise ranks.agreed(usage_error("device", "one kind for all ranks", got, "--device cpu"))
        with noticing_lost_ranks(ranks, "start it again"):
            yield ranks
    except ReportedError:
        ranks.wait_for_farewell()
        raise


def close_ranks() -> None:
    """Close the process group after every rank has finished."""
    if launched() and dist.is_initialized():
        gc.collect()  # what FSDP2 sharded keeps gloo's threads, which abort the process at its end
        dist.destroy_process_group()


def _leave() -> None:
    """End the process group of a process that failed, so that gloo's threads do not outlive it.

    NCCL's group is left to its own destructor, which aborts; closing it would wait for other ranks.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def noticing_lost_ranks(ranks: OneProcess, hint: str) -> Iterator[None]:
    """Context manager: turn an error of a collective, which means that a rank has left, into one line.

    Raises:
        UsageError: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not ranks.launched or not _broken_connection(error):
            raise
        got = "a connection that another rank closed; its message says why"
        raise ranks.agreed(usage_error("ranks", "all of them to the end", got, hint)) from None


def resume_command(folder: Path, ranks: OneProcess) -> str:
    """Return the command that resumes the run in ``folder`` the way it was started.

    Of several machines it is each one's, without where they meet, which no process knows.
    """
    start = "diversevit"
    if ranks.launched:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
        start = TORCHRUN.format(local)
        if local < ranks.count:
            machines = f"torchrun --nnodes {ranks.count // local} ... "
            start = start.replace("torchrun ", machines)
    return f"{start} run --resume {shlex.quote(str(folder))}"


def shard(model: Any, device: torch.device) -> nn.Module:
    """Shard the parameters of ``model`` over the ranks with FSDP2: each block, then the rest.

    Args:
        model: a model with ``blocks``; changed in place.
        device: this rank's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _check_launch() -> None:
    """Raise if the launcher's environment variables are inconsistent."""
    texts = [os.environ[name] for name in _NUMBERS]
    known = all(text.isascii() and text.isdecimal() and len(text) < 10 for text in texts)
    rank, count, _, port = map(int, texts) if known else (0, 0, 0, 0)
    if not (rank < count and 0 < port < 2**16):
        got = ", ".join(f"{name}={os.environ[name][:40]!r}" for name in _NUMBERS)
        raise usage_error("ranks", "what torchrun sets", got, _UNSET)


def _meet(backends: str) -> None:
    """Initialise the process group."""
    try:
        dist.init_process_group(backends)
    except (ValueError, RuntimeError) as failure:  # PyTorch's errors of a connection are the latter
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = str(failure).partition("\n")[0]
        raise usage_error("ranks", f"the others at {place}", said, _UNSET) from None


def _attempt(job: Callable[[], T]) -> tuple[T | None, UsageError | None]:
    """Run ``job`` and return its result, or its exception as a one-line error that can be sent."""
    try:
        return job(), None
    except FileError as failure:
        return None, failure
    except (UsageError, UnsupportedError, OSError) as failure:
        return None, UsageError(str(failure))


def _reraise(failure: UsageError | None) -> None:
    if failure is not None:
        raise failure


def _own_device(name: str) -> torch.device:
    """Return the device this rank uses for the setting ``name``."""
    local = int(os.environ["LOCAL_RANK"])
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and name in ("auto", kind.type):
        there = torch.accelerator.device_count()
        if local >= there:
            hint = f"--nproc-per-node {there}, or --device cpu"
            raise usage_error("device", f"a {kind.type} device per rank", f"{there} of them", hint)
        torch.accelerator.set_device_index(local)
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        hint = f"say {device.type}: each rank takes its own"
        raise usage_error("device", "one without a number", repr(name), hint)
    return torch.device(device.type, local)


def _backends(device: torch.device | None) -> str:
    if device is None or device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def _broken_connection(error: RuntimeError) -> bool:
    said = str(error).lower()
    signs = ("gloo", "connection closed", "connection reset")
    known = isinstance(error, dist.DistError) or any(sign in said for sign in signs)
    return known and not isinstance(error, UnsupportedError)
