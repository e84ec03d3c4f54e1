"""Critics to measure, and their loss with R1: half the squared gradient of the scores by the images, differentiated.

Attention is ours inside ``dvf.second_order``, PyTorch's by formula (``SDPBackend.MATH``), or written out.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf
from benchmarks.registry import eager_attention

WEIGHT = 10.0
"""Of the penalty, as Mescheder et al. 2018."""
PATCH = 16


class Encoder(nn.Module):
    """PyTorch's own ``nn.TransformerEncoder`` on the patches of an image, averaged to one score."""

    def __init__(self, width: int, heads: int, depth: int, side: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((side // PATCH) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            *(width, heads, 4 * width),
            **{"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True},
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.score = nn.Linear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT.contiguous() + self.positions
        return self.score(self.blocks(x).mean(1))


def _vit_s(depth: int, side: int) -> nn.Module:
    import timm

    return timm.create_model(
        "vit_small_patch16_224", img_size=side, num_classes=1, depth=depth, patch_size=PATCH
    )


class Critic(NamedTuple):
    """A critic and the batches at which it is measured."""

    make: Callable[[int, int], nn.Module]  # of a depth and an image's side
    depth: int
    side: int
    batches: dict[str, int]  # by device


CRITICS = {
    "ViT-S": Critic(_vit_s, 12, 224, {"cpu": 2, "cuda": 64}),
    "encoder-1024x256": Critic(partial(Encoder, 256, 4), 4, 512, {"cpu": 1, "cuda": 32}),
    "encoder-1024x256-8-heads": Critic(partial(Encoder, 256, 8), 4, 512, {"cpu": 1, "cuda": 32}),
    "encoder-1024x512": Critic(partial(Encoder, 512, 8), 4, 512, {"cpu": 1, "cuda": 32}),
}
"""A ViT of 197 tokens, and encoders of 1024 tokens: the wider, and the fewer heads, the less of a step is attention."""


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, as these critics call it, in plain operators."""
    assert attn_mask is None
    assert dropout_p == 0
    return eager_attention(q, k, v, is_causal)


ATTENTION: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ours": dvf.second_order,
    "SDPA math": lambda: sdpa_kernel(SDPBackend.MATH),
    "eager": lambda: mock.patch.object(F, "scaled_dot_product_attention", _written_out),
}
"""Implementation -> the block in which a critic is called."""


def r1(attention: str) -> Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
    """Return what makes a critic's loss on real images; the labels are not looked at."""
    block = ATTENTION[attention]

    def loss_of(critic: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(images: Tensor, labels: Tensor) -> Tensor:
            images = images.detach().requires_grad_()
            with block():
                scores = critic(images)
            (grad,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
            penalty = grad.square().flatten(1).sum(1).mean()
            return F.softplus(-scores).mean() + WEIGHT / 2 * penalty

        return loss

    return loss_of
