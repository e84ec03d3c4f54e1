"""The section "What each head does" of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..probes.head_probes import DEAD, KINDS, HeadProbes
from .head_plots import Picture, draw_heads
from .metrics import SPLIT_NAMES, Row, Summary
from .progress import NAMES


@dataclass(frozen=True)
class HeadSection:
    """What the page says about heads.

    Attributes:
        pictures: those that were drawn.
        kinds: a dictionary for each method: its name, specialisation, and mean number of heads of each kind.
        images: how many images were probed, and of which split.
        missing: trainings without probes.
    """

    pictures: list[Picture]
    kinds: list[dict[str, Any]]
    images: tuple[int, str]
    missing: list[str]
    dead: float = DEAD

    @classmethod
    def of(
        cls, rows: Sequence[Row], probes: Mapping[str, HeadProbes], folder: Path
    ) -> "HeadSection":
        """Draw the pictures of what was probed, and count the heads of each kind."""
        trained = dict.fromkeys(f"{r['method']}-seed{r['seed']}" for r in rows)
        missing = [task for task in trained if task not in probes]
        if not probes:
            return cls([], [], (0, ""), missing)
        first = next(iter(probes.values()))
        split = str(first.extra.get("origin", {}).get("options", {}).get("split"))
        kinds = []
        if all("kind" in found.table[0] for found in probes.values()):
            for method in dict.fromkeys(task.partition("-seed")[0] for task in probes):
                of_method = [p for t, p in probes.items() if t.partition("-seed")[0] == method]
                kinds.append({"method": NAMES.get(method, method), **kinds_of(of_method)})
        return cls(
            draw_heads(rows, probes, folder),
            kinds,
            (first.images, SPLIT_NAMES.get(split, split)),
            missing,
        )


def kinds_of(found: Sequence[HeadProbes]) -> dict[str, Any]:
    """Return the specialisation of one method's models, and the mean number of heads of each kind.

    Specialisation is a ``Summary`` over models that have live heads; None if none has.
    """
    special = [p.specialisation for p in found if p.specialisation == p.specialisation]
    counts = {kind: Summary.of([p.counts[kind] for p in found]).mean for kind in KINDS}
    return {"specialisation": Summary.of(special) if special else None, **counts}
