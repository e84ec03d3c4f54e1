"""A training step with the penalty, captured as a CUDA graph."""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.models import DiverseViT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a GPU")


def captured(job):
    """Return a graph of ``job`` and its results, which each replay overwrites; warmed up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = job()
    return graph, results


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_step_replayed_has_the_same_bits(layers):
    torch.manual_seed(0)
    model = DiverseViT(dim=32, depth=2, num_heads=2, head_dim=16, mlp_dim=32).cuda()
    images = torch.rand(4, 3, 64, 32, device="cuda")

    def step():
        diversity = dvf.HeadDiversity(model, layers=layers)
        with diversity:
            logits = model(images)
        loss = logits.square().mean() + diversity.penalty(logits)
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    graph, results = captured(step)
    images.copy_(torch.rand_like(images))
    graph.replay()
    for replayed, wanted in zip(results, step(), strict=True):
        assert (replayed is None) == (wanted is None)
        assert wanted is None or torch.equal(replayed, wanted)
