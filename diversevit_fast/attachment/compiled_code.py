"""Refuse code of ``torch.compile`` where it would refuse a second derivative, or drop it."""

import torch
from torch import nn

from .._torch_internals import compiler_traces_gradients, frame_callback, is_compiled
from ..errors import UnsupportedError


def refuse_compiled_layers(model: nn.Module, first: nn.Module) -> None:
    """Refuse a model with a compiled module that contains the first chosen layer or follows it.

    Raises:
        UnsupportedError: there is one.
    """
    holders = {module for module in model.modules() if first in set(module.modules())}
    above = False
    for name, module in model.named_modules():
        above = above or module is first
        if is_compiled(module) and (module in holders or above):
            raise UnsupportedError(
                f"model: {name or type(model).__name__} is compiled, so its second derivative would "
                "be refused or dropped; compile only the blocks below the chosen layers, or none"
            )


def refuse_compiled_modules(model: nn.Module) -> None:
    """Refuse a model with any compiled module.

    Raises:
        UnsupportedError: there is one.
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            raise UnsupportedError(f"model: {name or type(model).__name__} is compiled, {_CURE}")


def refuse_compiler() -> None:
    """Refuse to go on in code that ``torch.compile`` traces, or runs between two of its graphs.

    Raises:
        UnsupportedError: this is such code.
    """
    if torch.compiler.is_compiling() or callable(frame_callback()):
        raise UnsupportedError(f"second_order: compiled code runs inside the block, {_CURE}")


_CURE = (
    "and has no second derivative; use the model as it was before torch.compile, or compile the whole "
    "loss with dvf.compile_loss"
)


def refuse_broken_graph() -> None:
    """Refuse to be entered by a compiled function outside its graph, or in a graph not of ``compile_loss``.

    Raises:
        UnsupportedError: a context is.
    """
    compiling = torch.compiler.is_compiling()
    if not compiler_traces_gradients() if compiling else callable(frame_callback()):
        raise UnsupportedError(
            "torch.compile: it broke the graph around this context, so second derivatives would be "
            "refused or dropped; use dvf.compile_loss, which keeps one graph"
        )
