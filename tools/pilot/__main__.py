"""Measure the cells of the pilot that are missing, say what they choose: ``python -m tools.pilot erm``.

The rule is that of docs/science/plan.md, which was written before. Kill it at any time: the next call
goes on with the first cell that the file does not hold. ``--seeds`` takes a part of the seeds, so that
processes share the work, each with a file of its own; ``choose`` reads several files.
"""

import argparse
import sys
from pathlib import Path

from .cells import Cell, measure_missing, read_lines
from .choose import choose_regime, choose_weight, table

SEEDS = (100,)
CORRELATIONS = (0.9, 0.95, 0.98, 1.0)
RATES = (3e-4, 1e-3)
WEIGHTS = (0.1, 1.0, 10.0, 100.0)
EPOCHS = 12


def erm_cells(seeds: tuple[int, ...], rates: tuple[float, ...], core: bool) -> list[Cell]:
    """Return the cells that choose correlation and learning rate."""
    if core:
        return [Cell("core", CORRELATIONS[0], lr, EPOCHS, seed) for seed in seeds for lr in rates]
    return [
        Cell("erm", correlation, lr, EPOCHS, seed)
        for seed in seeds
        for lr in rates
        for correlation in CORRELATIONS
    ]


def penalty_cells(seeds: tuple[int, ...], correlation: float, lr: float) -> list[Cell]:
    """Return the cells that choose the penalty's weight."""
    return [
        Cell("diversevit", correlation, lr, EPOCHS, seed, weight)
        for seed in seeds
        for weight in WEIGHTS
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run one stage of the pilot, or print what the files choose."""
    parser = argparse.ArgumentParser(prog="python -m tools.pilot", description=__doc__)
    parser.add_argument("stage", choices=("erm", "core", "penalty", "choose"))
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines; the first is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--correlation", type=float, help="of stage penalty")
    parser.add_argument("--lr", type=float, help="of stage penalty; one of the others, if not all")
    given = parser.parse_args(arguments)
    seeds = tuple(given.seeds)
    if given.stage in ("erm", "core"):
        rates = RATES if given.lr is None else (given.lr,)
        measure_missing(erm_cells(seeds, rates, given.stage == "core"), given.files[0])
    elif given.stage == "penalty":
        if given.correlation is None or given.lr is None:
            parser.error("penalty needs --correlation and --lr, as the stage erm chose them")
        measure_missing(penalty_cells(seeds, given.correlation, given.lr), given.files[0])
    lines = [line for path in given.files for line in read_lines(path)]
    print(table(lines))
    erm = [line for line in lines if line["kind"] != "diversevit"]
    if given.stage == "choose" and erm:
        correlation, lr, why = choose_regime(erm)
        print(f"correlation {correlation:g}, learning rate {lr:g}: {why}")
        regularised = [line for line in lines if line["kind"] == "diversevit"]
        if regularised:
            print(f"penalty weight {choose_weight(regularised, correlation, lr):g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
