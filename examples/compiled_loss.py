"""Cross-entropy and penalty compiled as one graph with ``dvf.compile_loss``.

python examples/compiled_loss.py
"""

import argparse

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


def train(
    model: nn.Module, loader: DataLoader, *, weight: float = 10.0, backend: str = "inductor"
) -> None:
    device = next(model.parameters()).device
    diversity = dvf.HeadDiversity(model)

    def terms(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with diversity:  # inside the compiled function: the model is not compiled by itself
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        penalty = diversity.penalty(logits)
        return loss + weight * penalty, loss.detach(), penalty.detach()

    compiled = dvf.compile_loss(terms, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (images, labels) in enumerate(loader):
        total, loss, penalty = compiled(model, images.to(device), labels.to(device))
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tiny.report(step, loss, penalty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor", help="aot_eager: no code is generated")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(tiny.vit().to(device), DataLoader(tiny.dataset(), batch_size=8), backend=options.backend)


if __name__ == "__main__":
    main()
