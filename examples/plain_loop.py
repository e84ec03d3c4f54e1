"""A plain PyTorch loop: autocast, gradient accumulation, clipping, mixup, GradScaler.

python examples/plain_loop.py
python examples/plain_loop.py --amp bfloat16 --mixup
python examples/plain_loop.py --amp float16
"""

import argparse
from collections.abc import Sequence

import numpy as np
import tiny
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


def backward(
    diversity: dvf.HeadDiversity,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    *,
    weight: float,
    scaler: torch.amp.GradScaler,
    amp: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the mean loss; labels ``[B]`` or soft targets ``[B, classes]``.

    Returns the means over the micro-batches of cross-entropy and penalty.
    """
    model = diversity.model
    losses, penalties = [], []
    for images, targets in micro_batches:
        with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None), diversity:
            logits = model(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        penalty = diversity.penalty(logits)  # outside autocast, as backward is
        scaler.scale((loss + weight * penalty) / len(micro_batches)).backward()
        losses.append(loss.detach())
        penalties.append(penalty.detach())
    return torch.stack(losses).mean(), torch.stack(penalties).mean()


def train(
    model: nn.Module,
    loader: DataLoader,
    *,
    weight: float = 10.0,
    lr: float = 1e-3,
    accumulate: int = 2,
    clip: float = 1.0,
    amp: torch.dtype | None = None,
    mixup: Mixup | None = None,
) -> None:
    device = next(model.parameters()).device
    diversity = dvf.HeadDiversity(model)  # in float16 it scales its own gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    micro_batches = []
    for number, (images, targets) in enumerate(loader, start=1):
        images, targets = images.to(device), targets.to(device)
        micro_batches.append(mixup(images, targets) if mixup else (images, targets))
        if number % accumulate:
            continue
        loss, penalty = backward(diversity, micro_batches, weight=weight, scaler=scaler, amp=amp)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        micro_batches = []
        tiny.report(number // accumulate - 1, loss, penalty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amp", choices=("bfloat16", "float16"))
    parser.add_argument("--mixup", action="store_true")
    parser.add_argument("--weight", type=float, default=10.0, help="of the penalty")
    options = parser.parse_args()
    np.random.seed(0)  # Mixup draws from NumPy's global generator
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(
        tiny.vit().to(device),
        DataLoader(tiny.dataset(), batch_size=4),
        weight=options.weight,
        amp=getattr(torch, options.amp) if options.amp else None,
        mixup=Mixup(mixup_alpha=0.8, num_classes=tiny.CLASSES) if options.mixup else None,
    )


if __name__ == "__main__":
    main()
