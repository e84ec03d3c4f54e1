"""Attention, LayerNorm and GELU to second order, and the head-diversity penalty that needs them.

Letters, the same in every file: ``B`` batch, ``H`` heads, ``N`` tokens, ``d`` head width, ``D`` model width.
Attention works on ``[B, H, N, d]``, the rest of a ViT on ``[B, N, D]``. ``do`` is the cotangent of ``o``;
``dq dk dv`` those of the inputs; ``ddq ddk ddv`` the cotangents of those; ``gq gk gv gdo`` what the
double backward returns.

The pipeline, a file per stage: attention (``ops``) -> ``capture`` -> ``head_gradients`` -> Gram and penalty
(``ops.head_penalty``, ``ops.routed_head_penalty``) -> ``diversity`` -> ``pruning`` and ``selection``.
"""

from . import data, integrations, models, nn
from .attachment.capture import capture_heads
from .attachment.compile_loss import compile_loss
from .attachment.support import LayerSupport, supported
from .errors import UnsupportedError, UsageError
from .heads.pruned_files import PruningReport, load_pruned, pruning_report, save_pruned
from .heads.pruning import keep_heads, prune_heads
from .heads.selection import HeadChoice, select_heads
from .ops import attention, gelu, head_penalty, layer_norm, routed_head_penalty
from .ops.backends import empty_cpu_cache, use_backend
from .ops.warmup import warmup
from .penalty.head_diversity import HeadDiversity
from .version import __version__

__all__ = [
    "HeadChoice",
    "HeadDiversity",
    "LayerSupport",
    "PruningReport",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attention",
    "capture_heads",
    "compile_loss",
    "data",
    "empty_cpu_cache",
    "gelu",
    "head_penalty",
    "integrations",
    "keep_heads",
    "layer_norm",
    "load_pruned",
    "models",
    "nn",
    "prune_heads",
    "pruning_report",
    "routed_head_penalty",
    "save_pruned",
    "select_heads",
    "supported",
    "use_backend",
    "warmup",
]
