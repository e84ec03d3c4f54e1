"""Attention in steps, for those who watch its weights: timm's ``fused_attn=False`` and a hook on ``attn_drop``.

timm's attention modules multiply by themselves where ``fused_attn`` is False, and then call ``softmax`` and
``attn_drop`` as modules. Fused attention calls neither: a hook on them, or a module of one's own in
their place, would silently not run. So where one of them is watched, attention is computed in the
same steps. It has derivatives of any order, and N x N memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import has_global_hooks
from ..errors import UnsupportedError
from .attention_modules import is_hooked, plain_class

_INERT = (nn.Dropout, nn.Identity, nn.Softmax)


class Unfused:
    """Attention in steps, called as ``F.scaled_dot_product_attention`` is.

    Attributes:
        weights: of the last call, ``[B, H, Nq, Nk]``, as they met the values.
    """

    def __init__(self, drop: Callable[[Tensor], Tensor], softmax: Any = None):
        self._softmax: Any = softmax or nn.Softmax(-1)
        self._drop = drop
        self.weights: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Unfused":
        """With the modules that ``module`` has for it."""
        drop: Any = getattr(module, "attn_drop", None)
        return cls(drop or nn.Identity(), getattr(module, "softmax", None))

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
        """``[B, H, Nq, d]`` to ``[B, H, Nq, dv]``; what is dropped is not ``dropout_p``'s affair."""
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        self.weights = self._drop(masked_softmax(scores, attn_mask, self._softmax))
        return self.weights @ v


def masked_softmax(scores: Tensor, mask: Tensor | None, softmax: Any) -> Tensor:
    """Softmax over the keys; a row that a mask forbids wholly is zero, and so are its gradients.

    Args:
        mask: bool (True: attend) or added to the scores; where it is -inf, do not attend.
            Of a wider dtype than the scores, it is added in its own; the weights are in theirs.
    """
    if mask is None:
        return softmax(scores)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    nowhere = (mask.detach() == -torch.inf).all(-1, keepdim=True)
    weights = softmax((scores + mask).masked_fill(nowhere, 0.0)).masked_fill(nowhere, 0.0)
    return weights.to(scores.dtype)


def watched(module: nn.Module, dropout_p: float | None = None) -> bool:
    """Whether ``module`` left alone runs unfused, and calls something there that fused attention lacks.

    That is a hook, a module of somebody's own, or a dropout of which ``dropout_p``, what fused attention
    is to drop, says something else (on in eval mode, for instance).

    Raises:
        UnsupportedError: a hook that cannot be kept.
    """
    if vars(module).get("fused_attn", getattr(plain_class(module), "fused_attn", True)):
        return False
    bias = getattr(module, "rel_pos", None)  # fused, only its table is read
    if isinstance(bias, nn.Module) and is_hooked([bias]):
        raise UnsupportedError(
            f"model: a {type(module).__name__} with fused_attn=False has a hook on its rel_pos, which would "
            "not run here; remove the hook, or hook attn_drop"
        )
    drop = getattr(module, "attn_drop", None)
    drops = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    otherwise = dropout_p is not None and drops != dropout_p
    return otherwise or any(map(_is_watched, (drop, getattr(module, "softmax", None))))


def _is_watched(child: Any) -> bool:
    if not isinstance(child, nn.Module):
        return False
    plain = plain_class(child) in _INERT and "forward" not in vars(child)
    return not plain or is_hooked([child]) or has_global_hooks()
