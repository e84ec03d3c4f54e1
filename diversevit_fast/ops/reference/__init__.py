"""Every operator in plain PyTorch, a module each: the definition that the kernels are measured against.

Readable first; slow is fine. Any device and dtype, differentiable to any order, so ``gradgradcheck``
vouches for it and it vouches for the rest. Numbers are the equations of ``kernels/README.md``.

``attention``, ``layer_norm`` ... are the definitions. ``X_forward``, ``X_backward`` and ``X_double_backward``
are the same operator's three derivative orders, the functions that every backend has
(``diversevit_kernels.common.contracts``).
"""

from .attention import (
    attention,
    attention_backward,
    attention_double_backward,
    attention_empty_qkv,
    attention_forward,
    attention_scores,
    softmax_statistics,
)
from .gelu import (
    TANH_CUBIC,
    TANH_SCALE,
    gelu,
    gelu_backward,
    gelu_derivatives,
    gelu_double_backward,
    gelu_forward,
)
from .head_penalty import (
    by_group,
    head_penalty,
    head_penalty_backward,
    head_penalty_double_backward,
    head_penalty_forward,
    pair_weights,
)
from .layer_norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_double_backward,
    layer_norm_forward,
)
from .routed_head_penalty import (
    route,
    routed_head_penalty,
    routed_head_penalty_backward,
    routed_head_penalty_double_backward,
    routed_head_penalty_forward,
)

__all__ = [
    "TANH_CUBIC",
    "TANH_SCALE",
    "attention",
    "attention_backward",
    "attention_double_backward",
    "attention_empty_qkv",
    "attention_forward",
    "attention_scores",
    "by_group",
    "gelu",
    "gelu_backward",
    "gelu_derivatives",
    "gelu_double_backward",
    "gelu_forward",
    "head_penalty",
    "head_penalty_backward",
    "head_penalty_double_backward",
    "head_penalty_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_forward",
    "pair_weights",
    "route",
    "routed_head_penalty",
    "routed_head_penalty_backward",
    "routed_head_penalty_double_backward",
    "routed_head_penalty_forward",
    "softmax_statistics",
]
