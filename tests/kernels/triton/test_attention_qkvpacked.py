"""The kernels write the gradients of q, k and v into one tensor: same bits as three."""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.ops.attention_qkvpacked import split_qkv


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(  # few queries; rows and columns; a class token's
    ("tokens", "queries"), [(5, 5), (33, 33), (33, 1), (33, 20)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_three_tensors(dtype, dropout_p, tokens, queries, causal, device):
    torch.manual_seed(0)
    options = {"is_causal": causal, "dropout_p": dropout_p}
    data = torch.randn(2, tokens, 3, 2, 16, device=device).to(dtype)

    def to_second_order(attend):
        torch.manual_seed(1)
        qkv = data.clone().requires_grad_()
        y = attend(qkv)
        (g,) = torch.autograd.grad(y.sin().sum(), qkv, create_graph=True)
        return y, g, torch.autograd.grad(g.square().sum(), qkv)[0]

    got = to_second_order(lambda qkv: dvf.attention_qkvpacked(qkv, queries=queries, **options))
    wanted = to_second_order(
        lambda qkv: dvf.attention(*split_qkv(qkv, queries), **options).transpose(1, 2)
    )
    assert all(map(torch.equal, got, wanted))
