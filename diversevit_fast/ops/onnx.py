"""ONNX export: PyTorch's operators, which both exporters translate, in place of this library's.

While a module is exported, the public functions compute with PyTorch's operators. An ``ExportedProgram`` already holds
this library's operators; for the exporter they are decomposed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import ProxyTorchDispatchMode, overload_of, tracing_state
from ..errors import UnsupportedError

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""For ``ExportedProgram.run_decompositions``: what is left runs without this library."""


def exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` is running, which knows PyTorch's operators and none of ours."""
    traced = torch.compiler.is_exporting() or tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def decomposes(operator: torch.library.CustomOpDef, formula: Callable[..., Any]) -> None:
    """Show the exporter ``formula`` where an ``ExportedProgram`` holds ``operator``.

    Not by way of PyTorch's table of decompositions: where the variable ``CI`` is set, Inductor refuses every
    operator that stands in it.
    """

    def traced(mode: Any, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.onnx.is_in_onnx_export():
            with mode:
                return formula(*args, **(kwargs or {}))
        return mode.__torch_dispatch__(operator, types, args, kwargs)

    operator.register_torch_dispatch(ProxyTorchDispatchMode, traced)
    DECOMPOSITIONS[overload_of(operator)] = formula


def refuse_dropout(dropout_p: float) -> None:
    """Raise unless attention is exported without dropout, whose bits ONNX's operators do not draw.

    Raises:
        UnsupportedError: it is not.
    """
    if dropout_p:
        raise UnsupportedError(
            f"dropout_p: attention dropout cannot be exported to ONNX, got {dropout_p}; "
            "export the model in evaluation mode, or pass 0.0"
        )


def exported_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """Compute (1)-(2) with the arguments of ``attention``; rows that attend to nothing are zero.

    The exporters' own translations of ``F.scaled_dot_product_attention`` give NaN there for an additive
    mask and for a negative scale, and take neither three axes nor, all of them, grouped heads.
    """
    if enable_gqa:
        k, v = (_repeated(x, q.shape[-3] // x.shape[-3]) for x in (k, v))
    s = (scale * q) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is None:
        return s.softmax(-1) @ v
    s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    empty = s.amax(-1, keepdim=True) == -torch.inf
    return s.softmax(-1).masked_fill(empty, 0.0).to(v.dtype) @ v


def _repeated(x: Tensor, group: int) -> Tensor:
    """Repeat each head ``group`` times in a row: [..., H, N, d] -> [..., H group, N, d]."""
    x = x.unsqueeze(-3)
    return x.expand(*[-1] * (x.ndim - 3), group, -1, -1).flatten(-4, -3)
