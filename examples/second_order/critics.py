"""Gradient penalties of a critic that is a Vision Transformer: R1 and WGAN-GP.

python examples/second_order/critics.py
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import diversevit_fast as dvf


def r1_loss(critic: nn.Module, real: Tensor, fake: Tensor, weight: float = 10.0) -> Tensor:
    """The non-saturating critic loss with R1 (Mescheder et al. 2018): half the squared gradient at real images."""
    real = real.detach().requires_grad_()
    with dvf.second_order(critic):
        of_real, of_fake = critic(real), critic(fake.detach())
    (grad,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
    loss = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
    return loss + weight / 2 * grad.square().flatten(1).sum(1).mean()


def wgan_gp_loss(critic: nn.Module, real: Tensor, fake: Tensor, weight: float = 10.0) -> Tensor:
    """The Wasserstein critic loss with gradient norms drawn to 1 between real and fake (Gulrajani et al. 2017)."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    with dvf.second_order(critic):
        of_real, of_fake, of_between = critic(real), critic(fake.detach()), critic(between)
    (grad,) = torch.autograd.grad(of_between.sum(), between, create_graph=True)
    norms = grad.flatten(1).norm(dim=1)
    return of_fake.mean() - of_real.mean() + weight * (norms - 1).square().mean()


def main() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 16, 3, 32, 32) + torch.tensor([0.2, -0.2]).view(2, 1, 1, 1, 1)
    for loss_of in (r1_loss, wgan_gp_loss):
        critic = VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=4, num_classes=1)
        optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3)
        for step in range(8):
            loss = loss_of(critic, real, fake)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"{loss_of.__name__} step {step}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
