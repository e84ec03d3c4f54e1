"""Run a model on a loader for probes: with all heads, with each head alone, without each, on swapped images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attachment import Forward
from ..attachment.attention_maps import AttentionMaps
from ..attachment.attention_modules import AttentionLayer
from ..attachment.capture import capture_heads
from ..errors import UnsupportedError, usage_error
from ..heads.evaluation import evaluating
from ..heads.loader_batches import Batch, split_batch
from ..heads.prefix_cache import PrefixCache
from .attributes import AttributeReader
from .measures import attention_mass, patch_shares
from .regions import Swap, draw_donors, masks_of

Head = tuple[int, int]
"""A layer's index and a head's number."""


@dataclass
class Seen:
    """What the forwards gave, for all n images of the loader.

    Attributes:
        classes: the number C of logits.
        whole: predictions of all heads, int64 ``[n]``.
        alone, without: predictions with one head alone in its layer, and with all but one, by head.
        outputs: by layer, the class token's head outputs ``[n, H, d]``.
        mass: by region and layer, shares of the class token's attention to patches ``[n, H]``.
        areas: by region, its share of the image's patches ``[n]``.
        swapped: by attribute, the images that had a donor, int64 ``[m]``, and the predictions on them with
            the attribute's part replaced, int64 ``[m]``, by head, and by None for all heads.
    """

    classes: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    whole: Tensor = field(default_factory=lambda: torch.empty(0))
    alone: dict[Head, Tensor] = field(default_factory=dict)
    without: dict[Head, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    mass: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    areas: dict[str, Tensor] = field(default_factory=dict)
    swapped: dict[str, tuple[Tensor, dict[Head | None, Tensor]]] = field(default_factory=dict)


@dataclass
class Forwards:
    """The forwards of one probing; see ``probe_heads`` for the arguments."""

    model: nn.Module
    layers: Sequence[AttentionLayer]
    reader: AttributeReader
    regions: Mapping[str, Tensor]
    swaps: Mapping[str, Swap]
    keep_outputs: bool
    generator: torch.Generator

    def run(self, loader: Iterable[Any]) -> Seen:
        """Return what all forwards of ``loader`` gave.

        Raises:
            UsageError, UnsupportedError: as ``probe_heads``.
        """
        parts: dict[Any, list[Tensor]] = {}
        seen = classes = 0
        cache = WatchedHeads(self.model, self.layers)
        with evaluating(self.model), cache:
            for batch in self.batches(loader):
                values = self.reader.read(batch, seen)
                given: list[tuple[Any, Tensor]] = [(("values", a), x) for a, x in values.items()]
                if self.keep_outputs or self.regions:
                    cache.watch(maps=bool(self.regions))
                for layer in self.layers:
                    for name, logits in self._choices(cache, layer, batch, without=True):
                        classes = max(classes, logits.shape[1])
                        given.append((name, logits.argmax(-1)))
                for attribute in self.swaps:
                    given += self._swapped(cache, attribute, batch, values[attribute], seen)
                given += self._watched(cache, batch, seen)
                for name, tensor in given:
                    parts.setdefault(name, []).append(tensor)
                seen += batch.size
        if not seen:
            raise usage_error("loader", "at least one batch", "none", "pass a list or a DataLoader")
        self.reader.check_end(seen)
        for name, mask in self.regions.items():
            if mask.ndim == 3 and len(mask) != seen:
                got = f"{len(mask)} masks"
                wanted = f"{seen}, one for each image of the loader"
                raise usage_error(f"regions[{name!r}]", wanted, got, "check the order")
        return _sorted({name: torch.cat(found) for name, found in parts.items()}, classes)

    def batches(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of ``loader``, on the model's device."""
        if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
            got = type(loader).__name__
            raise usage_error(
                "loader", "an iterable of batches", got, "pass a list or a DataLoader"
            )
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for item in loader:
            yield split_batch("loader", item, self.model, device)

    def _choices(
        self, cache: PrefixCache, layer: AttentionLayer, batch: Batch, without: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield logits ``[b, C]`` of all heads, each head of ``layer`` alone and, if wanted, all but it."""
        every = range(layer.num_heads)
        named: list[tuple[Any, list[int]]] = []
        if layer is self.layers[0]:  # the same for each layer
            named.append((("whole",), list(every)))
        named += [(("alone", (layer.index, head)), [head]) for head in every]
        if without and layer.num_heads > 1:
            named += [
                (("without", (layer.index, head)), [h for h in every if h != head])
                for head in every
            ]
        choices = [{layer.index: kept} for _, kept in named]
        outputs = cache.outputs(choices, *batch.args, **batch.kwargs)
        for (name, _), output in zip(named, outputs, strict=True):
            yield name, _logits(output, batch.size)

    def _watched(
        self, cache: "WatchedHeads", batch: Batch, seen: int
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield head outputs and attention masses of the class token."""
        for layer in self.layers if self.keep_outputs or self.regions else ():
            heads = cache.heads[layer.index]
            if len(heads) != batch.size:
                raise UnsupportedError(
                    f"probe_heads: {layer.name} attends within windows, which have no class token; "
                    "pass decode=False and no regions"
                )
            if self.keep_outputs:
                yield ("outputs", layer.index), heads
            if self.regions:
                yield from self._masses(layer, cache.maps[layer.index], batch, seen)

    def _masses(
        self, layer: AttentionLayer, rows: Tensor, batch: Batch, seen: int
    ) -> Iterator[tuple[Any, Tensor]]:
        images, prefix = _images(batch), getattr(self.model, "num_prefix_tokens", 1)
        for name, mask in self.regions.items():
            masks = masks_of(name, mask, seen, images)
            shares = patch_shares(masks, max(1, rows.shape[-1] - prefix))
            yield ("mass", name, layer.index), attention_mass(rows, shares, prefix)
            if layer is self.layers[0]:
                yield ("areas", name), shares.mean(1).expand(batch.size)

    def _swapped(
        self, cache: PrefixCache, attribute: str, batch: Batch, values: Tensor, seen: int
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield predictions on the images whose part of ``attribute`` is another image's."""
        receivers, donors = draw_donors(values, self.generator)
        if not len(receivers):
            return
        images = _images(batch)
        where = receivers.to(images.device)
        changed = self.swaps[attribute](images[where], images[donors.to(images.device)])
        if not isinstance(changed, Tensor) or changed.shape != images[where].shape:
            got = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            wanted = f"images {list(images[where].shape)}, as those it was given"
            raise usage_error(f"swaps[{attribute!r}]", wanted, got, "return the changed images")
        yield ("receivers", attribute), receivers + seen
        altered = Batch((changed,)) if batch.args else Batch((), {_image_key(batch): changed})
        for layer in self.layers:
            for (_, *head), logits in self._choices(cache, layer, altered, without=False):
                yield ("swapped", attribute, head[0] if head else None), logits.argmax(-1)


class WatchedHeads(PrefixCache):
    """A ``PrefixCache`` that keeps what the class token gets from the heads in the first forward it watches.

    Attributes:
        heads, maps: by layer, head outputs ``[b, H, d]`` and attention ``[b, H, N]`` of the class token.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        super().__init__(model, layers)
        self.heads: dict[int, Tensor] = {}
        self.maps: dict[int, Tensor] = {}
        self._waiting: set[int] = set()
        self._wants_maps = False

    def watch(self, *, maps: bool) -> None:
        """Keep the heads of the next forward of every layer, with maps if wanted."""
        self._waiting, self._wants_maps = {layer.index for layer in self.layers}, maps

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        if layer.index not in self._waiting:
            return super().on_attention(layer, attend, qkv, options)
        self._waiting.remove(layer.index)
        mapped = AttentionMaps(attend, "class") if self._wants_maps else attend

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            heads = mapped(*args, **kwargs)
            self.heads[layer.index] = heads[:, :, 0].cpu()
            if isinstance(mapped, AttentionMaps):
                self.maps[layer.index] = mapped.map[:, :, 0].cpu()
            return heads

        return super().on_attention(layer, watched, qkv, options)


class MeanAblation(PrefixCache):
    """A ``PrefixCache`` in which a head that goes leaves its mean over images, and the others stay as they are.

    Args:
        means: by layer, the heads' mean outputs ``[H, N, d]``.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[AttentionLayer], means: Mapping[int, Tensor]
    ):
        super().__init__(model, layers)
        self._means = means

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        scaled = super().on_attention(layer, attend, qkv, options)
        scale = self._scale.get(layer.index)
        if scale is None or bool((scale != 0).all()):
            return scaled
        scale = scale.to(scaled)[:, None, None]
        mean = self._means[layer.index].to(scaled)
        return torch.where(scale == 0, mean, scaled / scale.clamp(min=1))


def mean_ablated(forwards: Forwards, loader: Iterable[Any]) -> dict[Head, Tensor]:
    """Return the predictions int64 ``[n]`` with each head replaced by its mean over the images; two runs.

    Raises:
        UnsupportedError: the images have different numbers of tokens.
    """
    model, layers = forwards.model, forwards.layers
    sums: dict[int, Tensor] = {}
    count, chosen = 0, [layer.index for layer in layers]
    with evaluating(model), torch.no_grad(), capture_heads(model, chosen) as heads:
        for batch in forwards.batches(loader):
            model(*batch.args, **batch.kwargs)
            count += batch.size
            for position, layer in enumerate(layers):
                total = heads[position].double().sum(0)
                if layer.index in sums and sums[layer.index].shape != total.shape:
                    raise UnsupportedError(
                        "ablation='mean': the images have different numbers of tokens, so there is no mean"
                    )
                sums[layer.index] = sums.get(layer.index, 0) + total
    parts: dict[Head, list[Tensor]] = {}
    means = {index: total / count for index, total in sums.items()}
    cache = MeanAblation(model, layers, means)
    with evaluating(model), cache:
        for batch in forwards.batches(loader):
            for layer in layers:
                every = range(layer.num_heads if layer.num_heads > 1 else 0)
                choices = [{layer.index: [h for h in every if h != head]} for head in every]
                outputs = cache.outputs(choices, *batch.args, **batch.kwargs)
                for head, output in zip(every, outputs, strict=True):
                    found = _logits(output, batch.size).argmax(-1)
                    parts.setdefault((layer.index, head), []).append(found)
    return {head: torch.cat(found) for head, found in parts.items()}


def _sorted(joined: Mapping[Any, Tensor], classes: int) -> Seen:
    seen = Seen(classes)
    for (kind, *rest), tensor in joined.items():
        if kind == "whole":
            seen.whole = tensor
        elif kind == "mass":
            seen.mass.setdefault(rest[0], {})[rest[1]] = tensor
        elif kind == "swapped":
            seen.swapped.setdefault(rest[0], (joined["receivers", rest[0]], {}))
            seen.swapped[rest[0]][1][rest[1]] = tensor
        elif kind != "receivers":
            getattr(seen, kind)[rest[0]] = tensor
    return seen


def _logits(output: Any, count: int) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        hint = "wrap the model in one that returns them"
        raise usage_error("model", f"logits [{count}, classes]", got, hint)
    if not torch.isfinite(logits).all():
        raise usage_error("model", "finite logits", "NaN or infinity", "check the weights")
    return logits.float().cpu()


def _image_key(batch: Batch) -> str:
    named = [key for key, x in batch.kwargs.items() if x.ndim == 4]
    return named[0] if len(named) == 1 and len(batch.kwargs) == 1 else ""


def _images(batch: Batch) -> Tensor:
    """Return the images ``[b, C, height, width]`` of a batch."""
    found = batch.args[0] if batch.args else batch.kwargs.get(_image_key(batch))
    if found is None or found.ndim != 4:
        wanted = "batches with one tensor of images [b, C, height, width]"
        got = "none" if found is None else list(found.shape)
        raise usage_error("loader", wanted, got, "leave regions and swaps out")
    return found
