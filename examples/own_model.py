"""A model of your own, of ``dvf.nn``'s modules, with ``HeadPenalty`` instead of ``HeadDiversity``.

python examples/own_model.py
"""

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


class Block(nn.Module):
    """Pre-norm attention and MLP, all of it differentiable twice."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = dvf.nn.LayerNorm(dim), dvf.nn.LayerNorm(dim)
        self.attn = dvf.nn.MultiHeadAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), dvf.nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AverageViT(nn.Module):
    """Images ``[B, 3, S, S]`` to logits ``[B, classes]``, from the mean of all tokens."""

    def __init__(self, size: int = 32, patch: int = 8, dim: int = 48, num_heads: int = 4):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(3)))
        self.norm = dvf.nn.LayerNorm(dim)
        self.head = nn.Linear(dim, tiny.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def terms(model: AverageViT, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and penalty of the last block's attention."""
    logits = model(images)
    score = logits.max(-1).values
    penalty = dvf.nn.HeadPenalty()(score, model.blocks[-1].attn)
    return F.cross_entropy(logits, labels), penalty


def train(model: AverageViT, loader: DataLoader, *, weight: float = 10.0) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (images, labels) in enumerate(loader):
        loss, penalty = terms(model, images.to(device), labels.to(device))
        (loss + weight * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tiny.report(step, loss.detach(), penalty.detach())


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(AverageViT().to(device), DataLoader(tiny.dataset(), batch_size=8))


if __name__ == "__main__":
    main()
