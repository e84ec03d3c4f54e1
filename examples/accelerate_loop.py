"""Hugging Face Accelerate with ``accumulate()``.

python examples/accelerate_loop.py
accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import tiny
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    *,
    weight: float = 10.0,
    clip: float = 1.0,
) -> None:
    diversity = dvf.HeadDiversity(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    rows, step = [], 0
    for images, labels in loader:
        with accelerator.accumulate(model):
            with diversity:
                logits = model(images)
            loss = F.cross_entropy(logits, labels)
            penalty = diversity.penalty(logits)
            accelerator.backward(loss + weight * penalty)  # it divides by the accumulation steps
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        rows.append(torch.stack([loss.detach(), penalty.detach()]))
        if accelerator.sync_gradients:
            means = accelerator.reduce(torch.stack(rows).mean(0), "mean")
            if accelerator.is_main_process:
                tiny.report(step, *means)
            rows, step = [], step + 1


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    batch = 4 // accelerator.num_processes
    model = tiny.vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(accelerator, model, optimizer, DataLoader(tiny.dataset(), batch_size=batch))


if __name__ == "__main__":
    main()
