"""transformers' extension point: attn_implementation="diversevit"."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError
from diversevit_fast.integrations import huggingface
from tests.helpers.eager import Eager, eager_penalty
from tests.helpers.vits import assert_same, gradients

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4, "num_labels": 5}


def vit(implementation, kind="ViT", **options):
    torch.manual_seed(0)
    huggingface.register()
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{kind}ForImageClassification")(config).double().eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


@pytest.fixture
def images():
    return torch.randn(
        2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("kind", ["ViT", "Beit"])
def test_is_sdpa_and_differentiable_twice(kind, images):
    """BEiT's relative position bias arrives beside the mask."""
    options = {"use_relative_position_bias": True} if kind == "Beit" else {}
    results = []
    for model, mode in (
        (vit("diversevit", kind, **options), nullcontext()),
        (vit("sdpa", kind, **options), Eager()),
    ):
        x = images.clone().requires_grad_()
        with mode:
            logits = model(x).logits
        (g,) = torch.autograd.grad(logits.max(-1).values.sum(), x, create_graph=True)
        results.append([logits.detach(), *gradients(model, g.square().sum())])
    assert_same(results[0], results[1])


def test_head_diversity_sees_it(images):
    model = vit("diversevit")
    diversity = dvf.HeadDiversity(model)
    with diversity:
        logits = model(images).logits
    penalty = diversity.penalty(logits)
    plain = vit("sdpa")
    module = plain.vit.layers[-1].attention
    _, expect = eager_penalty(plain, images, module, "input", lambda out: out.logits)
    torch.testing.assert_close(penalty, expect)
    assert_same(gradients(model, penalty), gradients(plain, expect))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_masks_are_not_dropped(causal):
    """A text model: what is padded must not be attended to, or the outputs differ from eager's."""
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    kind = "Llama" if causal else "Bert"
    options = {"num_key_value_heads": 2} if causal else {}
    tokens = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    outputs = []
    huggingface.register()
    for implementation in ("diversevit", "eager"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes, **options)
        config._attn_implementation = implementation
        model = getattr(transformers, f"{kind}Model")(config).double().eval()
        outputs.append(model(tokens, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*outputs)


def test_attention_dropout_in_training(images):
    model = vit("diversevit", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    one, two = (model(images)[0] for _ in range(2))
    assert not torch.equal(one, two)


def test_refusals():
    q = torch.randn(1, 2, 3, 4)
    for option in ({"softcap": 1.0}, {"output_attentions": True}, {"cache": object()}):
        with pytest.raises(UnsupportedError, match=next(iter(option))):
            huggingface.attention_forward(nn.Module(), q, q, q, None, **option)


def test_eager_models_are_refused_with_the_cure(images):
    model = vit("eager")
    with pytest.raises(UnsupportedError, match=r"model\.set_attn_implementation\('sdpa'\)"):
        dvf.HeadDiversity(model)
    model.set_attn_implementation("sdpa")
    diversity = dvf.HeadDiversity(model)
    with diversity:
        logits = model(images).logits
    assert diversity.penalty(logits) > 0
