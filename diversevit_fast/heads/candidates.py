"""The choices of heads that are compared: each head alone, or every combination."""

from collections.abc import Sequence
from itertools import chain, combinations, product

from ..attachment.attention_modules import AttentionLayer
from ..errors import usage_error

Kept = dict[int, list[int]]
MAX_CANDIDATES = 4096


def single_heads(layers: Sequence[AttentionLayer]) -> list[list[Kept]]:
    """The candidates of each layer: one of its heads alone."""
    return [[{layer.index: [head]} for head in range(layer.num_heads)] for layer in layers]


def all_combinations(layers: Sequence[AttentionLayer]) -> list[Kept]:
    """Every combination of the layers' heads, fewer heads first; at least one head stays in each.

    Raises:
        UsageError: there are more than 4096.
    """
    count = 1
    for layer in layers:
        count *= 2**layer.num_heads - 1
    if count > MAX_CANDIDATES:
        wanted = f"at most {MAX_CANDIDATES} combinations for 'exhaustive'"
        raise usage_error("search", wanted, count, "use 'greedy', or choose fewer layers")
    subsets = [
        list(chain(*(combinations(range(layer.num_heads), n + 1) for n in range(layer.num_heads))))
        for layer in layers
    ]
    return [
        {layer.index: list(h) for layer, h in zip(layers, heads, strict=True)}
        for heads in product(*subsets)
    ]
