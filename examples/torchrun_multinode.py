"""FSDP2 on several machines, with checkpoints from which it goes on by itself: gloo on CPUs, nccl on GPUs.

Parameters are spread over the processes of a machine and replicated between machines (HSDP), so that what is
gathered never crosses the network; ``--shard all`` spreads them over all processes. On one machine:

torchrun --standalone --nproc-per-node 2 examples/torchrun_multinode.py --checkpoints run

On several, the same command on each, with one folder that all of them see: docs/training.md.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import diversevit_fast as dvf

EVERY = 2
"""Steps from one checkpoint to the next: here few, in a training some minutes' worth."""


def shard(model: VisionTransformer, device: torch.device, over: str) -> None:
    """Spread each block's parameters over a machine's processes, or over all, in place."""
    machine, world = int(os.environ["LOCAL_WORLD_SIZE"]), dist.get_world_size()
    if over == "machine":  # torchrun numbers the processes machine by machine
        sizes, names = (world // machine, machine), ("replicate", "shard")
    else:
        sizes, names = (world,), ("shard",)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, every process its share; it is whole when its index is there, which comes last."""
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / f"step-{step:06d}")


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last whole checkpoint, of any number of processes; return how many steps it had taken.

    PyTorch unpickles parts of it: go on from your own only.
    """
    whole = [int(index.parent.name[5:]) for index in folder.glob("step-*/.metadata")]
    last: list[Any] = [max(whole, default=0)]
    dist.broadcast_object_list(last)  # what rank 0 sees, all take
    if last[0]:
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=folder / f"step-{last[0]:06d}")
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return last[0]


def train(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    folder: Path | None,
    *,
    weight: float = 10.0,
) -> None:
    diversity = dvf.HeadDiversity(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    done = resume(folder, model, optimizer) if folder else 0
    diversity.step = done  # for ``every``
    for step, (images, labels) in enumerate(loader):
        if step < done:
            continue
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
        if folder and (step + 1) % EVERY == 0:
            save(folder, step + 1, model, optimizer)


def run(device: torch.device, over: str, folder: Path | None) -> nn.Module:
    """Train, or go on with a training; return the sharded model."""
    data = tiny.dataset()
    sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=8 // dist.get_world_size(), sampler=sampler)
    model = tiny.vit().to(device)
    shard(model, device, over)
    train(model, loader, device, folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", choices=("machine", "all"), default="machine")
    parser.add_argument("--checkpoints", type=Path, help="a folder that all machines see")
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run(device, options.shard, options.checkpoints)
    gc.collect()  # what is sharded keeps gloo's threads, which may abort the process at its end
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
