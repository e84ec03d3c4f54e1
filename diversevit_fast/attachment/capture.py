"""Per-head outputs and attention maps of any forward pass."""

from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

from torch import Tensor, nn

from ..errors import UnsupportedError, usage_error
from .attachment import Attachment, Forward
from .attention_maps import AttentionMaps, chosen_queries, refuse_windows
from .attention_modules import AttentionLayer, choose_layers
from .indices import Integers, describe, whole_number
from .parallel import unwrap
from .support import refuse
from .torch_calls import open_attachments


class OfLayers:
    """One tensor for each chosen layer, in the model's order, as far as they have run.

    Args:
        name: what the user calls it.
        found: the tensors, by the layers' indices.
    """

    def __init__(self, name: str, layers: Sequence[AttentionLayer], found: dict[int, Tensor]):
        self._name, self._layers, self._found = name, layers, found

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: SupportsIndex) -> Tensor:
        """The tensor of the ``position``-th chosen layer.

        Raises:
            IndexError: there is no such chosen layer.
            UsageError: no integer, or the layer has not run inside the context.
        """
        number = whole_number(position)
        if number is None:
            hint = f"index with an integer; list({self._name}) holds all"
            wanted = "the position of a chosen layer"
            raise usage_error(self._name, wanted, describe(position), hint)
        layer = self._layers[number]
        if layer.index not in self._found:
            hint = "run the model inside the `with` block"
            wanted = "a forward of " + layer.name
            raise usage_error(f"{self._name}[{number}]", wanted, "none", hint)
        return self._found[layer.index]


class capture_heads(Attachment):  # noqa: N801 (a verb, like torch.no_grad)
    """Context manager that keeps the per-head outputs ``[B, H, N, d]`` of the forwards inside it.

    >>> with capture_heads(model, layers="all") as heads:
    ...     logits = model(images)
    >>> heads[-1].shape                     # the last chosen layer, of the last forward
    torch.Size([32, 12, 197, 64])

    The tensors are those that the model continued with, so the loss can be differentiated with respect
    to them. ``len(heads)`` is the number of chosen layers, in the model's order. They are kept until
    the context is entered again; a deep copy or a pickle has them without their graph.

    With ``maps`` the attention probabilities of chosen queries are kept as well, in ``heads.maps``:

    >>> with capture_heads(model, layers="all", maps="class") as heads:
    ...     logits = model(images)
    >>> heads.maps[-1].shape                # of the class token's query, over the keys
    torch.Size([32, 12, 1, 197])
    >>> (grad,) = torch.autograd.grad(logits[:, 3].sum(), heads.maps[-1])

    They are what the model continued with: the head outputs of these queries are computed from their maps, by
    the formula, and those of all others as without ``maps``. A map takes memory ``Q x N`` and has
    derivatives of any order; of the layers below it there are second derivatives inside ``dvf.second_order``.

    Args:
        model: as in ``HeadDiversity``.
        layers: ``"last"``, ``"all"`` or indices (negative allowed).
        maps: of which queries: None, of none; ``"class"`` or True, of the first, which is the class token of a
            model that has one; indices (negative allowed), in that order; ``"all"``, in N x N memory. In layers
            that attend within windows the first axis of a map is B times windows, and an index is one within
            every window.

    Attributes:
        maps: the probabilities ``[B, H, Q, N]`` of each chosen layer, ``maps[i]`` belonging to ``heads[i]``, at least
            in float32, after dropout where there is some. Rows that attend to nothing are zero.

    Raises:
        UsageError: no attention found, a layer or, in a forward, a query that does not exist; ``maps`` asked for
            after a context that makes none.
        UnsupportedError: the model is compiled at or above a chosen layer, or its heads cannot be seen;
            ``maps="class"`` of attention within windows; in a forward, maps of one layer by two contexts, or
            a layer that ``HeadDiversity(fraction=)`` runs on two parts of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Integers = "all",
        maps: str | bool | Integers | None = None,
    ):
        model = unwrap(model)
        self._queries = chosen_queries(maps)
        super().__init__(model, choose_layers(model, layers))
        refuse(self.layers, "wrt='output'")
        if self._queries == "class":
            refuse_windows(self.layers)

    def _reset(self) -> None:
        super()._reset()
        self._heads: dict[int, Tensor] = {}
        self._maps: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies: what was captured without its graph, which belongs to one forward."""
        heads, maps = (
            {index: x.detach() for index, x in found.items()} for found in (self._heads, self._maps)
        )
        return {**super().__getstate__(), "_heads": heads, "_maps": maps}

    def __copy__(self) -> "capture_heads":
        copied = object.__new__(type(self))
        found = {"_heads": dict(self._heads), "_maps": dict(self._maps)}
        copied.__setstate__({**self.__getstate__(), **found})
        return copied

    def forget(self) -> None:
        super().forget()
        self._heads.clear()
        self._maps.clear()

    def __enter__(self) -> "capture_heads":
        self._heads.clear()
        self._maps.clear()
        super().__enter__()
        return self

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        if any(getattr(x, "runs_part", False) for x in open_attachments()):
            raise UnsupportedError(
                f"capture_heads: {layer.name} runs on drawn samples and on the others separately, inside "
                "HeadDiversity(fraction=...); capture in another forward, or use fraction=1"
            )
        if self._queries is not None:
            if isinstance(attend, AttentionMaps):
                raise UnsupportedError(
                    f"maps: two contexts ask for those of {layer.name}; give one context the queries of both"
                )
            attend = AttentionMaps(attend, self._queries)
        heads = attend(*qkv, **options)
        self._heads[layer.index] = heads
        if isinstance(attend, AttentionMaps):
            self._maps[layer.index] = attend.map
        return heads

    @property
    def maps(self) -> OfLayers:
        if self._queries is None:
            hint = "pass maps='class', 'all' or indices of queries"
            raise usage_error("heads.maps", "a context that makes maps", "maps=None", hint)
        return OfLayers("heads.maps", self.layers, self._maps)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, position: SupportsIndex) -> Tensor:
        """The head outputs of the ``position``-th chosen layer.

        Raises:
            IndexError: there is no such chosen layer.
            UsageError: no integer, or the layer has not run inside the context.
        """
        return OfLayers("heads", self.layers, self._heads)[position]
