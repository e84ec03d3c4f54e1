"""probe_heads: what each head of a trained model uses, holds and attends to."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import AttentionLayer, choose_layers
from ..attachment.indices import Integers
from ..attachment.parallel import unwrap
from ..errors import usage_error
from ..ops.checks import check_choice
from .attributes import Attribute, AttributeReader, balancing_weights, combinations
from .forwards import Forwards, Head, Seen, mean_ablated
from .head_probes import HeadProbes, kind_of
from .measures import agreement, decodability, halves, linear_cka, prevalence
from .regions import Swap, check_regions, check_swaps


def probe_heads(
    model: nn.Module,
    loader: Iterable[Any],
    attributes: Mapping[str, Attribute],
    *,
    layers: str | Integers = "last",
    regions: Mapping[str, Any] | None = None,
    swaps: str | Mapping[str, Swap] | None = None,
    ablation: str = "zero",
    decode: bool = True,
    seed: int = 0,
) -> HeadProbes:
    """Measure what each head does with attributes of the images, such as the label and a spurious one.

    >>> probes = dvf.probe_heads(model, loader, {"core": "labels", "spurious": places})
    >>> probes.rows()[0]["use_core"], probes.specialisation

    Every combination of the attributes' values counts the same, whatever its number of images, so that on average
    no attribute tells anything about another one: agreement with one is not agreement with the other in disguise.
    The standard error of a share p over n images is about ``sqrt(p (1 - p) / n)``, larger where combinations
    differ much in size.

    ==============  ============================================================  ==================================
    measure         definition                                                    source
    ==============  ============================================================  ==================================
    use             agreement of the prediction with the head alone in its layer  the paper's pruning, 2308.16274
    ablation        agreement without the head, minus that of all heads           the same
    decodability    StandardScaler and LogisticRegression of scikit-learn on the  Alain and Bengio, 1610.01644
                    class token's head output; fitted on a random half of each
                    combination, tested on the other
    selectivity     decodability minus that of shuffled outputs                   Hewitt and Liang, 1909.03368
    linear CKA      of the heads' class-token outputs, for every pair in a layer  Kornblith et al., 1905.00414
    attention mass  share of the class token's attention to patches in a region
    swaps           share of predictions that change with a part of the image
    ==============  ============================================================  ==================================

    What a head holds (decodability) is not what the model uses: compare the two.

    Args:
        model: a classifier, images -> logits ``[B, classes]`` or an object with ``.logits``, whose heads can be
            masked. The class token is the first token; without one, decodability, CKA and attention mass are
            those of the first token.
        loader: batches as in ``select_heads``. It runs once, twice for ``ablation="mean"``.
        attributes: by name, one value per image, among the model's class indices: ``"labels"`` or ``"groups"`` of
            the batches, a function ``(labels, groups) -> [b]`` of a batch, or the values of all images in the
            loader's order. Those named ``core`` and ``spurious`` give the heads' kinds.
        layers: ``"last"``, ``"all"`` or indices.
        regions: by name, a boolean mask ``[height, width]`` for all images, or ``[n, height, width]`` for each in
            the loader's order. Patches have to be square, and follow the class token row by row (and further
            tokens in front, as the model's ``num_prefix_tokens`` says).
        swaps: by attribute, a function ``(images, donors) -> images``, both ``[b, C, height, width]``, that puts
            the part of the donors which holds the attribute in place of the images' own; or ``"regions"``, to
            paste the regions that have an attribute's name. Donors are drawn from the same batch, among the
            images with another value of the attribute.
        ablation: ``"zero"``, or ``"mean"`` for the effect of the head's mean output as well, at each token.
        decode: False leaves out decodability and CKA; no scikit-learn is needed then.
        seed: of the donors, of the halves and of the shuffled outputs.

    Raises:
        UsageError: wrong arguments, an empty loader, batches of another kind, attributes with one value, with a
            combination that no image has or with values that are no class, masks of another size, logits that are
            not finite; scikit-learn is missing.
        UnsupportedError: heads that cannot be seen or masked; attention within windows (unless without ``decode``
            and ``regions``).
    """
    check_choice("ablation", ablation, ("zero", "mean"))
    model = unwrap(model)
    chosen = choose_layers(model, layers)
    reader = AttributeReader(attributes)
    masks = check_regions(regions)
    swapped = check_swaps(swaps, reader.names, masks)
    if ablation == "mean" and isinstance(loader, Iterator):
        wanted = "data that can be run through twice for ablation='mean'"
        raise usage_error("loader", wanted, "an iterator, which runs once", "pass a list")
    generator = torch.Generator().manual_seed(seed)
    forwards = Forwards(model, chosen, reader, masks, swapped, decode, generator)
    seen = forwards.run(loader)
    means = mean_ablated(forwards, loader) if ablation == "mean" else {}
    return _Table(seen, means, chosen, generator).probes()


class _Table:
    """Makes the rows out of what the forwards gave."""

    def __init__(
        self,
        seen: Seen,
        means: Mapping[Head, Tensor],
        layers: list[AttentionLayer],
        generator: torch.Generator,
    ):
        self._seen, self._means, self._layers = seen, means, layers
        for name, values in seen.values.items():
            if not 0 <= values.min() <= values.max() < seen.classes:
                got = f"{int(values.min())} to {int(values.max())}"
                wanted = f"class indices from 0 to {seen.classes - 1}"
                hint = "an attribute is compared with predictions: number its values so"
                raise usage_error(f"attributes[{name!r}]", wanted, got, hint)
        self._cell = combinations(seen.values)
        self._weights = balancing_weights(self._cell)
        self._values = {name: len(values.unique()) for name, values in seen.values.items()}
        self._generator = generator

    def probes(self) -> HeadProbes:
        heads = [(layer.index, head) for layer in self._layers for head in range(layer.num_heads)]
        rows = [{"layer": head[0], "head": head[1], **self._of(head)} for head in heads]
        if self._seen.outputs:
            for row, decoded in zip(rows, self._decoded(heads), strict=True):
                row |= decoded
        if {"core", "spurious"} <= self._values.keys():
            for row in rows:
                row["kind"] = kind_of(row, self._values)
        whole = {"prevalence": prevalence(self._seen.whole, self._weights)[1]}
        whole |= self._uses("use", self._seen.whole) | self._swaps(None, self._seen.whole)
        cka = {layer: linear_cka(x).tolist() for layer, x in self._seen.outputs.items()}
        return HeadProbes(rows, whole, cka, len(self._weights), self._values)

    def _of(self, head: Head) -> dict[str, Any]:
        seen = self._seen
        alone = seen.alone[head]
        row: dict[str, Any] = {"prevalence": prevalence(alone, self._weights)[1]}
        row |= self._uses("use", alone)
        row |= self._losses("zero", seen.without.get(head))
        if self._means:
            row |= self._losses("mean", self._means.get(head))
        row |= self._swaps(head, alone)
        for region, by_layer in seen.mass.items():
            row[f"mass_{region}"] = float((by_layer[head[0]][:, head[1]] * self._weights).sum())
            row[f"area_{region}"] = float((seen.areas[region] * self._weights).sum())
        return row

    def _uses(self, name: str, predicted: Tensor) -> dict[str, float]:
        return {
            f"{name}_{attribute}": agreement(predicted, values, self._weights)
            for attribute, values in self._seen.values.items()
        }

    def _losses(self, name: str, predicted: Tensor | None) -> dict[str, float | None]:
        if predicted is None:
            return {f"{name}_{attribute}": None for attribute in self._values}
        whole, without = self._uses(name, self._seen.whole), self._uses(name, predicted)
        return {column: without[column] - whole[column] for column in without}

    def _swaps(self, head: Head | None, predicted: Tensor) -> dict[str, float]:
        found = {}
        for attribute, (receivers, by_head) in self._seen.swapped.items():
            weights = self._weights[receivers]
            changed = (by_head[head] != predicted[receivers]) * weights
            found[f"swap_{attribute}"] = float(changed.sum() / weights.sum())
        return found

    def _decoded(self, heads: list[Head]) -> Iterator[dict[str, float]]:
        fitted = halves(self._cell, self._generator)
        weights = (balancing_weights(self._cell[fitted]), balancing_weights(self._cell[~fitted]))
        order = torch.empty(len(fitted), dtype=torch.long)
        for part in (fitted, ~fitted):  # outputs and values are mismatched within each part
            members = part.nonzero().flatten()
            order[members] = members[torch.randperm(len(members), generator=self._generator)]
        for layer, head in heads:
            row: dict[str, float] = {}
            outputs = self._seen.outputs[layer][:, head]
            for attribute, values in self._seen.values.items():
                found = decodability(outputs, values, fitted, weights)
                control = decodability(outputs[order], values, fitted, weights)
                row[f"decode_{attribute}"], row[f"control_{attribute}"] = found, control
                row[f"selectivity_{attribute}"] = found - control
            yield row
