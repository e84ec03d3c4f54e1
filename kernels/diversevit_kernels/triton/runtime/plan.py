"""Launch plans: find the configuration that a kernel is launched with, once per launch.

Each operator has its launch tables in a ``configs.py``: one ``LaunchTable`` per kernel, with rows that say which chips,
element sizes and widths they serve. At most one row serves a launch, so their order means nothing (a test checks it).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import COMPILER_OPTIONS, architecture, family

INTERPRETER = ("interpreter",)
AMPERE, HOPPER, BLACKWELL = ("ampere",), ("hopper",), ("blackwell",)
RTX_BLACKWELL, OLDER = ("rtx_blackwell",), ("older_nvidia",)
AMD, OTHER = ("amd",), ("other",)
NVIDIA = AMPERE + HOPPER + BLACKWELL + RTX_BLACKWELL + OLDER
EVERY_CHIP = NVIDIA + AMD + OTHER
"""Families of architectures (``device.FAMILIES``), to be added up in rows."""

HALF, SINGLE, DOUBLE = (2,), (4,), (8,)
ANY_SIZE = HALF + SINGLE + DOUBLE
"""Bytes of an element, to be added up in rows."""

UNBOUNDED = 1 << 62
ANY_WIDTH = (0, UNBOUNDED)


class Target(NamedTuple):
    """Device, dtype and width of a launch: what its configuration depends on, besides the kernel.

    Each operator says what the width is: that of a head, that of a row, or a number of heads.
    """

    architecture: str
    dtype: torch.dtype
    width: int


def target_of(like: Tensor, width: int = 1) -> Target:
    """The target of a launch on the device and in the dtype of ``like``."""
    return Target(architecture(like.device), like.dtype, width)


@dataclass(frozen=True)
class Configuration:
    """Tile sizes (constexpr arguments of the kernel), warps and pipeline stages of a launch."""

    tiles: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    def __getitem__(self, tile: str) -> int:
        return self.keywords[tile]

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """The keywords that a kernel is called with: tile sizes and options of the compiler."""
        options = {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}
        return {**dict(self.tiles), **options}


@dataclass(frozen=True)
class Row:
    """A configuration, and the launches that it serves."""

    families: tuple[str, ...]
    itemsizes: tuple[int, ...]
    above: int  # it serves widths in (above, up_to]
    up_to: int
    configuration: Configuration

    def serves(self, family: str, itemsize: int, width: int) -> bool:
        return (
            family in self.families
            and itemsize in self.itemsizes
            and self.above < width <= self.up_to
        )


def row(
    families: tuple[str, ...],
    itemsizes: tuple[int, ...],
    widths: tuple[int, int],
    *,
    warps: int,
    stages: int,
    **tiles: int,
) -> Row:
    """A row of a launch table for ``widths`` (above, up to]."""
    return Row(families, itemsizes, *widths, Configuration(tuple(tiles.items()), warps, stages))


@dataclass(frozen=True, eq=False)
class Plan:
    """A configuration that was found in a launch table. The same plan is returned for the same target."""

    table: "LaunchTable"
    configuration: Configuration
    whole: str = ""  # a tile that holds all of something: autotuning must not make it smaller

    def __getitem__(self, tile: str) -> int:
        return self.configuration[tile]

    def holding(self, n: int, tile: str) -> "Plan | None":
        """This plan for a launch whose tile ``tile`` holds ``n``; None if it does not."""
        return replace(self, whole=tile) if n <= self[tile] else None

    def candidates(self) -> list[Configuration]:
        """Configurations that autotuning tries instead, this plan's first."""
        some = self.table.candidates(self.configuration)
        return [c for c in some if not self.whole or c[self.whole] >= self[self.whole]]


class LaunchTable:
    """The launch configurations of one kernel."""

    def __init__(self, name: str, *rows: Row):
        self.name = name
        self.rows = rows
        self._plans: dict[Target, Plan | None] = {}

    def find(self, target: Target) -> Plan | None:
        """The plan for a launch; None if no row serves it."""
        try:
            return self._plans[target]
        except KeyError:
            return self._plans.setdefault(target, self._search(target))

    def _search(self, target: Target) -> Plan | None:
        key = family(target.architecture), target.dtype.itemsize, target.width
        found = [row.configuration for row in self.rows if row.serves(*key)]
        return Plan(self, found[0]) if found else None

    def plan(self, target: Target) -> Plan:
        """``find``, where a launch must have a plan.

        Raises:
            NotImplementedError: no row serves it.
        """
        found = self.find(target)
        if found is None:
            raise NotImplementedError(
                f"{self.name}: no launch configuration for width {target.width}, {target.dtype}, "
                f"on {target.architecture}"
            )
        return found

    def holding(self, n: int, tile: str, target: Target) -> Plan | None:
        """``find``, if the configuration's tile ``tile`` holds ``n``."""
        found = self.find(target)
        return None if found is None else found.holding(n, tile)

    def candidates(self, first: Configuration) -> list[Configuration]:
        """Configurations that autotuning tries: tiles of every row, at 4 and 8 warps, 1 to 3 stages.

        ``first`` comes first, so that it wins ties.
        """
        tried = [
            Configuration(row.configuration.tiles, warps, stages)
            for row in self.rows
            if row.families != INTERPRETER
            for warps in (4, 8)
            for stages in (1, 2, 3)
        ]
        return list(dict.fromkeys([first, *tried]))


Grid = Callable[[Configuration], int]
"""The number of programs under a configuration."""
