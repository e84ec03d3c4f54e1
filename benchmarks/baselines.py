"""Baselines of the benchmarks: PyTorch's own operators in place of ours, and the published way to the penalty."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf


class Stock(TorchFunctionMode):
    """Runs PyTorch's operators where a model calls ours: what plain training uses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is dvf.attention:
            return self.attention(*args[:3])
        if func is dvf.attention_qkvpacked:
            return _packed(self.attention, args[0], kwargs.get("queries"))
        if func is dvf.gelu:
            return F.gelu(args[0], approximate=kwargs.get("approximate", "none"))
        if func is dvf.layer_norm:
            return F.layer_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _packed(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Tensor, queries: int | None = None
) -> Tensor:
    """``dvf.attention_qkvpacked`` by an attention of three tensors."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attention(q[:, :, :queries], k, v).transpose(1, 2)


class TwiceDifferentiableStock(Stock):
    """``Stock`` with unfused attention, the only one of PyTorch's that has a double backward."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)


def plain_modules() -> Any:
    """A context in which modules of ``dvf.nn`` call PyTorch's operators, at no cost per call: training without us."""

    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        return F.gelu(x, approximate=approximate)

    packed = partial(_packed, F.scaled_dot_product_attention)
    theirs = {"attention_qkvpacked": packed, "gelu": gelu, "layer_norm": F.layer_norm}
    return mock.patch.multiple(dvf.nn, **theirs)


def published_penalty(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the last layer's penalty, by one backward pass per head with the other heads masked.

    Args:
        model: a DiverseViT or a timm VisionTransformer.
    """
    attention = model.blocks[-1].attn
    seen: dict[str, Tensor] = {}
    handle = attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    unfused = sdpa_kernel(SDPBackend.MATH)  # for models that call PyTorch's attention themselves
    with unfused, TwiceDifferentiableStock(), dvf.capture_heads(model, layers="last") as heads:
        logits = model(images)
    handle.remove()
    (g,) = torch.autograd.grad(logits.max(-1).values.sum(), heads[0], create_graph=True)
    alone = torch.eye(g.shape[1], device=g.device)
    u = torch.stack(
        [
            torch.autograd.grad(heads[0], seen["x"], g * mask[:, None, None], create_graph=True)[0]
            for mask in alone
        ],
        2,
    )
    unit = F.normalize(u, dim=-1, eps=1e-12)
    return logits, ((unit @ unit.mT) * (1 - alone)).square().mean()
