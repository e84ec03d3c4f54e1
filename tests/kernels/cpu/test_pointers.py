"""Operators say so if memory that a graph needs was freed, where kernels would read what is not there."""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_kernels.cpu.runtime.pointers import pointers


def attention(q):
    return dvf.attention(q, q.detach(), q.detach())


def norm(weight):
    return dvf.layer_norm(torch.arange(32.0).view(4, 8), 8, weight)


def penalty(weight):
    return dvf.routed_head_penalty(torch.ones(2, 3, 3, 2, 4), weight)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(attention, (1, 2, 5, 8)), (dvf.gelu, (4, 8)), (norm, (8,)), (penalty, (3, 2, 4, 8))],
    ids=("attention", "gelu", "layer_norm", "routed_head_penalty"),
)
def test_freed_memory_is_noticed(function, shape):
    x = torch.randn(shape, requires_grad=True)
    out = function(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"was freed|not allocated"):
        out.sum().backward()


def test_tensors_without_elements_have_no_address():
    x = torch.ones(3)
    assert pointers({"x": x, "empty": torch.empty(0, 3)}) == {"x": x.data_ptr(), "empty": 0}
