"""The loss's curvature: Hessian-vector products, the trace (Hutchinson) and the largest eigenvalue of a ViT.

python examples/second_order/curvature.py
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import diversevit_fast as dvf

Product = Callable[[Tensor], Tensor]


def hessian_product(model: nn.Module, loss_of: Callable[[], Tensor]) -> Product:
    """The function v -> H v, where H is the Hessian of ``loss_of()`` by the parameters, joined to one vector.

    The gradient's graph is kept: each product costs one backward pass through it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with dvf.second_order(model):
        loss = loss_of()
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in grads])

    def product(v: Tensor) -> Tensor:
        rows = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        return torch.cat([row.flatten() for row in rows])

    return product


def hutchinson_trace(
    product: Product, size: int, samples: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[float, float]:
    """The mean of v . H v over random signs v, an unbiased estimate of the trace, and its standard error."""
    values = []
    for _ in range(samples):
        signs = torch.randint(2, (size,), generator=generator).to(dtype) * 2 - 1
        values.append(torch.dot(signs, product(signs)))
    estimates = torch.stack(values)
    return estimates.mean().item(), (estimates.std() / samples**0.5).item()


def top_eigenvalue(
    product: Product, start: Tensor, iterations: int = 100, tolerance: float = 1e-4
) -> float:
    """The eigenvalue of H of largest magnitude, by power iteration from ``start``."""
    v, value = start / start.norm(), float("nan")
    for _ in range(iterations):
        image = product(v)
        before, value = value, torch.dot(v, image).item()
        v = image / image.norm()
        if abs(value - before) < tolerance * abs(value):
            break
    return value


def main() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=4)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    product = hessian_product(model, lambda: F.cross_entropy(model(images), labels))
    size = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    trace, error = hutchinson_trace(product, size, 8, generator, torch.float32)
    print(f"trace {trace:.3f} +- {error:.3f}")
    print(f"largest eigenvalue {top_eigenvalue(product, torch.randn(size)):.3f}")


if __name__ == "__main__":
    main()
