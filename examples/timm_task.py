"""timm's ClassificationTask with the penalty, for training scripts built on ``timm.task``.

python examples/timm_task.py
"""

from typing import Any

import tiny
import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diversevit_fast as dvf


class DiverseClassificationTask(ClassificationTask):
    """``result["loss"]`` includes the penalty, ``result["penalty"]`` is its value, for the log.

    ``prepare_distributed``, EMA and checkpoints work as in the base class.
    """

    def __init__(self, model: nn.Module, *args: Any, weight: float = 10.0, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.diversity = dvf.HeadDiversity(model)
        self.weight = weight

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return super().forward(input, target)
        with self.diversity:
            result = super().forward(input, target)
        penalty = self.diversity.penalty(result["output"])
        loss = result["loss"] + self.weight * penalty
        return {**result, "loss": loss, "penalty": penalty.detach()}

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise dvf.UnsupportedError(
            "compile: a compiled model cannot be differentiated twice; compile the blocks below the "
            "last (checkpointed.py) or the whole loss (compiled_loss.py)"
        )


def train(model: nn.Module, loader: DataLoader, *, lr: float = 1e-3, clip: float = 1.0) -> None:
    device = next(model.parameters()).device
    task = DiverseClassificationTask(model, criterion_kwargs={"smoothing": 0.0}, device=device)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=lr)
    for step, (images, labels) in enumerate(loader):
        result = task(images.to(device), labels.to(device))
        result["loss"].backward()
        nn.utils.clip_grad_norm_(task.get_clip_parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = result["loss"].detach() - task.weight * result["penalty"]
        tiny.report(step, loss, result["penalty"])


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(tiny.vit().to(device), DataLoader(tiny.dataset(), batch_size=8))


if __name__ == "__main__":
    main()
