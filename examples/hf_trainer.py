"""Hugging Face Trainer with the penalty in ``compute_loss``, right under gradient accumulation.

python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import diversevit_fast as dvf


class DiverseTrainer(Trainer):
    """``Trainer`` whose training loss includes the penalty; evaluation is untouched."""

    def __init__(self, model: nn.Module, *args: Any, weight: float = 10.0, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        # Our loss is a mean over the micro-batch, so the Trainer has to divide it by the accumulation
        # steps. For models that accept loss kwargs, as ViTs do, it would take the loss for scaled.
        self.model_accepts_loss_kwargs = False
        self.diversity = dvf.HeadDiversity(model)
        self.weight = weight
        self.terms: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        with self.diversity:
            result: Any = super().compute_loss(model, inputs, return_outputs=True)
        loss, outputs = result
        penalty = self.diversity.penalty(outputs.logits)
        self.terms.append(torch.stack([loss.detach(), penalty.detach()]))
        loss = loss + self.weight * penalty
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add this process's mean penalty; ``logs["loss"]`` includes it times its weight."""
        if self.terms and "loss" in logs:
            loss, penalty = torch.stack(self.terms).mean(0).tolist()
            self.terms = []
            if self.is_world_process_zero():
                tiny.report(self.state.global_step - 1, loss, penalty)
            logs["penalty"] = penalty
        super().log(logs, *args, **kwargs)


def vit() -> ViTForImageClassification:
    """A ViT of 3 blocks and 4 heads for images ``[B, 3, 32, 32]``, random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 192},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": tiny.CLASSES},
    }
    return ViTForImageClassification(ViTConfig(**sizes))


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def train(model: nn.Module, data: Dataset, *, batch: int = 4, accumulate: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        DiverseTrainer(model, arguments, collate, data, data).train()


def main() -> None:
    train(vit(), tiny.dataset())


if __name__ == "__main__":
    main()
