"""What the penalty costs in the paper's own setting: one training step, against the ERM step.

``python -m benchmarks.scripts.paper_step`` prints the table and stores it in ``benchmarks/results``. All steps
train the same DiverseViT (published sizes, batch 80, float32) with Adam. Providers:

* ``erm``: no penalty.
* ``stock erm``: no penalty, PyTorch's own attention, LayerNorm and GELU.
* ``ours``: ``HeadDiversity``, one backward pass for all heads, last block for the class token.
* ``published loop``: one backward pass per head through PyTorch's unfused attention.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import diversevit_fast as dvf
from benchmarks.timing import conditions, interleaved, summary, write
from diversevit_fast.models import DiverseViT


class Stock(torch.overrides.TorchFunctionMode):
    """Our operators replaced by PyTorch's; attention unfused, the only one with a double backward."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        swap = {dvf.layer_norm: F.layer_norm, dvf.gelu: F.gelu}
        if func is dvf.attention:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(*args[:3])
        if func is dvf.gelu:
            return F.gelu(args[0], approximate=kwargs.get("approximate", "none"))
        return swap.get(func, func)(*args, **kwargs)


def published_penalty(model: DiverseViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the penalty, by one backward pass per head with the other heads masked."""
    attention: Any = model.blocks[-1].attn
    seen: dict[str, Tensor] = {}
    handle = attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with Stock(), dvf.capture_heads(model, layers="last") as heads:
        logits = model(images)
    handle.remove()
    (g,) = torch.autograd.grad(logits.max(-1).values.sum(), heads[0], create_graph=True)
    masks = torch.eye(g.shape[1])[:, None, :, None, None]
    u = torch.stack(
        [torch.autograd.grad(heads[0], seen["x"], g * m, create_graph=True)[0] for m in masks], 2
    )
    unit = F.normalize(u, dim=-1, eps=1e-12)
    return logits, ((unit @ unit.mT) * (1 - torch.eye(len(masks)))).square().mean()


def steps(batch: int) -> dict[str, Callable[[], Tensor]]:
    """A training step of each provider on a model of its own; each returns its loss."""
    images, labels = torch.rand(batch, 3, 64, 32), torch.arange(batch) % 2

    def step_of(loss_of: Callable[[DiverseViT], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        torch.manual_seed(0)
        model = DiverseViT()
        optimizer, loss_of_batch = torch.optim.Adam(model.parameters(), lr=1e-4), loss_of(model)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of_batch()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def erm(model: DiverseViT) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(images), labels)

    def stock(model: DiverseViT) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with FusedStock():
                return F.cross_entropy(model(images), labels)

        return loss

    def ours(model: DiverseViT) -> Callable[[], Tensor]:
        diversity = dvf.HeadDiversity(model)

        def loss() -> Tensor:
            with diversity:
                logits = model(images)
            return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)

        return loss

    def loop(model: DiverseViT) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            logits, penalty = published_penalty(model, images)
            return F.cross_entropy(logits, labels) + 100 * penalty

        return loss

    return {
        "erm": step_of(erm),
        "stock erm": step_of(stock),
        "ours": step_of(ours),
        "published loop": step_of(loop),
    }


class FusedStock(Stock):
    """PyTorch's operators with its fused attention: what plain training uses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is dvf.attention:
            return F.scaled_dot_product_attention(*args[:3])
        return super().__torch_function__(func, types, args, kwargs)


def measure(batch: int = 80, rounds: int = 9) -> dict[str, object]:
    """Check that ours and the loop have the same loss, then time all providers."""
    jobs = steps(batch)
    torch.testing.assert_close(jobs["ours"](), jobs["published loop"](), rtol=1e-4, atol=1e-5)
    return {
        "what": f"one training step of DiverseViT (published sizes), batch {batch}, float32",
        "conditions": conditions(),
        "rounds": rounds,
        "rows": summary(interleaved(jobs, rounds), "erm"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    result = measure(options.batch, options.rounds)
    print(result["what"])
    print(result["conditions"])
    for name, row in result["rows"].items():  # pyright: ignore[reportAttributeAccessIssue]
        print(f"{name:16} {row['median_ms']:9.1f} ms   {row['ratio']:.2f} x erm")
    print(write("paper_step", result))


if __name__ == "__main__":
    main()
