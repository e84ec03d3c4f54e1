"""A training step with the penalty, captured as a CUDA graph."""

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize(
    "options", [{}, {"layers": "all"}, {"every": 2}, {"fraction": 0.5}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
def test_graph_step_is_the_loop_of_plain_steps(options, fused):
    """From the first step on, with dropout and a schedule; CPU generators draw what they would draw plainly."""

    def trained(graphs):
        torch.manual_seed(0)
        model = DiverseViT(dim=32, depth=2, num_heads=2, head_dim=16, mlp_dim=32).cuda()
        draws = {"generator": torch.Generator().manual_seed(1)} if "fraction" in options else {}
        diversity = dvf.HeadDiversity(model, **options, **draws)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)

        def loss(images):
            with diversity:
                logits = model(nn.functional.dropout(images, 0.1))
            return logits.square().mean() + diversity.penalty(logits)

        step = dvf.graph_step(loss, optimizer, diversity=diversity, clip=1.0)
        losses = []
        for i in range(6):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + i)
            images = torch.rand(4, 3, 64, 32, generator=torch.Generator().manual_seed(i))
            if graphs:
                losses.append(step(images))
                continue
            optimizer.zero_grad()
            value = loss(images.cuda())
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(value.detach())
        assert not graphs or step.graphs == (2 if "every" in options else 1)
        return torch.stack(losses), [p.detach() for p in model.parameters()]

    (ours, weights), (theirs, wanted) = trained(True), trained(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for mine, other in zip(weights, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
