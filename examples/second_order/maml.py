"""MAML (Finn et al. 2017) of a Vision Transformer: the gradient after a step of gradient descent.

python examples/second_order/maml.py
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import diversevit_fast as dvf

Batch = tuple[Tensor, Tensor]


def meta_loss(
    model: nn.Module, support: Batch, query: Batch, lr: float = 0.1, steps: int = 1
) -> Tensor:
    """The loss on ``query`` after ``steps`` steps on ``support``, differentiable through them."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    with dvf.second_order(model):
        for _ in range(steps):
            images, labels = support
            loss = F.cross_entropy(functional_call(model, weights, (images,)), labels)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {
                name: w - lr * g for (name, w), g in zip(weights.items(), grads, strict=True)
            }
        images, labels = query
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)


def task(generator: torch.Generator) -> tuple[Batch, Batch]:
    """A task of two classes, each a colour: 8 images to adapt to, 8 to be judged by."""
    colours = torch.randn(2, 3, 1, 1, generator=generator)
    labels = torch.arange(16) % 2
    images = colours[labels] + 0.3 * torch.randn(16, 3, 32, 32, generator=generator)
    return (images[:8], labels[:8]), (images[8:], labels[8:])


def main() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=4, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        loss = torch.stack([meta_loss(model, *task(generator)) for _ in range(2)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss after adapting {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
