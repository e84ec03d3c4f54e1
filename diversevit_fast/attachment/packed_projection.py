"""Queries, keys and values that are views of one projection's output, and attention that makes use of it.

``attention_qkvpacked`` writes the gradient of the projection's output in one piece. A foreign model calls attention
with three tensors; where these are what it cut out of its projection's output, attention of the whole is the same.

Then autograd records the gradient of the whole, and none of q, k and v: so nothing is packed where a hook could look
at one of them. A model that stores one of them in its forward and asks for its gradient later is told by autograd
that it was not used; it can have it outside the context.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import has_global_hooks, has_hooks_inside, is_looked_at
from ..ops import attention, attention_qkvpacked
from ..ops.attention_qkvpacked import autograd_alone, split_qkv
from .attention_modules import AttentionLayer


class PackedAttention:
    """``dvf.attention`` that runs ``attention_qkvpacked`` when it is called with the ``parts`` of ``qkv``.

    Attributes:
        parts: q, k, v ``[B, H, N, d]``, views of ``qkv`` ``[B, N, 3, H, d]``; q of the first ``queries`` tokens alone.
        made: what ``attention_qkvpacked`` returned last; ``heads`` is the view of it that was returned here.
    """

    made: Tensor
    heads: Tensor | None = None

    def __init__(
        self,
        qkv: Tensor,
        parts: tuple[Tensor, Tensor, Tensor] | None = None,
        queries: int | None = None,
    ):
        self._qkv, self._queries = qkv, queries
        self.parts = split_qkv(qkv, queries) if parts is None else parts

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``[B, H, Nq, dv]``, as ``dvf.attention``; a part that was changed in between is taken as it is now."""
        whole = all(x is part for x, part in zip((q, k, v), self.parts, strict=True))
        if not whole or attn_mask is not None or enable_gqa:
            return attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "queries": self._queries}
        if dropout_p:
            options["dropout_p"] = dropout_p
        self.made = attention_qkvpacked(self._qkv, **options)
        self.heads = self.made.transpose(1, 2)
        return self.heads


def packed_attention(made: Tensor, q: Tensor, k: Tensor, v: Tensor) -> PackedAttention | None:
    """Attention of ``made`` ``[B, N, 3 H d]``, the output of a projection, if q, k, v are its three parts.

    That is if they lie where they would, autograd recorded nothing between but views, and no hook of a tensor
    looks at one of them. None otherwise.
    """
    B, H, N, d = q.shape
    if made.shape != (B, N, 3 * H * d) or not k.shape == v.shape == q.shape:
        return None
    if not autograd_alone() or not made.requires_grad:
        return None
    samples, tokens, step = made.stride()
    strides, size = (samples, d * step, tokens, step), H * d * step
    for place, x in enumerate((q, k, v)):
        # of views of one tensor; fake tensors have no addresses
        lies = x.stride() == strides and x.storage_offset() == made.storage_offset() + place * size
        if not lies or not _only_views(x, made) or is_looked_at(x):
            return None
    return PackedAttention(made.unflatten(-1, (3, H, d)), (q, k, v))


def twice_differentiable(
    layer: AttentionLayer, made: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Callable[..., Tensor]:
    """Attention of q, k and v: of ``made``, all of the layer's projection, where they are its parts."""
    if made is None or not may_pack(layer.module, layer.linear):
        return attention
    return packed_attention(made, q, k, v) or attention


def may_pack(module: nn.Module, linear: list[nn.Module]) -> bool:
    """Whether no hook can look at q, k or v in ``module``, which makes them by ``linear``; False under a compiler."""
    if torch.compiler.is_compiling():
        return False
    return not has_global_hooks() and not has_hooks_inside(module, linear)


_VIEWS = {
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Permute", "Transpose", "Unbind", "Select", "Split")
}


def _only_views(x: Tensor, made: Tensor) -> bool:
    node, end = x.grad_fn, made.grad_fn
    while node is not None and node is not end:
        if type(node).__name__ not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return node is not None
