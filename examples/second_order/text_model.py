"""A text model of transformers: a penalty on the gradient by its embeddings, with padding.

``register()`` makes this library's attention one of transformers' implementations: nothing has to be entered, and
it is the model's in every call.

python examples/second_order/text_model.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diversevit_fast.integrations import huggingface


def bert() -> nn.Module:
    """A BERT of 2 layers and 4 heads that classifies; dropout on attention weights has to be 0."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 2
    config._attn_implementation = huggingface.register()
    return BertForSequenceClassification(config)


def smoothness_loss(
    model: Any, tokens: Tensor, mask: Tensor, labels: Tensor, weight: float = 1.0
) -> Tensor:
    """Cross-entropy plus the squared gradient of the loss by the embeddings of the tokens."""
    embedded = model.get_input_embeddings()(tokens)
    logits = model(inputs_embeds=embedded, attention_mask=mask).logits
    loss = F.cross_entropy(logits, labels)
    (grad,) = torch.autograd.grad(loss, embedded, create_graph=True)
    return loss + weight * grad.square().sum((1, 2)).mean()


def main() -> None:
    torch.manual_seed(0)
    model = bert()
    tokens, labels = torch.randint(100, (8, 12)), torch.arange(8) % 2
    mask = (torch.arange(12) < torch.arange(5, 13)[:, None]).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(8):
        loss = smoothness_loss(model, tokens, mask, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
