"""What ``capture_heads(maps=)`` costs: memory of the rows asked for, and no waiting for a GPU."""

import torch

import diversevit_fast as dvf
from tests.attachment.test_attention_maps import Grouped
from tests.helpers.fake_gpu import json_from_fake_gpu


def test_one_row_takes_no_memory_of_all_pairs():
    """No tensor that is made or saved on the way has N x N elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, tokens, largest = Grouped(), 512, 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [
                x
                for x in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(x, torch.Tensor)
            ]
            largest = max([largest, *(x.numel() for x in made)])
            return out

    x = torch.randn(1, tokens, 16, requires_grad=True)
    with Sizes(), dvf.second_order(), dvf.capture_heads(model, maps=[3, 7]) as heads:
        out = model(x)
        (grad,) = torch.autograd.grad(
            out.sum() + heads.maps[0].square().sum(), x, create_graph=True
        )
        grad.square().sum().backward()
    assert largest < tokens * tokens


def test_on_a_gpu_nothing_is_waited_for():
    """And steps are captured and replayed as CUDA graphs, whichever queries are chosen."""
    found = json_from_fake_gpu(
        """
import json, torch, diversevit_fast as dvf
from benchmarks.fake_gpu.counters import counting
from diversevit_fast.models import DiverseViT

model = DiverseViT(image_size=(16, 8), dim=16, depth=2, num_heads=2, head_dim=8, mlp_dim=24).cuda()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
images, found = torch.zeros(2, 3, 16, 8, device="cuda"), []
for maps in ("class", [3, 0, 1], [1, 2], "all"):
    heads = dvf.capture_heads(model, maps=maps)

    def loss(images):
        with heads:
            logits = model(images)
        return logits.sum() + heads.maps[-1].sum()

    loss(images).backward()
    with counting() as eager:
        loss(images).backward()
    step = dvf.graph_step(loss, optimizer)
    with counting() as graphs:
        for _ in range(6):
            step(images)
    found.append([eager["waits"], graphs["replays"] > 0, graphs["refused"]])
print(json.dumps(found))
"""
    )
    assert found == [[0, True, 0]] * 4
