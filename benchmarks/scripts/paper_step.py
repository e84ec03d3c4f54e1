"""Measure what the penalty costs in the paper's own setting: one optimizer step, against the ERM step.

``python -m benchmarks.scripts.paper_step`` prints the table and stores it in ``benchmarks/results``. Each
implementation trains a DiverseViT of its own from the same weights (published sizes, batch 80, float32) with Adam:

* ``erm``: no penalty.
* ``stock erm``: no penalty, PyTorch's own attention, LayerNorm and GELU.
* ``ours``: ``HeadDiversity``, one backward pass for all heads, last block for the class token.
* ``published loop``: one backward pass per head through PyTorch's unfused attention.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.steps import STEPS, LossOf
from benchmarks.timing import conditions, interleaved, summary, write
from diversevit_fast.models import DiverseViT


def optimizer_step(loss_of: LossOf, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a training step of a new model, which returns its loss."""
    torch.manual_seed(0)
    model = DiverseViT()
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-4), loss_of(model)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(images, labels)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def steps(batch: int) -> dict[str, Callable[[], Tensor]]:
    """Return a training step of each implementation, on the same images."""
    images, labels = torch.rand(batch, 3, 64, 32), torch.arange(batch) % 2
    return {
        name: optimizer_step(loss_of, images, labels)
        for name, (loss_of, _) in STEPS["paper step"].items()
    }


def measure(batch: int = 80, rounds: int = 9) -> dict[str, object]:
    """Check that ours and the loop have the same loss, then time all implementations."""
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
