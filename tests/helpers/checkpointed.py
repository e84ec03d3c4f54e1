"""A small model whose blocks checkpoints may run, and its gradients with and without them."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast._torch_internals import function_modes
from diversevit_fast.attachment.torch_calls import open_attachments
from tests.helpers.vits import assert_same, gradients


class Attention(nn.Module):
    """Attention of 8 features with 2 heads."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Returns a tuple, takes a keyword, and does what ``extra`` adds."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8), Attention(), nn.Linear(8, 8)
        self.extra = lambda x: x

    def forward(self, x, *, scale):
        x = x + scale * self.attn(self.norm(x))
        x = self.extra(x + F.gelu(self.mlp(x)))
        return x, x.mean(1)


class Model(nn.Module):
    """Blocks run by checkpoints if ``checkpoints``; the logits read both results of each."""

    def __init__(self, blocks=3, shared=False):
        super().__init__()
        torch.manual_seed(0)
        made = [Block() for _ in range(blocks)]
        self.blocks = nn.ModuleList(made)
        self.order = [*made, made[-1]] if shared else made
        self.scale, self.head = nn.Parameter(torch.tensor(0.7)), nn.Linear(8, 3)
        self.checkpoints = False
        self.double()

    def forward(self, x):
        means = []
        for block in self.order:
            if self.checkpoints:
                x, mean = checkpoint(block, x, scale=self.scale, use_reentrant=False)
            else:
                x, mean = block(x, scale=self.scale)
            means.append(mean)
        return self.head(sum(means))


class Returns(Block):
    """Returns what ``returned`` makes of itself, its input and its output."""

    returned = staticmethod(lambda block, x, y: y)

    def forward(self, x, *, scale):
        return self.returned(self, x, super().forward(x, scale=scale)[0])


class Returning(Model):
    """Goes on with the tensors and their mean that ``take`` finds in what blocks return."""

    def __init__(self, returned, take):
        super().__init__()
        for block in self.blocks:
            block.__class__, block.returned = Returns, returned
            block.temperature = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.take = take

    def forward(self, x):
        means = []
        for block in self.blocks:
            if self.checkpoints:
                made = checkpoint(block, x, scale=self.scale, use_reentrant=False)
            else:
                made = block(x, scale=self.scale)
            x = self.take(made)
            means.append(x.mean(1))
        return self.head(sum(means))


class Puts(Block):
    """Puts its mean into an argument."""

    def forward(self, x, seen):
        x, mean = super().forward(x, scale=0.7)
        seen.append(mean)
        return x


class Listing(Model):
    """The logits read what blocks put into one ``container``."""

    def __init__(self, container):
        super().__init__()
        self.container = container
        for block in self.blocks:
            block.__class__ = Puts

    def forward(self, x):
        seen = self.container()
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpoints else block
            x = run(x, seen)
        return self.head(sum(seen[:3]))


TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logits_and_loss(model, x=TOKENS, **options):
    diversity = dvf.HeadDiversity(model, **{"layers": "all", **options})
    with diversity:
        logits = model(x)
    kept = getattr(model, "kept", torch.zeros(()))
    loss = (
        kept.sum()
        + F.cross_entropy(logits, torch.arange(len(x)) % 2)
        + 10 * diversity.penalty(logits)
    )
    return logits, loss


def nodes_of(logits):
    """How many blocks were run apart."""
    queue = [logits.grad_fn]
    seen = set(queue)
    for node in queue:
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        queue += new
    return sum(node.name() == "_NodeBackward" for node in seen)


def assert_as_without(model, apart=None, ask=gradients, x=TOKENS, **options):
    """What ``ask(model, loss)`` returns is the same with and without checkpoints; ``apart`` blocks run apart."""
    model.checkpoints = False
    logits, loss = logits_and_loss(model, x, **options)
    assert nodes_of(logits) == 0
    wanted = ask(model, loss)
    model.checkpoints = True
    logits, loss = logits_and_loss(model, x, **options)
    if apart is not None:
        assert nodes_of(logits) == apart
    assert_same(ask(model, loss), wanted)
    assert not open_attachments()
    assert not function_modes()
