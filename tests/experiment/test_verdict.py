"""Verdicts: exact p-values against counting by hand, and how often samples of one distribution get one."""

import itertools
import math

import numpy as np
import pytest

from diversevit_fast.experiment import verdict
from diversevit_fast.experiment.report import verdict_sentence
from diversevit_fast.experiment.verdict import Verdict, likeness, mean_of_pairs, verdicts

pytest.importorskip("scipy")

AUTHORS = {  # OOD test accuracies of about their published spread: mean and deviation over ten seeds
    "erm": (0.625, 0.033),
    "diversevit": (0.701, 0.022),
}


def by_labels(treated, control, sign=1) -> Verdict:
    return verdict.by_labels("better", list(treated), list(control), sign)


def by_signs(differences) -> Verdict:
    return verdict._by_signs("prune", list(differences), [0.0] * len(differences))


def counted_by_labels(treated, control) -> float:
    pooled = [*treated, *control]
    n, total = len(treated), math.fsum(pooled)

    def difference(chosen):
        inside = math.fsum(pooled[i] for i in chosen)
        return inside / n - (total - inside) / (len(pooled) - n)

    observed = difference(range(n))
    all_of = [difference(c) for c in itertools.combinations(range(len(pooled)), n)]
    above = sum(d >= observed - 1e-12 for d in all_of) / len(all_of)
    below = sum(d <= observed + 1e-12 for d in all_of) / len(all_of)
    return min(1.0, 2 * min(above, below))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (3, 5), (2, 6)])
def test_labels_are_counted_exactly(sizes):
    random = np.random.default_rng(0)
    for _ in range(5):
        samples = [list(random.normal(size=n).round(1)) for n in sizes]  # rounded: ties occur
        assert by_labels(*samples).p == pytest.approx(counted_by_labels(*samples))


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_signs_are_counted_exactly(n):
    differences = np.random.default_rng(n).normal(0.5, size=n)
    means = [np.dot(signs, differences) / n for signs in itertools.product((1, -1), repeat=n)]
    share = np.mean([mean >= differences.mean() - 1e-12 for mean in means])
    assert by_signs(differences).p == pytest.approx(min(1, 2 * min(share, 1 - share + 1 / 2**n)))


def p_values(samples, weights):
    """Of every row of ``samples``; ``weights`` has a row for each dealing, the first as it was."""
    of = samples @ weights.T
    above, below = ((sign * of >= sign * of[:, :1] - 1e-12).mean(1) for sign in (1, -1))
    return np.minimum(1, 2 * np.minimum(above, below))


@pytest.mark.parametrize("n", range(2, 11))
def test_without_a_difference_at_most_one_run_in_twenty_gets_a_verdict(n):
    random, runs = np.random.default_rng(n), 200
    dealings = itertools.combinations(range(2 * n), n)
    weights = np.full((math.comb(2 * n, n), 2 * n), -1 / n)
    for row, chosen in zip(weights, dealings, strict=True):
        row[list(chosen)] = 1 / n
    samples = random.exponential(size=(runs, 2 * n))
    labels = p_values(samples, weights)
    assert by_labels(samples[0, :n], samples[0, n:]).p == pytest.approx(labels[0])
    differences = random.standard_t(2, size=(runs, n))
    signs = p_values(differences, np.array(list(itertools.product((1, -1), repeat=n))) / n)
    assert by_signs(differences[0]).p == pytest.approx(signs[0])
    for found in (labels, signs):
        decided = np.sum(found < verdict.LEVEL)
        assert decided <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)
    assert n > 3 or not np.any(labels < verdict.LEVEL)


def test_the_published_difference_is_seen_from_enough_seeds():
    random = np.random.default_rng(0)
    ten = [
        by_labels(*(random.normal(*AUTHORS[m], 10) for m in ("diversevit", "erm")))
        for _ in range(5)
    ]
    assert all(found.said == "shows" and found.p < 1e-3 for found in ten)
    two = by_labels([0.9, 0.91], [0.1, 0.11])
    assert two.said == "cannot tell"
    assert two.least_p == pytest.approx(two.p)
    assert two.detectable is None


def test_a_difference_the_other_way_contradicts():
    low, high = [0.1, 0.11, 0.12, 0.13], [0.2, 0.21, 0.22, 0.23]
    assert by_labels(low, high).said == "is contradicted"
    assert by_labels(low, high, sign=-1).said == "shows"


def test_interval_and_detectable_difference_measure_the_spread():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 8))
    wide, narrow = by_labels(x, y), by_labels(x / 10, y / 10)
    assert wide.interval is not None
    assert wide.detectable is not None
    assert wide.interval[0] < wide.difference < wide.interval[1]
    assert wide.detectable == pytest.approx(10 * narrow.detectable)


@pytest.mark.parametrize("n", [5, 7])
def test_the_detectable_difference_is_decided_in_about_80_percent(n, monkeypatch):
    monkeypatch.setattr(verdict, "_interval", lambda *of: None)
    random = np.random.default_rng(0)
    samples = random.normal(size=(200, 2, n))
    shift = np.sqrt(np.mean([by_labels(*x).detectable ** 2 for x in samples]))
    decided = np.mean([by_labels(x + shift, y).said == "shows" for x, y in samples])
    assert 0.65 < decided < 0.92


def rows_of(method, seed, selected, whole):
    at = {"method": method, "seed": seed, "epoch": 1}
    cells = [("val_ood", "0", 0.9), ("test_ood", "0", selected), ("test_ood", "all", whole)]
    return [{**at, "split": split, "heads": heads, "accuracy": x} for split, heads, x in cells]


def test_measures_of_a_run():
    runs = [("erm", 0.6, 0.55), ("diversevit", 0.7, 0.5)]
    rows = [row for seed in range(4) for m, x, y in runs for row in rows_of(m, seed, x, y)]
    cosines = {
        f"{m}-seed{seed}": {"before": [[1, 0.3], [0.3, 1]], "after": [[1, c], [c, 1]]}
        for seed in range(4)
        for m, c in (("erm", 0.2), ("diversevit", 0.01))
    }
    prune, differ, better = verdicts(rows, cosines)
    assert prune.means == pytest.approx((0.65, 0.525))
    assert prune.trainings == (8, 8)
    assert differ.means == pytest.approx((0.01, 0.2))
    assert better.means == pytest.approx((0.7, 0.6))
    assert [x.said for x in (prune, differ, better)] == ["shows"] * 3
    assert likeness(cosines, "erm", "before") == [0.3] * 4
    (alone,) = verdicts([row for row in rows if row["method"] == "erm"], cosines)
    assert alone.claim == "prune"


def test_one_head_has_no_pairs():
    assert mean_of_pairs([[1.0]]) == 0.0
    assert mean_of_pairs([[1, 0.2], [0.4, 1]]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("treated", "control", "said"),
    [
        ([0.7, 0.71], [0.6, 0.61], ("0.705", "0.605", "+0.100", "so few cannot decide", "0.33")),
        ([0.7, 0.71, 0.72, 0.5], [0.6, 0.61, 0.62, 0.9], ("would be decided in 80 %",)),
        ([0.5] * 4, [0.5] * 4, ("+0.000", "p = 1", "there is none")),
        ([0.7, 0.71, 0.72, 0.73], [0.6, 0.61, 0.62, 0.63], ("95 % interval", "p = 0.029")),
    ],
)
def test_sentences(treated, control, said):
    sentence = verdict_sentence(by_labels(treated, control))
    assert all(x in sentence for x in said), sentence
    assert "  " not in sentence
