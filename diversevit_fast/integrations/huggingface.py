"""``attn_implementation="diversevit"``: twice-differentiable attention through transformers' extension point.

>>> from diversevit_fast.integrations import huggingface
>>> huggingface.register()
>>> model = AutoModelForImageClassification.from_pretrained(name, attn_implementation="diversevit")

``HeadDiversity`` needs none of this: it attaches to models with the stock ``"sdpa"`` as well. Registered,
attention is this library's everywhere, also outside a ``with`` block, for penalties of your own.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError, require
from ..ops import attention

NAME = "diversevit"


def register(name: str = NAME) -> str:
    """Make ``attn_implementation=name`` known to transformers, masks included; again does no harm.

    Returns:
        ``name``.

    Raises:
        UsageError: transformers is not installed.
    """
    masking = require("transformers.masking_utils", extra="hf")
    modeling = require("transformers.modeling_utils", extra="hf")
    modeling.AttentionInterface.register(name, attention_forward)
    masking.AttentionMaskInterface.register(name, masking.sdpa_mask)  # else masks are dropped
    return name


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[B, H, N, d]`` in, ``[B, N, H, d]`` and no weights out.

    Args:
        module: the calling module, whose ``is_causal`` holds where the argument is None.
        attention_mask: bool (True: attend) or additive, broadcastable to ``[B, H, Nq, Nk]``.
        position_bias: added to the scores, with gradients.

    Raises:
        UnsupportedError: ``softcap``, a paged cache, attention weights asked for.
    """
    if softcap is not None:
        raise UnsupportedError("softcap: not supported; use attn_implementation='eager'")
    if others.get("output_attentions"):
        raise UnsupportedError(
            "output_attentions: the weights are never made; use attn_implementation='eager'"
        )
    if others.get("cache") is not None:
        raise UnsupportedError("cache: paged caches are for generation; use 'sdpa'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1 and attention_mask is None
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal), False
    heads = attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return heads.transpose(1, 2).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One additive mask."""
    if causal:
        mask = bias.new_ones(bias.shape[-2:]).bool().tril()
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))
