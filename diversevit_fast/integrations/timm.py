"""timm's extension point, ``attn_layer=``: its attention module on the twice-differentiable operator.

>>> from diversevit_fast.integrations.timm import Attention
>>> model = timm.create_model("vit_small_patch16_224", attn_layer=Attention)

``HeadDiversity`` needs none of this: it attaches to the stock module as well. With it, attention is this
library's everywhere, also outside a ``with`` block, for penalties of your own.
"""

from typing import Any

from torch import Tensor, nn

from ..attachment.packed_projection import may_pack
from ..attachment.unfused_attention import Unfused, is_watched
from ..errors import require
from ..ops import attention, attention_qkvpacked
from ..ops.attention_qkvpacked import split_qkv

_layers: Any = require("timm.layers", extra="train")


class Attention(_layers.Attention):
    """``timm.layers.Attention``, arguments and ``state_dict`` included, differentiable twice.

    qk norm, scale norm and the gate are as timm's. With ``fused_attn=False`` hooks on ``attn_drop`` run, as timm's.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``.

        Args:
            attn_mask: bool (True: attend) or added to the scores, broadcastable to ``[B, H, N, N]``.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim)
        dropout = self.attn_drop.p if self.training else 0.0
        # inside a context fused_attn is True: that asks again when it sees the call
        unfused = not self.fused_attn and is_watched(self)
        if attn_mask is None and not dropout and not unfused and self._attends_to_the_whole():
            heads = attention_qkvpacked(qkv, is_causal=is_causal)
        else:
            q, k, v = split_qkv(qkv)
            attend = Unfused.of(self) if unfused else attention
            options = {"attn_mask": attn_mask, "dropout_p": dropout, "is_causal": is_causal}
            heads = attend(self.q_norm(q), self.k_norm(k), v, **options).transpose(1, 2)
        out = self.norm(heads.reshape(B, N, self.attn_dim))
        gate = getattr(self, "gate", None)  # of timm from 1.0.25 on
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attends_to_the_whole(self) -> bool:
        """Whether nothing is done to q, k and v between the projection and attention, and no hook sees them."""
        plain = type(self.q_norm) is nn.Identity and type(self.k_norm) is nn.Identity
        return plain and may_pack(self, [self.qkv, self.proj])
