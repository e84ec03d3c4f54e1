"""Train one method on one seed: steps, epochs, an evaluation and a checkpoint after each epoch.

Nothing random is hidden: initial weights come from the seed, the order of an epoch's batches from
seed and epoch, and the model draws no random numbers. A resumed training repeats an unbroken one.
Several ranks repeat one process but for rounding, and for what ``fraction`` draws: each rank draws
among its own samples.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import batches
from ..errors import UsageError, usage_error
from ..files import path_exists
from ..penalty.head_diversity import HeadDiversity
from ..training.graph_step import graph_step
from .checkpoint import State, Task
from .config import Settings
from .distributed import OneProcess
from .evaluate import evaluate_splits, likeness
from .late import read_late, to_device
from .metrics import EVALUATED, Row
from .recipe import Augmentation, amp_dtype, autocast, make_optimizer
from .schedule import learning_rate

_RANK_SEEDS = 100_003  # more than epochs; a generator looks at 32 bits of its seed, so not far more
_LIKENESS_IMAGES = 128  # the first of ID validation: penalty and cosines are measured on them


class Watcher(Protocol):
    """Observer of a training's progress."""

    def noted(self, line: str) -> None: ...
    def started(self, task: Task, epoch: int, epochs: int, steps: int) -> None: ...
    def stepped(self, task: Task, loss: float, penalty: float | None) -> None: ...
    def epoch_done(self, task: Task, epoch: int, rows: list[Row]) -> None: ...


def train(
    settings: Settings,
    task: Task,
    splits: Mapping[str, Any],
    checkpoint: Path,
    watcher: Watcher,
    ranks: OneProcess,
) -> State:
    """Train to the last epoch, from ``checkpoint`` if it exists; write it after each epoch.

    Args:
        checkpoint: one process's file ``<task>.pt``; that of several ranks is the folder ``<task>``.

    Raises:
        UsageError: the checkpoint cannot be read or written, is damaged or of another run, or the
            loss is not finite.
    """
    state = State.fresh(settings, task, splits["train"], ranks.device)
    save = _open_checkpoint(settings, task, state, checkpoint, ranks, watcher.noted)
    diversity = head_diversity(settings, state.model)
    regulariser = Regulariser.of(settings, state.trained)
    step = stepper(settings, task, state, regulariser, ranks)
    sample = next(iter(batches(splits["val_id"], _LIKENESS_IMAGES)))[0].to(ranks.device)
    if not state.cosines:
        _, before = ranks.on_first(lambda: likeness(state.model, diversity, sample))
        state.cosines["before"] = before
    steps = math.ceil(len(splits["train"].labels) / settings.batch_size)
    watcher.started(task, state.epoch, settings.epochs, steps)
    while state.epoch < settings.epochs:
        epoch = state.epoch + 1
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(settings.base_lr(task.method), epoch, settings.schedule)
        rows = [
            _train_epoch(settings, task, state, regulariser, splits["train"], watcher, ranks, step)
        ]
        begun = time.perf_counter()
        shares = ranks.gathered(evaluate_splits(state.model, splits, ranks.rank, ranks.count))
        evaluated = [row for split in EVALUATED for share in shares for row in share.get(split, ())]
        if not all(math.isfinite(row["loss"]) for row in evaluated):
            raise ranks.agreed(_diverged(task, state.epoch, "at its end"))
        penalty, cosines = ranks.on_first(lambda: likeness(state.model, diversity, sample))
        evaluated[0]["penalty"] = penalty  # val_id, all heads
        seconds = time.perf_counter() - begun
        rows += [{"seconds": seconds, **row} for row in evaluated]
        rows = [{"method": task.method, "seed": task.seed, "epoch": epoch, **row} for row in rows]
        state.finish_epoch(rows, cosines)
        save()
        watcher.epoch_done(task, epoch, rows)
    return state


def _open_checkpoint(
    settings: Settings,
    task: Task,
    state: State,
    path: Path,
    ranks: OneProcess,
    note: Callable[[str], object],
) -> Callable[[], None]:
    """Wrap the model for the ranks, restore the checkpoint, and return the function that saves the next."""
    folder = path.with_suffix("")
    if not ranks.launched and not path_exists(folder):
        if path_exists(path):
            state.restore(settings, task, path)
        return lambda: state.save(settings, task, path)
    from . import sharded  # takes a second to import

    if ranks.on_first(lambda: path_exists(path)):
        hint = "resume without torchrun, or delete it to train that seed from the start"
        raise ranks.agreed(usage_error("checkpoint", "one that ranks wrote", path, hint))
    if ranks.launched:
        state.trained = ranks.distribute(state.model, settings.fsdp)
        state.optimizer = make_optimizer(state.trained, settings, task.method)
    sharded.restore(state, settings, task, folder, ranks, note)
    return lambda: sharded.save(state, settings, task, folder, ranks)


def head_diversity(settings: Settings, model: Any, **options: Any) -> HeadDiversity:
    """Return the penalty that ``settings`` ask for; of every step and sample unless ``options`` say less."""
    return HeadDiversity(
        model,
        layers=settings.layers if isinstance(settings.layers, str) else list(settings.layers),
        wrt=settings.wrt,
        granularity=settings.granularity,
        **options,
    )


class Regulariser(NamedTuple):
    """The penalty of a whole training, and the generator that draws its samples.

    It does not look at logits: the training looks at its losses.
    """

    diversity: HeadDiversity
    draws: torch.Generator

    @classmethod
    def of(cls, settings: Settings, model: Any) -> "Regulariser":
        draws = torch.Generator()
        amortised = {"every": settings.every, "fraction": float(settings.fraction)}
        options = {"generator": draws, "check_finite": False}
        return cls(head_diversity(settings, model, **amortised, **options), draws)

    def start_epoch(self, order: torch.Generator, step: int, rank: int) -> None:
        """Prepare for an epoch whose batches ``order`` shuffles, after ``step`` steps.

        Which samples it draws follows from ``order``'s seed and ``rank``: a resumed training draws the
        same, and no rank draws what another does.
        """
        self.draws.manual_seed(order.initial_seed() + rank * _RANK_SEEDS)
        self.diversity.step = step


def shuffler(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that orders the batches of one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def training_loss(
    model: Any, diversity: HeadDiversity, images: Tensor, labels: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logits, cross-entropy and the unweighted penalty (None without ``weight``), all with graphs."""
    if not weight:
        logits = model(images)
        return logits, F.cross_entropy(logits, labels), None
    with diversity:
        logits = model(images)
    return logits, F.cross_entropy(logits, labels), diversity.penalty(logits)


def _objective(
    model: Any, diversity: HeadDiversity, images: Tensor, labels: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a step minimises, its cross-entropy and unweighted penalty, and which samples were hit ``[B]``."""
    logits, loss, penalty = training_loss(model, diversity, images, labels, weight)
    hits = logits.detach().argmax(1) == labels
    if penalty is None:
        return loss, loss, torch.zeros_like(loss), hits
    return loss + weight * penalty, loss, penalty, hits


def training_step(
    state: State,
    diversity: HeadDiversity,
    weight: float,
    ranks: OneProcess,
    images: Tensor,
    labels: Tensor,
    share: tuple[int, int],
    cast: Callable[[], Any] = nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update the weights by one batch; waits for nothing that the device computes.

    Args:
        images, labels: on the device.
        share: how many of the samples count, and of how many of the whole batch.
        cast: returns the context of the forward.

    Returns:
        Without graphs, on the device: cross-entropy, unweighted penalty (0 without ``weight``), and
        which samples were hit ``[B]``.
    """
    with cast():
        whole, loss, penalty, hits = _objective(state.trained, diversity, images, labels, weight)
    state.optimizer.zero_grad(set_to_none=True)
    ranks.backward(whole, *share)
    state.optimizer.step()
    return loss.detach(), penalty.detach(), hits


Stepper = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor, Tensor]]


def stepper(
    settings: Settings, task: Task, state: State, regulariser: Regulariser, ranks: OneProcess
) -> Stepper:
    """Return ``training_step`` for a whole training; in one process as ``graph_step`` unless settings say no."""
    weight = settings.penalty_weight if task.method == "diversevit" else 0.0
    diversity = regulariser.diversity
    if ranks.launched or not settings.graph:
        return lambda images, labels, share: training_step(
            state,
            diversity,
            weight,
            ranks,
            images,
            labels,
            share,
            lambda: autocast(settings, ranks.device),
        )

    def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return _objective(state.trained, diversity, images, labels, weight)

    penalised = diversity if weight else None
    step = graph_step(loss, state.optimizer, diversity=penalised, amp=amp_dtype(settings))
    return lambda images, labels, share: step(images, labels)[1:]


def _train_epoch(
    settings: Settings,
    task: Task,
    state: State,
    regulariser: Regulariser,
    dataset: Any,
    watcher: Watcher,
    ranks: OneProcess,
    step: Stepper,
) -> Row:
    """Train one epoch; return the row of its running means.

    Raises:
        UsageError: the loss of a step is not finite. On a GPU one more step has been taken by then.
    """
    weight = settings.penalty_weight if task.method == "diversevit" else 0.0
    order = shuffler(task.seed, state.epoch + 1)
    done = state.epoch * math.ceil(len(dataset.labels) / settings.batch_size)
    regulariser.start_epoch(order, done, ranks.rank)
    augment = Augmentation(settings.augment, order)
    hits, members = torch.zeros(2, len(dataset.group_names), dtype=torch.float64)
    sums = {"loss": 0.0, "penalty": 0.0}
    steps = 0
    begun = time.perf_counter()

    def taken() -> Iterator[tuple[Sequence[Tensor], tuple[Tensor, int, int]]]:
        for batch in batches(dataset, settings.batch_size, generator=order):
            (images, labels, groups), kept = ranks.share(augment(batch[0]), *batch[1:])
            images, labels = to_device(images, ranks.device), to_device(labels, ranks.device)
            share = kept, len(batch[0])
            yield (
                step(images, labels, share),
                (groups, *share),
            )

    for (loss, penalty, hit), (groups, kept, count) in read_late(taken()):
        means = ranks.mean([loss.item(), penalty.item()], kept)
        losses = dict(zip(sums, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise ranks.agreed(_diverged(task, state.epoch, f"in step {steps + 1}"))
        steps += 1
        for name, value in losses.items():
            sums[name] += value * count
        hit = hit.double()
        hits.index_add_(0, groups[:kept], hit[:kept])
        members.index_add_(0, groups[:kept], torch.ones_like(hit[:kept]))
        watcher.stepped(task, losses["loss"], losses["penalty"] if weight else None)
    hits, members = ranks.total(torch.stack([hits, members]))
    ranks.collect(state.trained, state.model)
    seconds, seen = time.perf_counter() - begun, members.sum().item()
    return {
        "split": "train",
        "heads": "all",
        "accuracy": hits.sum().item() / seen,
        "worst_group": (hits / members)[members > 0].min().item(),
        "loss": sums["loss"] / seen,
        "penalty": sums["penalty"] / seen if weight else None,
        "seconds": seconds,
        "steps_per_second": steps / seconds,
    }


def _diverged(task: Task, done: int, where: str) -> UsageError:
    got = f"NaN or infinity {where} of epoch {done + 1} of {task}"
    kept = f"the checkpoint after epoch {done} is kept" if done else "nothing was kept"
    return usage_error("loss", "a finite number", got, f"lower the learning rate ({kept})")
