"""What a run shows: three claims, each held against an exact test over trainings.

======  ==========================================  =========================================  ====================
claim   compares                                    measure                                    test
======  ==========================================  =========================================  ====================
prune   the selected head with all heads, the same  accuracy on the OOD test set               signs of differences
        weights
differ  DiverseViT with ERM                         mean absolute cosine of two heads' input   labels of methods
                                                    gradients, less is as claimed
better  DiverseViT with ERM                         selected head's accuracy on the OOD test   labels of methods
======  ==========================================  =========================================  ====================

The tests assume nothing about how a measure is distributed. If the methods do not differ, their labels could as well
be dealt out anew over the trainings (Fisher's permutation test), and if pruning does nothing, the difference of each
training could as well have the other sign; p is twice the share of dealings that go at least as far to the same side.
Below 0.05 a claim is decided, which without any difference happens in at most 5 % of runs, however few the seeds. All
trainings share one data set: they speak about other seeds on these images, not about other images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import require
from .metrics import SELECTED, Row, find, of_run, present

LEVEL = 0.05
POWER = 0.8
_EXACT = 200_000  # dealings counted one by one (10 seeds each: 184 756); beyond, so many at random
_RESAMPLES = 9999

Said = Literal["shows", "is contradicted", "cannot tell"]


@dataclass(frozen=True)
class Verdict:
    """A claim and what the trainings say about it.

    Attributes:
        claim: "prune", "differ" or "better".
        means: of the two that are compared: with the claimed effect, without it.
        interval: 95 % of the difference of the means, by bootstrap over trainings; None below three.
        p: of the difference, two-sided.
        least_p: the smallest that so many trainings can give.
        detectable: about the difference that would be decided in 80 % of runs; None if none would be.
        trainings: how many of each of the two.
        sign: of a difference that is as claimed, 1 or -1.
    """

    claim: Literal["prune", "differ", "better"]
    means: tuple[float, float]
    interval: tuple[float, float] | None
    p: float
    least_p: float
    detectable: float | None
    trainings: tuple[int, int]
    sign: int = 1

    @property
    def difference(self) -> float:
        return self.means[0] - self.means[1]

    @property
    def said(self) -> Said:
        if self.p >= LEVEL:
            return "cannot tell"
        return "shows" if self.sign * self.difference > 0 else "is contradicted"


def verdicts(rows: Sequence[Row], cosines: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdicts that a run allows: "prune", and with both methods "differ" and "better".

    Args:
        rows: of ``metrics.csv``.
        cosines: of ``cosines.json``.
    """
    methods, seeds = present(rows)
    selected: dict[str, list[float]] = {method: [] for method in methods}
    whole: list[float] = []
    for method in methods:
        for run in filter(None, (of_run(rows, method, seed) for seed in seeds)):
            chosen = SELECTED.pick(run)
            at = chosen["epoch"], "test_ood"
            selected[method].append(find(run, *at, chosen["heads"])["accuracy"])
            whole.append(find(run, *at, "all")["accuracy"])
    pruned = [accuracy for method in methods for accuracy in selected[method]]
    found = [_by_signs("prune", pruned, whole)]
    if len(methods) == 2:
        alike = {method: likeness(cosines, method) for method in methods}
        found.append(by_labels("differ", alike["diversevit"], alike["erm"], sign=-1))
        found.append(by_labels("better", selected["diversevit"], selected["erm"]))
    return found


def likeness(cosines: Mapping[str, Any], method: str, when: str = "after") -> list[float]:
    """Return the mean absolute cosine over pairs of different heads, for each training of a method."""
    return [
        mean_of_pairs(matrices[when])
        for task, matrices in cosines.items()
        if task.partition("-")[0] == method
    ]


def mean_of_pairs(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean over a square matrix without its diagonal; 0 of one head."""
    pairs = [x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j]
    return sum(pairs) / len(pairs) if pairs else 0.0


def by_labels(claim: Any, treated: list[float], control: list[float], sign: int = 1) -> Verdict:
    """Return the verdict on a measure of trainings with and without what is claimed to change it.

    Args:
        sign: of a difference that is as claimed.
    """
    n, m = len(treated), len(control)
    p = _p_value((treated, control), _difference_of_means, "independent")
    spread = math.sqrt(
        (_squares(treated) + _squares(control)) / max(n + m - 2, 1) * (1 / n + 1 / m)
    )
    least = min(1.0, 2 / math.comb(n + m, n))
    return Verdict(
        claim,
        (_mean(treated), _mean(control)),
        _interval((treated, control), _difference_of_means),
        p,
        least,
        _detectable(spread, n + m - 2) if least < LEVEL else None,
        (n, m),
        sign,
    )


def _by_signs(claim: Any, treated: list[float], control: list[float]) -> Verdict:
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    n = len(differences)
    p = _p_value((differences,), _mean_of_one, "samples")
    spread = math.sqrt(_squares(differences) / max(n - 1, 1) / n)
    least = min(1.0, 2 / 2**n)
    return Verdict(
        claim,
        (_mean(treated), _mean(control)),
        _interval((differences,), _mean_of_one),
        p,
        least,
        _detectable(spread, n - 1) if least < LEVEL else None,
        (n, n),
    )


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a mean over trainings; None below three."""
    return _interval((list(values),), _mean_of_one)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _squares(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((x - mean) ** 2 for x in values)


def _difference_of_means(x: Any, y: Any, axis: int) -> Any:
    return x.mean(axis) - y.mean(axis)


def _mean_of_one(x: Any, axis: int) -> Any:
    return x.mean(axis)


def _p_value(samples: tuple[list[float], ...], statistic: Callable[..., Any], kind: str) -> float:
    stats = require("scipy.stats", extra="train")
    if min(map(len, samples)) < 2:
        return 1.0  # scipy takes no such sample, and it decides nothing
    found = stats.permutation_test(
        samples,
        statistic,
        permutation_type=kind,
        vectorized=True,
        n_resamples=_EXACT,
        batch=10_000,
        random_state=0,
    )
    return float(found.pvalue)


def _interval(
    samples: tuple[list[float], ...], statistic: Callable[..., Any]
) -> tuple[float, float] | None:
    if min(map(len, samples)) < 3:
        return None
    stats = require("scipy.stats", extra="train")
    found = stats.bootstrap(
        samples, statistic, n_resamples=_RESAMPLES, method="percentile", random_state=0
    ).confidence_interval
    return float(found.low), float(found.high)


def _detectable(standard_error: float, freedom: int) -> float | None:
    """About the difference that a t-test with this standard error decides in POWER of runs."""
    if freedom < 1:
        return None
    stats, optimize = (
        require("scipy.stats", extra="train"),
        require("scipy.optimize", extra="train"),
    )
    critical = stats.t.ppf(1 - LEVEL / 2, freedom)

    def short_of(shift: float) -> float:
        return stats.nct.sf(critical, freedom, shift) - POWER

    return standard_error * float(optimize.brentq(short_of, 0.0, 100.0))
