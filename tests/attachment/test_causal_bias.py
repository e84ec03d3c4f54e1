"""PyTorch's causal biases, ``torch.nn.attention.bias``: tensors whose numbers mean nothing, but whose shape does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.attachment.test_second_order import assert_same, gradients, tokens

BIASES = {"upper left": causal_upper_left, "lower right": causal_lower_right}


class Attention(nn.Module):
    def __init__(self, bias, queries):
        super().__init__()
        self.bias, self.queries, self.num_heads = bias, queries, 2
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q[:, :, : self.queries]
        mask = self.bias(self.queries, x.shape[1])
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("queries", [4, 7])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_inside_second_order(bias, queries):
    torch.manual_seed(0)
    model, x = Attention(bias, queries).double(), tokens(2, 7, 16)
    ours = gradients(model, x, model.parameters(), dvf.second_order(model))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(ours, gradients(model, x, model.parameters()))


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_of_captured_heads(bias):
    torch.manual_seed(0)
    model, x = Attention(bias, 7).double(), tokens(2, 7, 16)
    wanted = model(x)
    heads = dvf.capture_heads(model)
    with heads:
        torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model.proj(heads[0].transpose(1, 2).flatten(2)), wanted)


def test_besides_is_causal():
    q = tokens(1, 1, 4, 8)
    with pytest.raises(UsageError, match="is_causal: expected False with a CausalBias"):
        dvf.attention(q, q, q, causal_lower_right(4, 4), is_causal=True)
