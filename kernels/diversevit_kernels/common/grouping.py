"""The shape of a penalty, for every backend: groups of tokens, tiles of tokens, statistics of groups.

A *group* is what one Gram matrix is about: a token, or all tokens of a sample.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Some tokens of one sample, or all tokens of some samples."""

    samples: slice
    tokens: slice


class Grouping(NamedTuple):
    """The shape of a problem: which tokens form a group, and how much a group counts in the mean."""

    B: int
    H: int
    N: int
    granularity: str
    reduction: str
    eps: float

    @property
    def by_token(self) -> bool:
        return self.granularity == "token"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B, self.N) if self.by_token else (self.B,)

    @property
    def weight(self) -> float:
        """ω of (32): the weight of one squared cosine in the mean over groups and head pairs."""
        pairs = self.H * (self.H if self.reduction == "all" else self.H - 1)
        return 1 / (pairs * self.B * (self.N if self.by_token else 1))

    def blocks(self, tokens: int) -> Iterator[list[Tile]]:
        """Tiles of at most ``tokens`` tokens, in lists that together hold whole groups."""
        samples = max(1, tokens // self.N)
        for b in range(0, self.B, samples):
            some = slice(b, min(self.B, b + samples))
            tiles = [
                Tile(some, slice(i, min(self.N, i + tokens))) for i in range(0, self.N, tokens)
            ]
            yield from ([t] for t in tiles) if self.by_token else [tiles]

    def of(self, x: Tensor, t: Tile) -> Tensor:
        """The tile's groups of a statistic: ``[B, (N,) ...] -> [groups, ...]``, a view if dense."""
        return x[t.samples, t.tokens].flatten(0, 1) if self.by_token else x[t.samples]


class Statistics(NamedTuple):
    """Statistics of all groups (after ``of``: of a tile's), and their cotangents. In a Triton kernel: pointers."""

    cosines: Any  # Tensor [groups, H, H]
    norms: Any  # Tensor [groups, H]
    dpenalty: Any = None  # Tensor [] cotangent of the penalty, or None
    dcosines: Any = None  # Tensor [groups, H, H] cotangent of the cosines, or None

    def of(self, g: Grouping, t: Tile) -> "Statistics":
        dcosines = None if self.dcosines is None else g.of(self.dcosines, t)
        return Statistics(g.of(self.cosines, t), g.of(self.norms, t), self.dpenalty, dcosines)
