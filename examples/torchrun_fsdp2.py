"""FSDP2 (``fully_shard``), every block a shard: gloo on CPUs, nccl on GPUs.

torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py
"""

import gc
import os

import tiny
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import diversevit_fast as dvf


def shard(model: VisionTransformer, device: torch.device) -> None:
    """Spread each block's parameters over the ranks, and those of the rest, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(
    model: nn.Module, loader: DataLoader, device: torch.device, *, weight: float = 10.0
) -> None:
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
    model = tiny.vit().to(device)
    shard(model, device)
    train(model, loader, device)
    del model
    gc.collect()  # what is sharded keeps gloo's threads, which may abort the process at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
