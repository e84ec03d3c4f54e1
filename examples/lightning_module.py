"""A LightningModule with the penalty in ``training_step``.

python examples/lightning_module.py
"""

from typing import Any

import lightning
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


class DiverseClassifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, *, weight: float = 10.0, lr: float = 1e-3):
        super().__init__()
        self.model = model
        self.diversity = dvf.HeadDiversity(model)
        self.weight, self.lr = weight, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        with self.diversity:
            logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        penalty = self.diversity.penalty(logits)
        self.log_dict({"loss": loss, "penalty": penalty}, on_step=True)
        total = loss + self.weight * penalty
        return {"loss": total, "cross_entropy": loss.detach(), "penalty": penalty.detach()}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


class Report(lightning.Callback):
    """Prints the means over the micro-batches of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append(torch.stack([outputs["cross_entropy"], outputs["penalty"]]))
        if len(self.rows) == trainer.accumulate_grad_batches:
            tiny.report(trainer.global_step - 1, *torch.stack(self.rows).mean(0))
            self.rows = []


def train(model: nn.Module, loader: DataLoader, validation: DataLoader) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[Report()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(DiverseClassifier(model), loader, validation)
    return trainer


def main() -> None:
    data = tiny.dataset()
    trainer = train(tiny.vit(), DataLoader(data, batch_size=4), DataLoader(data, batch_size=8))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
