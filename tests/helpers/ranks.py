"""Programs for two gloo processes, and how a test runs one: ``python tests/ranks.py NAME ...`` under torchrun.

Each compares DDP's or FSDP2's gradients with those of one process on the joint batch, on every rank, and
exits with an error where they differ.
"""

import copy
import gc
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))  # a rank is no pytest

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError
from tests.helpers.vits import diverse_vit, images_for, timm_vit

WORLD = 2


def run(*names: str) -> None:
    """Run programs on two ranks, one after the other.

    Raises:
        AssertionError: a rank failed; what it said.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORLD),
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, __file__, *names],
        capture_output=True,
        text=True,
        timeout=300,
        env={**env, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        assert done.stdout.count(f"{name}: right") == WORLD, done.stdout


def average_vit() -> nn.Module:
    return timm_vit(global_pool="avg", class_token=False)


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = images_for(model, batch=4)
    return images, torch.arange(4) % 2


def mine(x: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return x.chunk(WORLD)[dist.get_rank()]


def loss_of(model, diversity, images, labels) -> Tensor:
    with diversity:
        logits = model(images)
    return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)


def expected(model: nn.Module, **options) -> list[Tensor]:
    """Gradients of one process on the joint batch."""
    model = copy.deepcopy(model)
    images, labels = batch(model)
    loss_of(model, dvf.HeadDiversity(model, **options), images, labels).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def check(model: nn.Module, expect: list[Tensor]) -> None:
    assert max(e.abs().max() for e in expect) > 1e-3
    for (name, p), e in zip(model.named_parameters(), expect, strict=True):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(
            grad, e, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = [
    (make, {"layers": layers, "wrt": wrt})
    for make in (average_vit, diverse_vit)
    for layers in ("last", "all")
    for wrt in ("input", "output")
]


def ddp() -> None:
    for make, options in CASES:
        model = make()
        expect = expected(model, **options)
        images, labels = batch(model)
        unused = {"find_unused_parameters": True}
        for extra in ({}, unused, {"gradient_as_bucket_view": True}):
            whole = nn.parallel.DistributedDataParallel(copy.deepcopy(model), **extra)
            for given in (whole, whole.module):
                whole.zero_grad()
                diversity = dvf.HeadDiversity(given, **options)
                loss_of(whole, diversity, mine(images), mine(labels)).backward()
                check(whole.module, expect)


def ddp_accumulation() -> None:
    model = average_vit()
    expect = expected(model)
    images, labels = batch(model)
    whole = nn.parallel.DistributedDataParallel(model)
    diversity = dvf.HeadDiversity(whole)
    first, second = zip(mine(images).split(1), mine(labels).split(1), strict=True)
    with whole.no_sync():
        (loss_of(whole, diversity, *first) / 2).backward()
    (loss_of(whole, diversity, *second) / 2).backward()
    check(whole.module, expect)


def ddp_two_passes() -> None:
    """DDP averages the gradients of one backward pass; what only asks for gradients is none of them."""
    plain = average_vit()
    expect = expected(plain)
    images, labels = map(mine, batch(plain))

    def parts(whole: nn.Module, given: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        x, diversity = images.clone().requires_grad_(), dvf.HeadDiversity(given)
        with diversity:
            logits = whole(x)
        return F.cross_entropy(logits, labels), 100 * diversity.penalty(logits), x

    def in_ddp() -> nn.Module:
        return nn.parallel.DistributedDataParallel(copy.deepcopy(plain))

    for order in (1, -1):
        for inside in (False, True):
            whole = in_ddp()
            first, second = parts(whole, whole.module if inside else whole)[:2][::order]
            first.backward(retain_graph=True)
            with pytest.raises(UnsupportedError, match="two backward passes"):
                second.backward()

    whole = in_ddp()
    weight = whole.module.blocks[0].attn.qkv.weight
    loss, penalty, x = parts(whole, whole)
    for asked in (loss, penalty):
        torch.autograd.grad(asked, (x, weight), retain_graph=True)
        asked.backward(inputs=[x], retain_graph=True)
    (loss + penalty).backward()
    check(whole.module, expect)

    whole.zero_grad()
    with whole.no_sync():
        loss, penalty, _ = parts(whole, whole.module)
    loss.backward(retain_graph=True)
    penalty.backward()
    for p in whole.parameters():
        dist.all_reduce(p.grad)
        p.grad /= WORLD
    check(whole.module, expect)


def ddp_static_graph() -> None:
    model = average_vit()
    images, labels = batch(model)
    whole = nn.parallel.DistributedDataParallel(model, static_graph=True)
    with pytest.raises(UnsupportedError, match="static_graph=False"):
        dvf.HeadDiversity(whole)
    with pytest.raises(UnsupportedError, match="static_graph=False"):
        loss_of(whole, dvf.HeadDiversity(whole.module), images, labels)


def ddp_called_past() -> None:
    """Evaluation past DDP is nobody's harm; a training forward is."""
    model = average_vit()
    images, labels = batch(model)
    whole = nn.parallel.DistributedDataParallel(model)
    diversity = dvf.HeadDiversity(whole)
    with pytest.raises(UnsupportedError, match="called past it"):
        loss_of(whole.module, diversity, images, labels)
    with torch.no_grad(), diversity:
        whole.module(images)
    loss_of(whole, diversity, images, labels).backward()
    loss_of(whole.module, dvf.HeadDiversity(whole.module), images, labels).backward()


def fsdp2() -> None:
    for make, options in CASES:
        for reshard in (True, False):
            model = make()
            check_sharded(model, expected(model, **options), reshard, **options)


def hsdp() -> None:
    """Replicas of one process, and one replica of all; ``tests/docs/test_multinode.py`` has two by two."""
    from torch.distributed.device_mesh import init_device_mesh

    for sizes in ((WORLD, 1), (1, WORLD)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
        for layers in ("last", "all"):
            model = average_vit()
            expect = expected(model, layers=layers)
            check_sharded(model, expect, True, mesh, layers=layers)


def forwards_checkpointed(model: nn.Module) -> None:
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def calls_checkpointed(model: nn.Module) -> None:
    """By timm's own switch, so that a block's hooks, which gather its parameters, are run again too."""
    model.train().set_grad_checkpointing()


CHECKPOINTED = [
    (make, switch, options)
    for make, options in CASES
    for switch in (forwards_checkpointed, calls_checkpointed)
    if make is average_vit or switch is forwards_checkpointed
]


def ddp_checkpointed() -> None:
    for make, switch, options in CHECKPOINTED:
        model = make()
        expect = expected(model, **options)
        switch(model)
        images, labels = batch(model)
        whole = nn.parallel.DistributedDataParallel(model)
        diversity = dvf.HeadDiversity(whole, **options)
        for _ in range(2):
            whole.zero_grad()
            loss_of(whole, diversity, mine(images), mine(labels)).backward()
            check(model, expect)


def fsdp2_checkpointed() -> None:
    for make, switch, options in CHECKPOINTED:
        for reshard in (True, False):
            model = make()
            expect = expected(model, **options)
            switch(model)
            check_sharded(model, expect, reshard, **options)


def r1_loss(model: nn.Module, images: Tensor, sharded: nn.Module | None = None) -> Tensor:
    """A critic's loss with R1; ``sharded``: a module that has to keep its gathered parameters for it."""
    images = images.detach().requires_grad_()
    with dvf.second_order():
        scores = model(images)
    if sharded is not None:
        sharded.set_reshard_after_backward(False)
    (grad,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    if sharded is not None:
        sharded.set_reshard_after_backward(True)
    return scores.mean() + 10 * grad.square().flatten(1).sum(1).mean()


def expected_r1(model: nn.Module) -> list[Tensor]:
    model = copy.deepcopy(model)
    r1_loss(model, batch(model)[0]).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def ddp_gradient_penalty() -> None:
    for switch in (lambda _: None, calls_checkpointed):
        model = average_vit()
        expect = expected_r1(model)
        switch(model)
        whole = nn.parallel.DistributedDataParallel(model)
        r1_loss(whole, mine(batch(model)[0])).backward()
        check(model, expect)


def fsdp2_gradient_penalty() -> None:
    from torch.distributed.fsdp import fully_shard

    for switch in (lambda _: None, calls_checkpointed):
        model = average_vit()
        expect = expected_r1(model)
        switch(model)
        for module in (*model.blocks, model):
            fully_shard(module)
        r1_loss(model, mine(batch(model)[0]), model).backward()
        check(model, expect)


def check_sharded(
    model: nn.Module, expect: list[Tensor], reshard: bool, mesh: Any = None, **options
) -> None:
    """Shard ``model``, block by block, and take two steps that change nothing."""
    from torch.distributed.fsdp import fully_shard

    images, labels = batch(model)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    diversity = dvf.HeadDiversity(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        loss = loss_of(model, diversity, mine(images), mine(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        check(model, expect)


def fsdp2_two_passes() -> None:
    """The penalty's first, which frees nothing that the loss does not gather again; the loss's frees too much."""
    model = average_vit()
    images, labels = map(mine, batch(model))
    for options in ({"wrt": "input"}, {"wrt": "output", "layers": "all"}):
        model = average_vit()
        expect = expected(model, **options)
        check_sharded(model, expect, True, **options)
        for order in (-1, 1):
            model.zero_grad()
            diversity = dvf.HeadDiversity(model, **options)
            with diversity:
                logits = model(images)
            parts = F.cross_entropy(logits, labels), 100 * diversity.penalty(logits)
            first, second = parts[::order]
            first.backward(retain_graph=True)
            if order < 0:
                second.backward()
                check(model, expect)
            else:
                with pytest.raises(UnsupportedError, match="FSDP2 freed parameters"):
                    second.backward()
        model.zero_grad()
        loss_of(model, diversity, images, labels).backward()
        check(model, expect)


def fsdp2_without_a_root() -> None:
    from torch.distributed.fsdp import fully_shard

    model = average_vit()
    for block in model.blocks:
        fully_shard(block)
    with pytest.raises(UnsupportedError, match=r"call fully_shard\(model\) last"):
        loss_of(model, dvf.HeadDiversity(model), *batch(model))


def refused_on_ranks() -> None:
    """What is not made for wrapped models says so before it computes anything."""
    from torch.distributed.fsdp import fully_shard

    def sharded() -> nn.Module:
        model = average_vit()
        for module in (*model.blocks, model):
            fully_shard(module)
        return model

    def in_ddp() -> nn.Module:
        return nn.parallel.DistributedDataParallel(average_vit())

    traced = torch.__version__ >= (2, 14)
    refused = "cannot be one graph" if traced else "needs PyTorch 2.14"
    for wrapped, pruned, known in (
        (in_ddp, "prune the model first, then wrap it", r"pass its \.module"),
        (sharded, "a weight of it is sharded", "pass it as it was before"),
    ):
        model = wrapped()
        loss = partial(loss_of, model, dvf.HeadDiversity(model))
        with pytest.raises(UnsupportedError, match=f"compile_loss: {refused}"):
            dvf.compile_loss(loss, backend="aot_eager")(*map(mine, batch(average_vit())))
        with pytest.raises(UnsupportedError, match=pruned):
            dvf.prune_heads(wrapped(), {2: [0]})
        with pytest.raises(UnsupportedError, match=known):
            dvf.cost(wrapped(), batch=2)


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(UnsupportedError, match="fully_shard"):
        dvf.HeadDiversity(FullyShardedDataParallel(average_vit(), device_id=torch.device("cpu")))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for program in sys.argv[1:]:
        globals()[program]()
        print(f"{program}: right", flush=True)
    gc.collect()  # else what FSDP2 sharded keeps gloo's threads beyond the interpreter's end, which aborts
    dist.destroy_process_group()
