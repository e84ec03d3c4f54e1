"""The kernels can write the gradients of q, k and v into one tensor: the same bits as into three."""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.ops.attention_qkvpacked import taken_apart


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [5, 33])  # few queries; rows and columns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_three_tensors(dtype, tokens, causal, device):
    torch.manual_seed(0)
    data = torch.randn(2, tokens, 3, 2, 16, device=device).to(dtype)

    def to_second_order(apart):
        qkv = data.clone().requires_grad_()
        y = dvf.attention(*apart(qkv), is_causal=causal)
        (g,) = torch.autograd.grad(y.sin().sum(), qkv, create_graph=True)
        return y, g, torch.autograd.grad(g.square().sum(), qkv)[0]

    got = to_second_order(taken_apart)
    wanted = to_second_order(lambda qkv: qkv.permute(2, 0, 3, 1, 4).unbind())
    assert all(map(torch.equal, got, wanted))
