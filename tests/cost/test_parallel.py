"""What DDP, FSDP2 and HSDP send is what four gloo processes send, counted. Run as a script, this is a process."""

import gc
import json
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # a rank is no pytest

import diversevit_fast as dvf
from diversevit_fast.cost.parallel import (
    layout_of,
    padded,
    parallel_of,
    sending_seconds,
    traffic_of,
)
from tests.helpers.vits import images_for, timm_vit

KINDS = ("fsdp2:4", "fsdp2:4:keep", "hsdp:2x2", "hsdp:2x2:keep", "ddp:4")
CASES = {
    **{
        f"{kind} {layers}": (kind, layers, {}) for kind in KINDS for layers in (None, "last", "all")
    },
    "middle": ("fsdp2:4", [1], {}),
    "every": ("fsdp2:4", "last", {"every": 2}),
    "fraction": ("hsdp:2x2", "last", {"fraction": 0.5}),
    "frozen": ("hsdp:2x2", "all", {"frozen": "blocks.2"}),
    "checkpointed last": ("fsdp2:4", "last", {"checkpointed": True}),
    "checkpointed all": ("fsdp2:4", "all", {"checkpointed": True}),
    "buckets None": ("ddp:4", None, {"large": True}),
    "buckets all": ("ddp:4", "all", {"large": True}),
}
OPERATIONS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


def model_of(options) -> nn.Module:
    if options.get("large"):  # 50 MB of parameters: three of DDP's buckets
        return timm_vit(embed_dim=512, depth=4, num_heads=4).float()
    model = timm_vit(global_pool="avg", class_token=False)
    if name := options.get("frozen"):
        model.get_submodule(name).requires_grad_(False)
    if options.get("checkpointed"):
        model.train().set_grad_checkpointing()
    return model


def diversity_of(layers, options) -> dict | None:
    amortised = {name: options[name] for name in ("every", "fraction") if name in options}
    return None if layers is None else {"layers": layers, **amortised}


class Collectives(TorchDispatchMode):
    """Collective operations by name: how many, and the bytes of the whole tensor of each."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = OPERATIONS[func._schema.name.partition("::")[2]]
            tensors = [x for x in args[:2] if isinstance(x, torch.Tensor)] or args[0]
            self.calls[name] += 1
            self.bytes[name] += max(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


def distributed(model: nn.Module, kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wanted = parallel_of(kind)
    if wanted.kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    sizes = (wanted.replicas, wanted.shards) if wanted.kind == "hsdp" else (wanted.shards,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    reshard = {"reshard_after_forward": False} if wanted.keeps else {}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **reshard)
    return fully_shard(model, mesh=mesh, **reshard)


def counted(kind: str, layers, options) -> tuple[dict, dict]:
    """Collective operations and bytes of a step, after those in which DDP makes its buckets."""
    model = model_of(options)
    trained = distributed(model, kind)
    chosen = diversity_of(layers, options)
    diversity = None if chosen is None else dvf.HeadDiversity(trained, **chosen)
    steps = options.get("every", 1)
    images = images_for(model, batch=2).to(next(model.parameters()).dtype)
    for last in (False, True):
        found = Collectives()
        with found if last else nullcontext():
            for _ in range(2 if not last else steps):
                with diversity or nullcontext():
                    logits = trained(images)
                loss = F.cross_entropy(logits, torch.arange(2))
                if diversity is not None:
                    loss = loss + 100 * diversity.penalty(logits)
                loss.backward()
                for p in model.parameters():
                    p.grad = None
    return tuple({name: n / steps for name, n in c.items()} for c in (found.calls, found.bytes))


def main(path: str) -> None:
    dist.init_process_group("gloo")
    found = {name: counted(*case) for name, case in CASES.items()}
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    gc.collect()  # else what FSDP2 sharded keeps gloo's threads beyond the interpreter's end
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """What the first of four processes counted of every case, in one launch."""
    path = tmp_path_factory.mktemp("ranks") / "record.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", __file__, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_what_processes_send(name, record):
    kind, layers, options = CASES[name]
    calls, sizes = record[name]
    ranks = parallel_of(kind)
    chosen = diversity_of(layers, options)
    found = traffic_of(ranks, layout_of(model_of(options), chosen), options.get("every", 1))
    assert found.calls == calls != {}
    among, between = 1 - 1 / ranks.shards, 2 * (1 - 1 / ranks.replicas)
    rings = {"all-gather": among, "reduce-scatter": among, "all-reduce": between}
    assert found.sent == {name: rings[name] * size for name, size in sizes.items()}


def test_words():
    for text, wanted in {
        "ddp:8": ("ddp", 8, 1, False),
        "fsdp2:16": ("fsdp2", 1, 16, False),
        "fsdp2:16:keep": ("fsdp2", 1, 16, True),
        "hsdp:2x8": ("hsdp", 2, 8, False),
        "hsdp:2x8:keep": ("hsdp", 2, 8, True),
    }.items():
        assert parallel_of(text) == wanted
    for text in ("hsdp:8", "hsdp:0x8", "ddp:8:keep", "fsdp2:2x8", "hsdp:2x8:drop", 8):
        with pytest.raises(dvf.UsageError, match=r"parallel: expected ddp:N, fsdp2:N, or hsdp:RxS"):
            parallel_of(text)


def test_hsdp_gathers_inside_a_node():
    """Of 16 GPUs in two nodes only gradients cross the network, an eighth of them by each."""
    model = timm_vit(global_pool="avg", class_token=False)
    layout = layout_of(model, {"layers": "last"})
    hsdp, fsdp2 = parallel_of("hsdp:2x8"), parallel_of("fsdp2:16")
    sent = traffic_of(hsdp, layout, 1).sent
    near = sending_seconds(hsdp, sent, link=1e9, network=1e30)
    far = sending_seconds(hsdp, sent, link=1e30, network=1e9)
    assert near == pytest.approx((sent["all-gather"] + sent["reduce-scatter"]) / 1e9)
    assert far == pytest.approx(sent["all-reduce"] / 1e9)
    assert sent["all-reduce"] == layout.bytes(8, trained=True) / 8
    whole = traffic_of(fsdp2, layout, 1).sent
    assert sending_seconds(fsdp2, whole, 1e30, 1e9) == pytest.approx(sum(whole.values()) / 1e9)


def test_short_first_axes_are_filled_up():
    """A position embedding [1, N, D] is as large for each of the processes that share it."""
    model = timm_vit(global_pool="avg", class_token=False)
    layout = layout_of(model, None)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    assert layout.bytes(1) == size
    assert layout.bytes(16) >= size + 15 * model.pos_embed.nbytes
    assert layout.lowest is None
    with torch.device("meta"):
        vit_b = timm.create_model("vit_base_patch16_224")
    (embedding,) = (
        one for one in layout_of(vit_b, None).groups[-1] if one.rows == 1 and one.row_bytes > 1e5
    )
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text("utf-8")
    size = layout_of(vit_b, None).bytes(1)
    said = (
        f"{padded([embedding], 64) / 1e6:.0f} MB for a ViT-B on 64 shards, of {size / 1e6:.0f} MB"
    )
    assert said in page
    assert [layout_of(model, {"layers": x}).lowest for x in ("last", "all", [1, 2])] == [2, 0, 1]


def test_a_sharded_model_is_refused():
    """It says how many processes share it, and cost is told that in words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = timm_vit()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(dvf.UnsupportedError, match="sharded by fully_shard; pass it as it was"):
            dvf.cost(model, batch=2)
        del model
        gc.collect()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
