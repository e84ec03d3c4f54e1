"""The context inside which any model's attention can be differentiated twice, whoever wrote the model."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .._torch_internals import in_forward_mode
from ..errors import UnsupportedError, usage_error
from .attachment import Attachment
from .compiled_code import refuse_broken_graph, refuse_compiled_modules, refuse_compiler
from .recomputation import recompute_inside, refuse_reentrant_checkpointing
from .replacements import OPERATORS, call_second_order
from .torch_calls import Forward, Handler, TorchCalls, in_second_order, open_attachments


class second_order:  # noqa: N801 (a verb phrase, like torch.no_grad)
    """Context manager inside which PyTorch's fused attention has a double backward, in O(N) memory.

    >>> with dvf.second_order():
    ...     logits = model(images)
    >>> (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    >>> grad.square().sum().backward()

    On the thread that entered, these calls are run by the twice-differentiable operators of the same
    meaning: ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward``, ``F.layer_norm``,
    ``F.gelu``, PyTorch's ``nn`` modules that call them, and the attention functions of xformers and
    flash-attn. Gradients may be taken inside the block or after it. Under ``torch.no_grad`` PyTorch's own
    functions run. What non-reentrant checkpointing recomputes is recomputed as it was.

    Args:
        model: is checked at entry, if given: that no module of it is compiled and that none computes
            attention by kernels which cannot be seen.

    Raises:
        UsageError: ``model`` is not a module; the context is entered twice at a time.
        UnsupportedError: ``model`` holds such a module; entered by a compiled function other than that of
            ``compile_loss``. Calls inside the block raise it for a reentrant checkpoint and what else the
            operators refuse.
    """

    everywhere = True  # see ``torch_calls.in_second_order``

    def __init__(self, model: nn.Module | None = None):
        if model is not None and not isinstance(model, nn.Module):
            wanted = "a torch.nn.Module or None"
            raise usage_error("model", wanted, type(model).__name__, "pass the model itself")
        self._model = model
        self._calls: TorchCalls | None = None
        self.traced = False

    def __enter__(self) -> "second_order":
        if self._calls is not None:
            raise usage_error(
                "with", "a context that is not entered", "one that is", "make another"
            )
        refuse_broken_graph()
        calls = TorchCalls(self, _HANDLERS)
        self.traced = torch.compiler.is_compiling()
        if self.traced:
            calls.__enter__()
        else:
            if self._model is not None:
                refuse_compiled_modules(self._model)
                _refuse_unseen(self._model)
            _watch_libraries()
            calls.open()
            calls.start()
        self._calls = calls
        return self

    def recomputation(self) -> Callable[[], "second_order"]:
        """What a checkpoint inside the block recomputes in."""
        return second_order

    def __exit__(self, *exception: Any) -> None:
        calls, self._calls = self._calls, None
        if calls is None:
            return
        if self.traced:
            calls.__exit__(*exception)
        else:
            calls.close()


def _applies() -> bool:
    """Whether a call inside the block is to be differentiable twice; a checkpoint around it is told."""
    if not torch.is_grad_enabled() and not in_forward_mode():
        refuse_reentrant_checkpointing()
        return False
    recompute_inside()
    return True


def _replace(owner: Any, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not owner.traced:
        refuse_compiler()
    return call_second_order(func, args, kwargs) if _applies() else func(*args, **kwargs)


def _replace_multi_head(
    owner: Any, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Leave the whole attention of a layer to an attachment that watches it: it asks ``in_second_order``."""
    others = (x.running_layer() for x in open_attachments() if isinstance(x, Attachment))
    if any(layer is not None and layer.is_torch for layer in others):
        return func(*args, **kwargs)
    return _replace(owner, func, args, kwargs)


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(OPERATORS, _replace),
    F.multi_head_attention_forward: _replace_multi_head,
}

_SEEN = ("sdpa", "eager", "diversevit")
"""Implementations of transformers' attention that are differentiable twice inside the block."""


def _refuse_unseen(model: nn.Module) -> None:
    """Refuse a model that computes attention by kernels which cannot be seen."""
    for name, module in model.named_modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation is not None and implementation not in _SEEN:
            raise UnsupportedError(
                f"model: the attention of {name or type(model).__name__} is {implementation!r}, which has "
                "no second derivative; model.set_attn_implementation('sdpa') first"
            )


_libraries: dict[str, Callable[[ModuleType], None]] = {}


def register_attention_library(module_name: str, watch: Callable[[ModuleType], None]) -> None:
    """Call ``watch`` with the module of that name once it is imported and a block is entered.

    It puts ``inside_blocks`` functions in place of the module's own.
    """
    _libraries[module_name] = watch


def _watch_libraries() -> None:
    for name in [name for name in _libraries if name in sys.modules]:
        _libraries.pop(name)(sys.modules[name])


def inside_blocks(replacement: Forward, original: Forward) -> Forward:
    """A function that runs ``replacement`` where a block of ``second_order`` is open, else ``original``."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = replacement if in_second_order() and _applies() else original
        return chosen(*args, **kwargs)

    return call
