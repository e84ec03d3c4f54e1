"""DistributedDataParallel: gloo on CPUs, nccl on GPUs.

torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py
"""

import os

import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import diversevit_fast as dvf


def train(
    model: nn.Module, loader: DataLoader, device: torch.device, *, weight: float = 10.0
) -> None:
    # The penalty is a mean over samples, so DDP's mean over ranks is that of the joint batch. One
    # backward a step: a backward each for loss and penalty loses gradients without a word.
    model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    diversity = dvf.HeadDiversity(model)
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
        means = torch.stack([loss.detach(), penalty.detach()]) / dist.get_world_size()
        dist.all_reduce(means)
        if dist.get_rank() == 0:
            tiny.report(step, *means)


def main() -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    data = tiny.dataset()
    loader = DataLoader(
        data, batch_size=8 // dist.get_world_size(), sampler=DistributedSampler(data, shuffle=False)
    )
    train(tiny.vit().to(device), loader, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
