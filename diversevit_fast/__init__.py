"""Attention, LayerNorm and GELU to second order, and the head-diversity penalty that needs them.

Letters mean the same in every file: ``B`` batch, ``H`` heads, ``N`` tokens, ``d`` head width, ``D`` model width.
Attention works on ``[B, H, N, d]``, the rest of a ViT on ``[B, N, D]``. ``do`` is the gradient of the output
``o`` (its cotangent), ``dq dk dv`` are those of the inputs, ``ddq ddk ddv`` the cotangents of ``dq dk dv``, and
``gq gk gv gdo`` the results of the double backward. ``kernels/README.md`` lists the other letters.

The folders, in the order in which a training step goes through them:

* ``data``, ``models``, ``nn``: data sets; the paper's ViT; modules built of the operators.
* ``attachment``: observes the attention layers of any model inside a ``with`` block.
* ``ops``: the operators, each with forward, backward and double backward; kernels are in ``diversevit_kernels``.
* ``penalty``: ``head_diversity`` uses ``captured`` tensors, the ``score`` of the logits, its ``head_gradients``,
  and from these the ``layer_penalty`` (operators ``head_penalty`` and ``routed_head_penalty``).
* ``training``: whole steps, replayed as CUDA graphs on a GPU. ``cost``: what a step costs, from shapes alone.
* ``heads``: selects heads after training, masks or prunes the others. ``probes``: what each head does.
* ``integrations``: extension points of timm, transformers and xformers. ``experiment``: the command line.
"""

from . import data, integrations, models, nn, testing
from .attachment.capture import capture_heads
from .attachment.compile_loss import compile_loss
from .attachment.second_order import second_order
from .attachment.support import LayerSupport, supported
from .cost import Cost, cost
from .errors import UnsupportedError, UsageError
from .heads.criteria import head_criteria
from .heads.few_labels import suggest_labels
from .heads.head_table import HeadTable, head_table
from .heads.pruned_files import PruningReport, load_pruned, pruning_report, save_pruned
from .heads.pruning import keep_heads, prune_heads
from .heads.selection import HeadChoice, select_heads
from .ops import (
    attention,
    attention_qkvpacked,
    gelu,
    head_penalty,
    layer_norm,
    routed_head_penalty,
)
from .ops.backends import empty_cpu_cache, use_backend
from .ops.warmup import warmup
from .penalty.head_diversity import HeadDiversity
from .probes.head_probes import HeadProbes
from .probes.probe_heads import probe_heads
from .training.graph_step import graph_step
from .version import __version__

__all__ = [
    "Cost",
    "HeadChoice",
    "HeadDiversity",
    "HeadProbes",
    "HeadTable",
    "LayerSupport",
    "PruningReport",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attention",
    "attention_qkvpacked",
    "capture_heads",
    "compile_loss",
    "cost",
    "data",
    "empty_cpu_cache",
    "gelu",
    "graph_step",
    "head_criteria",
    "head_penalty",
    "head_table",
    "integrations",
    "keep_heads",
    "layer_norm",
    "load_pruned",
    "models",
    "nn",
    "probe_heads",
    "prune_heads",
    "pruning_report",
    "routed_head_penalty",
    "save_pruned",
    "second_order",
    "select_heads",
    "suggest_labels",
    "supported",
    "testing",
    "use_backend",
    "warmup",
]
