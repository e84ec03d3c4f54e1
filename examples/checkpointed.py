"""Blocks checkpointed to save memory, the regularised one too, or those below it compiled to save time.

python examples/checkpointed.py
python examples/checkpointed.py --compile-below
"""

import argparse

import tiny
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader

import diversevit_fast as dvf


def checkpoint_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Recompute ``blocks`` in backward; parameters keep their names in ``state_dict``.

    The switches of timm (``model.set_grad_checkpointing()``) and transformers (``gradient_checkpointing_enable()``) do
    the same; ``torch.utils.checkpoint`` needs ``use_reentrant=False``.
    """

    def wrap(module: nn.Module) -> nn.Module:
        return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.NO_REENTRANT)

    apply_activation_checkpointing(model, wrap, lambda module: module in blocks)


def compile_below(blocks: list[nn.Module], backend: str = "inductor") -> None:
    """Compile each of ``blocks`` in place."""
    for block in blocks:
        block.compile(backend=backend)


def train(model: nn.Module, loader: DataLoader, *, weight: float = 10.0) -> None:
    device = next(model.parameters()).device
    diversity = dvf.HeadDiversity(model, layers="last")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (images, labels) in enumerate(loader):
        with diversity:
            logits = model(images.to(device))
        loss = F.cross_entropy(logits, labels.to(device))
        penalty = diversity.penalty(logits)
        (loss + weight * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tiny.report(step, loss.detach(), penalty.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile-below", action="store_true", help="instead of checkpoints")
    parser.add_argument("--backend", default="inductor", help="aot_eager: no code is generated")
    options = parser.parse_args()
    model = tiny.vit().to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = list(model.blocks)
    if options.compile_below:
        compile_below(blocks[:-1], options.backend)  # the last block is differentiated twice
    else:
        checkpoint_blocks(model, blocks)
    train(model, DataLoader(tiny.dataset(), batch_size=8))


if __name__ == "__main__":
    main()
