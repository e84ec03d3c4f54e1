"""The class-token shortcut: compute the last block for the class token alone, where nothing else is read.

Its attention then has one query, so forward, backward and double backward cost O(N d). The result is
exact. The shortcut is taken only in the forward of a whole model whose class is registered here, which
pools by its class token, and only if no hook could look at the other tokens.

A registered model runs its ``blocks`` one after the other, then ``norm``, and reads the first token;
a block calls its attention module ``attn``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._torch_internals import has_hooks_inside
from .attachment import Attachment, Forward
from .attention_modules import AttentionLayer, is_hooked, plain_class
from .unfused_attention import is_watched

BlockForward = Callable[[Any, Tensor], Tensor]
"""A block and its input ``[B, N, D]`` -> its output for the class token, ``[B, 1, D]``."""


@dataclass(frozen=True)
class _Registered:
    block_class: type
    forward: BlockForward
    pools: Callable[[Any], bool]


_models: dict[type, _Registered] = {}
_libraries: dict[str, Callable[[], None]] = {}


def register_class_token_model(
    model_class: type,
    block_class: type,
    forward: BlockForward,
    pools: Callable[[Any], bool] = lambda model: True,
) -> None:
    """Allow the shortcut in models of exactly ``model_class``.

    Args:
        model_class: has ``blocks`` and ``norm`` (see above).
        block_class: of its last block, exactly.
        forward: of such a block, for the class token.
        pools: whether a given model reads nothing but the class token after its last block.
    """
    _models[model_class] = _Registered(block_class, forward, pools)


def register_class_token_library(module_name: str, register: Callable[[], None]) -> None:
    """Call ``register`` once the first model is met whose class the module ``module_name`` defines.

    So a library's models can be registered without importing it.
    """
    _libraries[module_name] = register


def _registered(model: nn.Module) -> _Registered | None:
    model_class = plain_class(model)
    register = _libraries.pop(model_class.__module__, None)
    if register is not None:
        register()
    return _models.get(model_class)


def class_token_block(model: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The last block of ``model`` if it holds ``attention`` and the shortcut is exact, else None."""
    known = _registered(model)
    if known is None or not known.pools(model):
        return None
    whole: Any = model
    *_, block = whole.blocks.children()
    if plain_class(block) is not known.block_class or getattr(block, "attn", None) is not attention:
        return None
    looked_at = is_hooked((whole.blocks, block, whole.norm)) or has_hooks_inside(block)
    return None if looked_at or is_watched(attention) else block


class ClassTokenShortcut:
    """Takes the shortcut in forwards inside an attachment, as long as each allows it.

    Attributes:
        active: a forward of the whole model is running that reads only the class token.
    """

    def __init__(self) -> None:
        self.active = False

    def wrap(self, attachment: Attachment, layer: AttentionLayer) -> None:
        """Wrap the attachment's model, and its last block if ``layer`` is its attention."""
        model = attachment.model

        def run_model(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            allowed = class_token_block(module, layer.module) is not None
            self.active = allowed and len(args) == 1 and not kwargs
            try:
                return forward(*args, **kwargs)
            finally:
                self.active = False

        attachment.wrap(model, run_model)
        block, known = class_token_block(model, layer.module), _registered(model)
        if block is None or known is None:
            return

        def run_block(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            return known.forward(module, *args) if self.active else forward(*args, **kwargs)

        attachment.wrap(block, run_block)
