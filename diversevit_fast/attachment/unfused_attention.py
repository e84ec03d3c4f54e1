"""Unfused attention, for hooks on its weights: timm's ``fused_attn=False`` with a hook on ``attn_drop``.

With ``fused_attn=False`` timm's attention modules compute attention step by step and call ``softmax``
and ``attn_drop`` as modules. Fused attention calls neither, so a hook on them, or a user's module in
their place, would silently not run. Where there is one, attention is computed in the same steps.
This has derivatives of any order, and takes N x N memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import has_global_hooks
from ..errors import UnsupportedError
from .attention_modules import is_hooked, plain_class
from .seen_attention import SeenAttention

_INERT = (nn.Dropout, nn.Identity, nn.Softmax)


class Unfused(SeenAttention):
    """Attention in steps, called like ``F.scaled_dot_product_attention``.

    Attributes:
        weights: the weights of the last call after dropout, ``[B, H, Nq, Nk]``.
    """

    def __init__(self, drop: Callable[[Tensor], Tensor], softmax: Any = None):
        self._softmax: Any = softmax or nn.Softmax(-1)
        self._drop = drop
        self.weights: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Unfused":
        """Unfused attention with the softmax and dropout modules of ``module``."""
        drop: Any = getattr(module, "attn_drop", None)
        return cls(drop or nn.Identity(), getattr(module, "softmax", None))

    def compute(
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
        """Attention ``[B, H, Nq, dv]``; dropout is the module's, and ``dropout_p`` is ignored."""
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        self.weights = self._drop(masked_softmax(scores, attn_mask, self._softmax))
        return self.weights @ v


def masked_softmax(scores: Tensor, mask: Tensor | None, softmax: Any) -> Tensor:
    """Softmax over the keys; a fully masked row is zero, and so are its gradients.

    Args:
        mask: bool (True: attend) or added to the scores (-inf: do not attend). It is added in its own
            dtype if that is wider than the scores'; the weights have the scores' dtype.
    """
    if mask is None:
        return softmax(scores)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    nowhere = (mask.detach() == -torch.inf).all(-1, keepdim=True)
    weights = softmax((scores + mask).masked_fill(nowhere, 0.0)).masked_fill(nowhere, 0.0)
    return weights.to(scores.dtype)


def is_watched(module: nn.Module, dropout_p: float | None = None) -> bool:
    """True if ``module`` runs unfused by itself and calls something that fused attention would skip.

    That is a hook, a user's module, or a dropout with another probability than ``dropout_p``, which fused
    attention would use (a dropout that is on in eval mode, for instance).

    Raises:
        UnsupportedError: a hook that cannot be kept.
    """
    if vars(module).get("fused_attn", getattr(plain_class(module), "fused_attn", True)):
        return False
    bias = getattr(module, "rel_pos", None)  # fused attention reads its table without calling it
    if isinstance(bias, nn.Module) and is_hooked([bias]):
        raise UnsupportedError(
            f"model: a {type(module).__name__} with fused_attn=False has a hook on its rel_pos, which would "
            "not run here; remove the hook, or hook attn_drop"
        )
    drop = getattr(module, "attn_drop", None)
    drops = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    otherwise = dropout_p is not None and drops != dropout_p
    return otherwise or any(map(_child_is_watched, (drop, getattr(module, "softmax", None))))


def _child_is_watched(child: Any) -> bool:
    if not isinstance(child, nn.Module):
        return False
    plain = plain_class(child) in _INERT and "forward" not in vars(child)
    return not plain or is_hooked([child]) or has_global_hooks()
