"""The messages that docs/faq.md explains are, word for word, what is raised."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.attachment.parallel import OneBackwardPass
from tests.helpers.pages import blocks

timm = pytest.importorskip("timm")

MESSAGES = [block.strip() for block in blocks("docs/faq.md", "text")]
images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])


class Reentrant(nn.Module):
    """A block inside a reentrant checkpoint."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=True)


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=2, depth=2, embed_dim=48
    )


def penalty(model=None, x=images, logits=lambda logits, model: logits):
    """The penalty of a model, of what ``logits`` makes of its output."""
    model = vit() if model is None else model
    diversity = dvf.HeadDiversity(model)
    with diversity:
        out = model(x)
    return diversity.penalty(logits(out, model)), out


def fused_attention():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    out = F.scaled_dot_product_attention(q, q, q)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    grad.sum().backward()


def backward_twice():
    value, logits = penalty()
    F.cross_entropy(logits, labels).backward()
    value.backward()


def compiled_double_backward():
    compiled = torch.compile(lambda x: (x * x * x).sum(), backend="aot_eager")
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    grad.sum().backward()


def without_grad():
    with torch.no_grad():
        penalty()


def reentrant():
    model = vit()
    model.blocks[1] = Reentrant(model.blocks[1])
    penalty(model)[0].backward()


def two_passes():
    model = vit()
    value, logits = penalty(model)
    OneBackwardPass(model).watch(logits, value)  # as under DDP with several ranks
    F.cross_entropy(logits, labels).backward(retain_graph=True)
    value.backward()


def third_derivative():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    value = dvf.attention(q, q, q).pow(3).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, q, create_graph=True)
        value = grad.sum()


RAISED: list[Callable[[], object]] = [
    fused_attention,
    backward_twice,
    compiled_double_backward,
    without_grad,
    lambda: penalty(logits=lambda _, model: model(images)),
    lambda: penalty(logits=lambda logits, _: logits[:1]),
    lambda: penalty(x=images * float("nan")),
    lambda: penalty(torch.compile(vit(), backend="eager")),
    reentrant,
    two_passes,
    lambda: dvf.HeadDiversity(nn.DataParallel(vit())),
    lambda: dvf.HeadDiversity(nn.Linear(2, 2)),
    third_derivative,
]
"""What raises each message, in the order of the page."""


def test_every_message_is_raised_here():
    assert len(MESSAGES) == len(RAISED)


@pytest.mark.parametrize(
    ("message", "job"), zip(MESSAGES, RAISED, strict=False), ids=range(len(RAISED))
)
def test_a_message_is_what_is_raised(message, job):
    with pytest.raises(
        (RuntimeError, ValueError)
    ) as raised:  # NotImplementedError is a RuntimeError
        job()
    said = str(raised.value)
    ours = isinstance(raised.value, (dvf.UsageError, dvf.UnsupportedError))
    assert said == message if ours else said.startswith(message)
