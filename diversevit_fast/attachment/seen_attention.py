"""Attention that an attachment computes in a way of its own, which the attachments around it still see as one call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from .._torch_internals import function_modes, insert_function_mode, remove_function_mode
from ..ops.checks import as_plain_mask, is_causal_bias
from .torch_calls import TorchCalls


class SeenAttention:
    """Called like ``F.scaled_dot_product_attention``; ``compute`` runs when every open attachment has seen the call.

    What it calls is seen by the modes that are not this library's, as what a model calls itself.
    """

    modes: list[TorchFunctionMode] | None = None  # those, at the first call

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
        """Attention ``[B, H, Nq, dv]``."""
        if attn_mask is not None and is_causal_bias(attn_mask):
            attn_mask, is_causal = as_plain_mask(attn_mask, is_causal, q.device)
        if self.modes is None and not torch.compiler.is_compiling():
            self.modes = [mode for mode in function_modes() if not isinstance(mode, TorchCalls)]
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        options |= {"scale": scale, "enable_gqa": enable_gqa}
        return computed_by(self, q, k, v, **options)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The same, with every argument given."""
        raise NotImplementedError


def computed_by(how: SeenAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """``how.compute(q, k, v, **options)``, as a torch function."""
    if has_torch_function((q, k, v)):
        return handle_torch_function(computed_by, (q, k, v), how, q, k, v, **options)
    with _entered(how.modes or ()):
        return how.compute(q, k, v, **options)


@contextmanager
def _entered(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """A context inside which ``modes``, whose handlers are running, see calls again."""
    for mode in modes:
        insert_function_mode(mode, len(function_modes()))
    try:
        yield
    finally:
        for mode in modes:
            remove_function_mode(mode)
