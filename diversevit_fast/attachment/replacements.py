"""Calls of PyTorch's functions, run by the twice-differentiable operator for the same thing."""

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from ..ops import attention, gelu, layer_norm
from .torch_mha import multi_head_attention

OPERATORS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: attention,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
}
_ALIASES = {"input": "x", "query": "q", "key": "k", "value": "v"}


def call_second_order(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``func(*args, **kwargs)``, by the operator that replaces ``func`` if there is one."""
    if func is F.multi_head_attention_forward:
        return multi_head_attention(args, kwargs)
    operator = OPERATORS.get(func)
    if operator is None:
        return func(*args, **kwargs)
    return operator(*args, **{_ALIASES.get(name, name): x for name, x in kwargs.items()})
