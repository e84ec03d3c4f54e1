"""Jacobian regularisation (Hoffman et al. 2019) of a cross-attention block: small changes in, small changes out.

python examples/second_order/jacobian.py
"""

import torch
from torch import Tensor, nn

import diversevit_fast as dvf


class CrossAttention(nn.Module):
    """Latents that read a sequence, as in Perceiver or a diffusion model's text conditioning."""

    def __init__(self, width: int = 32, heads: int = 4, latents: int = 6):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        """``[B, N, D] -> [B, latents, D]``."""
        queries = self.latents.expand(len(context), -1, -1)
        return self.norm(self.attention(queries, context, context, need_weights=False)[0])


def jacobian_penalty(block: nn.Module, context: Tensor, projections: int = 1) -> Tensor:
    """An unbiased estimate of the Jacobian's mean squared Frobenius norm, from random output directions."""
    context = context.detach().requires_grad_()
    with dvf.second_order(block):
        out = block(context)
    total = out.new_zeros(())
    for _ in range(projections):
        direction = torch.randn_like(out)
        direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1)
        (grad,) = torch.autograd.grad(out, context, direction, create_graph=True)
        total = total + out[0].numel() * grad.square().flatten(1).sum(1).mean()
    return total / projections


def main() -> None:
    torch.manual_seed(0)
    block, context = CrossAttention(), torch.randn(8, 16, 32)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    for step in range(8):
        penalty = jacobian_penalty(block, context)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        print(f"step {step}  squared Jacobian norm {penalty.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
