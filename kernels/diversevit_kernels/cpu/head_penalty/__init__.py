"""The head penalty on a CPU, of given gradients and of gradients routed through a projection."""

from .plain import head_penalty_backward, head_penalty_double_backward, head_penalty_forward
from .routed_dispatch import (
    routed_head_penalty_backward,
    routed_head_penalty_double_backward,
    routed_head_penalty_forward,
)

__all__ = [
    "head_penalty_backward",
    "head_penalty_double_backward",
    "head_penalty_forward",
    "routed_head_penalty_backward",
    "routed_head_penalty_double_backward",
    "routed_head_penalty_forward",
]
