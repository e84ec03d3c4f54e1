"""Per-head outputs of any forward pass."""

from typing import Any, SupportsIndex

from torch import Tensor, nn

from ..errors import usage_error
from .attachment import Attachment, Forward
from .attention_modules import AttentionLayer, choose_layers
from .indices import Integers, describe, whole_number
from .parallel import unwrap
from .support import refuse


class capture_heads(Attachment):  # noqa: N801 (a verb, like torch.no_grad)
    """Context manager that keeps the per-head outputs ``[B, H, N, d]`` of the forwards inside it.

    >>> with capture_heads(model, layers="all") as heads:
    ...     logits = model(images)
    >>> heads[-1].shape                     # the last chosen layer, of the last forward
    torch.Size([32, 12, 197, 64])

    The tensors are those that the model continued with, so the loss can be differentiated with respect
    to them. ``len(heads)`` is the number of chosen layers, in the model's order. They are kept until
    the context is entered again; a deep copy or a pickle has them without their graph.

    Args:
        model: as in ``HeadDiversity``.
        layers: ``"last"``, ``"all"`` or indices (negative allowed).

    Raises:
        UsageError: no attention found, or a layer that does not exist.
        UnsupportedError: the model is compiled at or above a chosen layer, or its heads cannot be seen.
    """

    def __init__(self, model: nn.Module, layers: str | Integers = "all"):
        model = unwrap(model)
        super().__init__(model, choose_layers(model, layers))
        refuse(self.layers, "wrt='output'")
        self._heads: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies: head outputs without their graph, which belongs to one forward."""
        detached = {index: heads.detach() for index, heads in self._heads.items()}
        return {**super().__getstate__(), "_heads": detached}

    def __copy__(self) -> "capture_heads":
        copied = object.__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "_heads": dict(self._heads)})
        return copied

    def __enter__(self) -> "capture_heads":
        self._heads.clear()
        super().__enter__()
        return self

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        heads = attend(*qkv, **options)
        self._heads[layer.index] = heads
        return heads

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, position: SupportsIndex) -> Tensor:
        """The head outputs of the ``position``-th chosen layer.

        Raises:
            IndexError: there is no such chosen layer.
            UsageError: no integer, or the layer has not run inside the context.
        """
        number = whole_number(position)
        if number is None:
            hint = "index with an integer; list(heads) holds all"
            raise usage_error("heads", "the position of a chosen layer", describe(position), hint)
        layer = self.layers[number]
        if layer.index not in self._heads:
            hint = "run the model inside the `with` block"
            raise usage_error(f"heads[{number}]", "a forward of " + layer.name, "none", hint)
        return self._heads[layer.index]
