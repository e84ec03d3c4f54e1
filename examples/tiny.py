"""What the recipes share: a tiny ViT, images that it can learn in seconds, the line each step prints.

Put your model and data in their place; nothing else in a recipe needs to change.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import TensorDataset

CLASSES = 4


def vit() -> VisionTransformer:
    """A timm ViT of 3 blocks and 4 heads for images ``[B, 3, 32, 32]``, the same weights each time."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=4, num_classes=CLASSES
    )


def dataset(samples: int = 64) -> TensorDataset:
    """Images ``[3, 32, 32]``, a colour for each class plus noise, and labels."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    images = colours[labels] + 0.5 * torch.randn(samples, 3, 32, 32, generator=generator)
    return TensorDataset(images, labels)


def report(step: int, loss: float | Tensor, penalty: float | Tensor) -> None:
    """Print the means over one optimizer step."""
    print(f"step {step}  loss {float(loss):.4f}  penalty {float(penalty):.4f}", flush=True)
