"""Choose the projections that read a layer's input: the paper's penalty compares its gradients.

Self-attention makes queries, keys and values of one tensor. Class attention makes its query of the first
token, attention pooling of a learned one. Any other layer has no single input, and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch_internals import write_count
from ..attachment.attention_modules import AttentionLayer
from ..errors import UnsupportedError


@dataclass(frozen=True)
class ProjectionOutput:
    """The output of a linear layer that makes queries, keys or values, ``[B, N, len(roles) H d]``.

    ``roles`` are some of "qkv", in this order, made by the last ``rows`` rows of ``weight``. The output is
    ``[B, H d]`` where the layer projects the first token alone, and ``[B, N, len(roles), H, d]`` if ``by_head``.
    """

    tensor: Tensor
    roles: str
    weight: Tensor
    rows: int  # len(roles) H d, with H d those of a whole [B, H, N, d]
    by_head: bool = False


def input_projections(
    layer: AttentionLayer, made: Sequence[tuple[ProjectionOutput, Tensor]]
) -> tuple[ProjectionOutput, ...]:
    """Choose from a run's projections, given with their inputs, those of the tensor that keys are made of.

    Raises:
        UnsupportedError: a projection was not seen, or reads another tensor.
    """
    inputs = {role: x for part, x in made for role in part.roles}
    if "k" not in inputs or "v" not in inputs:
        raise _refusal(layer, "its projections were not seen (are they wrapped or parametrised?)")
    if not _same(inputs["k"], inputs["v"]):
        raise _refusal(layer, "its keys and values are made of different tensors")
    reads = layer.query_reads
    if "q" not in inputs and reads != "another":
        raise _refusal(layer, "its queries' projection was not seen")
    kept = []
    for part, x in made:
        first_token = reads == "first" and x.ndim == 2
        if "q" not in part.roles or first_token or _same(x, inputs["k"]):
            kept.append(part)
        elif reads != "another" or _share_memory(x, inputs["k"]):
            raise _refusal(layer, "its queries are made of another tensor than its keys")
    return tuple(kept)


def _same(a: Tensor, b: Tensor) -> bool:
    """True if both are the same tensor, or the same view of one."""
    if a is b or torch.compiler.is_compiling():
        return a is b
    alike = a.shape == b.shape and a.stride() == b.stride() and write_count(a) == write_count(b)
    return alike and a.data_ptr() == b.data_ptr()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _refusal(layer: AttentionLayer, why: str) -> UnsupportedError:
    return UnsupportedError(f"wrt='input': {layer.name}: {why}; use wrt='output'")
