"""One method on one seed: steps, epochs, an evaluation and a checkpoint after each epoch.

Nothing random is hidden: initial weights come from the seed, the order of an epoch's batches from
seed and epoch, and the model draws no random numbers. A resumed training repeats an unbroken one.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import batches
from ..diversity import HeadDiversity
from ..errors import UsageError, expected
from .config import Settings
from .evaluate import evaluate_splits, likeness
from .metrics import Row
from .state import State, Task

_DECAYS = (0.7, 0.8)  # fractions of the epochs after which the learning rate falls tenfold
_LIKENESS_IMAGES = 128  # the first of ID validation: penalty and cosines are measured on them


class Watcher(Protocol):
    """Whoever wants to know how training goes."""

    def started(self, task: Task, epoch: int, epochs: int, steps: int) -> None: ...
    def stepped(self, task: Task, loss: float, penalty: float | None) -> None: ...
    def epoch_done(self, task: Task, epoch: int, rows: list[Row]) -> None: ...


def train(
    settings: Settings,
    task: Task,
    splits: Mapping[str, Any],
    checkpoint: Path,
    watcher: Watcher,
    device: torch.device,
) -> State:
    """Train to the last epoch, from ``checkpoint`` if that file exists; write it after each epoch.

    Raises:
        UsageError: the checkpoint is damaged or of another run, or the loss is not finite.
    """
    state = State.fresh(settings, task, splits["train"], device)
    if checkpoint.exists():
        state.restore(settings, task, checkpoint)
    diversity = head_diversity(settings, state.model)
    sample = next(iter(batches(splits["val_id"], _LIKENESS_IMAGES)))[0].to(device)
    if not state.cosines:
        state.cosines["before"] = likeness(state.model, diversity, sample)[1]
    steps = math.ceil(len(splits["train"].labels) / settings.batch_size)
    watcher.started(task, state.epoch, settings.epochs, steps)
    while state.epoch < settings.epochs:
        epoch = state.epoch + 1
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(settings.base_lr(task.method), epoch, settings.epochs)
        rows = [_train_epoch(settings, task, state, splits["train"], watcher)]
        begun = time.perf_counter()
        evaluated = evaluate_splits(state.model, splits)
        if not all(math.isfinite(row["loss"]) for row in evaluated):
            raise _diverged(task, state.epoch, "at its end")
        penalty, cosines = likeness(state.model, diversity, sample)
        evaluated[0]["penalty"] = penalty  # val_id, all heads
        seconds = time.perf_counter() - begun
        rows += [{"seconds": seconds, **row} for row in evaluated]
        rows = [{"method": task.method, "seed": task.seed, "epoch": epoch, **row} for row in rows]
        state.finish_epoch(rows, cosines)
        state.save(settings, task, checkpoint)
        watcher.epoch_done(task, epoch, rows)
    return state


def head_diversity(settings: Settings, model: Any, **amortised: Any) -> HeadDiversity:
    """The penalty that ``settings`` ask for, on ``model``; of every step and sample unless ``amortised``."""
    return HeadDiversity(
        model,
        layers=settings.layers if isinstance(settings.layers, str) else list(settings.layers),
        wrt=settings.wrt,
        granularity=settings.granularity,
        **amortised,
    )


def training_diversity(
    settings: Settings, model: Any, order: torch.Generator, step: int
) -> HeadDiversity:
    """The regulariser of an epoch whose batches ``order`` shuffles, after ``step`` steps of training.

    Which samples it draws follows from ``order``'s seed, so a resumed training draws the same.
    """
    draws = torch.Generator().manual_seed(order.initial_seed())
    every, fraction = settings.every, float(settings.fraction)
    diversity = head_diversity(settings, model, every=every, fraction=fraction, generator=draws)
    diversity.step = step
    return diversity


def learning_rate(base: float, epoch: int, epochs: int) -> float:
    """Learning rate of epoch ``epoch`` (the first is 1) of ``epochs``."""
    return base * 0.1 ** sum(epoch > round(fraction * epochs) for fraction in _DECAYS)


def shuffler(seed: int, epoch: int) -> torch.Generator:
    """The generator that orders the batches of one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def training_loss(
    model: Any, diversity: HeadDiversity, images: Tensor, labels: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, cross-entropy and the unweighted penalty, all with graphs.

    No penalty (None) without ``weight``, and none of a model whose loss is not finite.
    """
    if not weight:
        logits = model(images)
        return logits, F.cross_entropy(logits, labels), None
    with diversity:
        logits = model(images)
    loss = F.cross_entropy(logits, labels)
    return logits, loss, diversity.penalty(logits) if torch.isfinite(loss) else None


def _train_epoch(
    settings: Settings,
    task: Task,
    state: State,
    dataset: Any,
    watcher: Watcher,
) -> Row:
    """One pass over the training data; the row holds running means."""
    device = next(state.model.parameters()).device
    weight = settings.penalty_weight if task.method == "diversevit" else 0.0
    order = shuffler(task.seed, state.epoch + 1)
    done = state.epoch * math.ceil(len(dataset.labels) / settings.batch_size)
    diversity = training_diversity(settings, state.model, order, done)
    hits, members = torch.zeros(2, len(dataset.group_names), dtype=torch.float64)
    sums = {"loss": 0.0, "penalty": 0.0}
    steps = 0
    begun = time.perf_counter()
    for images, labels, groups in batches(dataset, settings.batch_size, generator=order):
        images, target = images.to(device), labels.to(device)
        logits, loss, penalty = training_loss(state.model, diversity, images, target, weight)
        losses = {"loss": loss.item(), "penalty": 0.0 if penalty is None else penalty.item()}
        if not all(map(math.isfinite, losses.values())):
            raise _diverged(task, state.epoch, f"in step {steps + 1}")
        state.optimizer.zero_grad(set_to_none=True)
        (loss if penalty is None else loss + weight * penalty).backward()
        state.optimizer.step()
        steps += 1
        for name, value in losses.items():
            sums[name] += value * len(labels)
        hits.index_add_(0, groups, (logits.argmax(1).cpu() == labels).double())
        members.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        watcher.stepped(task, losses["loss"], losses["penalty"] if weight else None)
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
    return expected("loss", "a finite number", got, f"lower the learning rate ({kept})")
