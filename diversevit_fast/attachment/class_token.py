"""The class-token shortcut: compute the last block for the class token alone, where nothing else is read.

Its attention then has one query, so forward, backward and double backward cost O(N d). The result is
exact. The shortcut is taken only in the forward of a whole model whose class is registered here, which
pools by its class token, and only if no hook and no other context could look at the other tokens.

A registered model runs its ``blocks`` one after the other, then ``norm``, and reads the first token;
a block calls its attention module ``attn``. That one's own forward runs with one query, whose result is repeated for
all tokens. A block all of whose modules are known can do without: its registered ``direct`` forward calls operators
and goes on with one row, while no call is watched. A model of which all that follows is known as well can do without
that too: its logits are those of ``vit_end``, one node of autograd's graph, and the rest of its forward is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._torch_internals import has_global_hooks, has_hooks_inside, own_modules
from ..ops.vit_end import Options, Weights, may_end, vit_end
from .attachment import Attachment, Forward
from .attention_modules import AttentionLayer, is_hooked, plain_class
from .unfused_attention import is_watched

BlockForward = Callable[[Any, Tensor], Tensor]
"""A block and its input ``[B, N, D]`` -> its output for the class token, ``[B, 1, D]``."""
Attend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The attention module's input -> its projection ``[B, N, 3, H, d]``, and the class token's heads ``[B, 1, H, d]``."""
DirectForward = Callable[[Any, Tensor, Attend], Tensor]
"""A ``BlockForward`` that calls the last one in place of the attention module."""
End = Callable[[Any, Any], tuple[Weights, Options] | None]
"""A model and its last block, as they are now -> what ``vit_end`` takes; None where it computes something else."""


@dataclass(frozen=True)
class _Registered:
    block_class: type
    own_forward: Any  # the block class's own, when it was registered
    forward: BlockForward
    pools: Callable[[Any], bool]
    direct: Callable[[Any], DirectForward | None]
    end: End


class _Finished(Exception):  # noqa: N818 (no error)
    """Leaves the forward of a model whose logits are there."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits


_models: dict[type, _Registered] = {}
_libraries: dict[str, Callable[[], None]] = {}


def register_class_token_model(
    model_class: type,
    block_class: type,
    forward: BlockForward,
    pools: Callable[[Any], bool] = lambda model: True,
    direct: Callable[[Any], DirectForward | None] = lambda block: None,
    end: End = lambda model, block: None,
) -> None:
    """Allow the shortcut in models of exactly ``model_class``.

    Args:
        model_class: has ``blocks`` and ``norm`` (see above).
        block_class: of its last block, exactly.
        forward: of such a block, for the class token.
        pools: whether a given model reads nothing but the class token after its last block.
        direct: for a block as it is now, a forward that can replace ``forward``; None if there is none. It calls
            its third argument once, and after that what is twice differentiable by itself. The attention module
            has one linear layer for queries, keys and values, and does nothing to them.
        end: for a block that has a ``direct`` forward. The block normalizes by ``norm1`` first.
    """
    own_forward = block_class.forward  # pyright: ignore[reportAttributeAccessIssue] (a module's)
    _models[model_class] = _Registered(block_class, own_forward, forward, pools, direct, end)


def own_forwards(*classes: Any) -> dict[type, Any]:
    """Of each class the forward that it was written with; none of a class whose forward was replaced."""
    return {cls: cls.forward for cls in classes if cls.forward.__module__ == cls.__module__}


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
    block = next(reversed(own_modules(whole.blocks).values()), None)
    if block is None or plain_class(block) is not known.block_class:
        return None
    replaced = plain_class(block).forward is not known.own_forward
    if replaced or getattr(block, "attn", None) is not attention:
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

    def wrap(
        self,
        attachment: Attachment,
        layer: AttentionLayer,
        twice: Callable[[], bool],
        finish: Callable[[], Callable[[int], None] | None],
    ) -> None:
        """Wrap the attachment's model, and its last block if ``layer`` is its attention.

        Args:
            twice: whether what runs now is differentiated twice; else the modules' own forwards run.
            finish: returns what to call with the number of tokens in place of attention, None if that has to be seen.
        """
        model = attachment.model

        def run_model(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            allowed = class_token_block(module, layer.module) is not None
            allowed = allowed and attachment.sees_alone(layer.module)
            self.active = allowed and len(args) == 1 and not kwargs
            try:
                return forward(*args, **kwargs)
            except _Finished as finished:
                return finished.logits
            finally:
                self.active = False

        attachment.wrap(model, run_model)
        block, known = class_token_block(model, layer.module), _registered(model)
        if block is None or known is None:
            return

        def attend(x: Tensor) -> tuple[Tensor, Tensor]:
            def rest(qkv: Tensor) -> tuple[Tensor, Tensor]:
                return qkv, attachment.attend_by_hand(layer, qkv, queries=1)

            return attachment.run_by_hand(layer, x, rest)

        def logits(block: Any, x: Tensor) -> Tensor | None:
            """Those of ``vit_end``; None where it may not be called."""
            finished = finish()
            if finished is None or not attachment.calls.sees_alone():
                return None
            end = known.end(model, block) if may_end(x) else None
            if end is None:
                return None

            def rest(qkv: Tensor) -> Tensor:
                finished(qkv.shape[1])
                return vit_end(x[:, 0], qkv, *end)

            return attachment.run_by_hand(layer, block.norm1(x), rest)

        def run_block(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            if not self.active:
                return forward(*args, **kwargs)
            by_hand = twice() and attachment.calls.sees_first() and not has_global_hooks()
            direct = known.direct(module) if by_hand else None
            if direct is None:
                return known.forward(module, *args)
            (x,) = args
            try:
                found = logits(module, x)
                if found is not None:
                    raise _Finished(found)
                return direct(module, x, attend)
            finally:
                attachment.calls.start()

        attachment.wrap(block, run_block)
