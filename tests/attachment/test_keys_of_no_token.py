"""``nn.MultiheadAttention`` with ``add_bias_kv`` and ``add_zero_attn``: keys that belong to no token."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError
from tests.attachment.test_second_order import assert_same, gradients, tokens

BUILDS = {
    "bias": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "both, other widths": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 8, "vdim": 6},
}
PADDING = torch.tensor([[False, False, False, True], [False] * 4])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "mask": {"attn_mask": CAUSAL},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "mask and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


def layer(build):
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True, **BUILDS[build]).double()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("build", BUILDS)
def test_inside_second_order(build, call):
    model, x = layer(build), tokens(2, 4, 16)

    def attend(x):
        given = (x, x, x) if model.kdim == 16 else (x, x[..., :8], x[..., :6])
        out, weights = model(*given, **CALLS[call])
        return out if weights is None else torch.cat((out, weights), -1)

    ours = gradients(attend, x, model.parameters(), dvf.second_order(model))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(ours, gradients(attend, x, model.parameters()))


@pytest.mark.parametrize("build", ["bias", "zeros"])
def test_their_heads_are_refused(build):
    model, x = layer(build), tokens(2, 4, 16)
    with dvf.capture_heads(model), pytest.raises(UnsupportedError, match="heads are looked at"):
        model(x, x, x)
