"""Energy and forces: a small all-to-all attention potential, trained on forces, which are its gradient.

positions -> energy -> forces = -d energy / d positions -> a loss on the forces, so its gradient is of second order. The
attention mask is a smooth function of the distances, so it has a gradient too.

python examples/second_order/forces.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diversevit_fast as dvf


class Potential(nn.Module):
    """Energy of atoms: embedded species, and attention in which near atoms weigh more."""

    def __init__(self, species: int = 4, width: int = 32, heads: int = 4, reach: float = 5.0):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.embed = nn.Embedding(species, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))
        self.falloff = nn.Parameter(torch.linspace(0.5, 2.0, heads))

    def forward(self, species: Tensor, positions: Tensor) -> Tensor:
        """Species ``[B, N]`` (whole numbers) and positions ``[B, N, 3]`` -> energies ``[B]``."""
        x = self.embed(species)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        squared = (positions[:, :, None] - positions[:, None]).square().sum(-1)
        decay = F.softplus(self.falloff)[:, None, None] * squared[:, None] / self.reach**2
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=-decay)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return self.mlp(x).sum((1, 2))


def energy_and_forces(
    model: nn.Module, species: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Energies ``[B]`` and forces ``[B, N, 3]``, both differentiable by the parameters."""
    positions = positions.detach().requires_grad_()
    with dvf.second_order(model):
        energy = model(species, positions)
    (grad,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    return energy, -grad


def loss(model: nn.Module, species: Tensor, positions: Tensor, energy: Tensor, forces: Tensor):
    """The squared errors of energy per atom and of forces."""
    ours, grad = energy_and_forces(model, species, positions)
    return F.mse_loss(ours, energy) / species.shape[1] + F.mse_loss(grad, forces)


def harmonic(positions: Tensor) -> tuple[Tensor, Tensor]:
    """What the potential learns here: each pair is a spring of rest length 0."""
    centred = positions - positions.mean(1, keepdim=True)
    return 0.05 * centred.square().sum((1, 2)), -0.1 * centred


def main() -> None:
    torch.manual_seed(0)
    model = Potential()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    species, positions = torch.randint(4, (8, 12)), 2 * torch.randn(8, 12, 3)
    for step in range(8):
        value = loss(model, species, positions, *harmonic(positions))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        print(f"step {step}  loss {value.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
