"""Criteria of head tables: each is its formula, finds what it is for, and says when it cannot."""

import typing
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.heads.selection import CriterionName
from tests.helpers.head_tables import logits_for, shortcut_split, split_of, table_of

SHORTCUT, CORE, CONSTANT = {0: [0]}, {0: [1]}, {0: [2]}


def shortcut_table(seed=0, n=2000, correlation=0.9, **options):
    ood = shortcut_split(n, 0.5, seed + 1, **options)
    return table_of({"id": shortcut_split(n, correlation, seed, **options), "ood": ood}, heads=3)


def scores(table, criterion: Any, **options):
    found = dvf.select_heads(table, criterion=criterion, **options)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    return {c.kept[0][0]: c.score for c in found}


@pytest.mark.parametrize("seed", range(5))
def test_rules_without_ood_labels_find_the_head_that_id_accuracy_misses(seed):
    table = shortcut_table(seed)
    rules: Any = {
        "accuracy": {},
        "mistakes": {},
        "agreement_drop": {},
        "group_mean": {"split": "id"},
    }
    best = {
        name: dvf.select_heads(table, criterion=name, **options)[0].kept
        for name, options in rules.items()
    }
    assert best == dict.fromkeys(best, CORE)
    assert dvf.select_heads(table, criterion="accuracy", split="id")[0].kept == SHORTCUT
    assert dvf.select_heads(table, criterion="atc")[0].kept == SHORTCUT


def test_a_whole_model_that_is_robust_deceives_agreement_drop():
    table = shortcut_table()
    turned = {name: split.rows(torch.tensor([2, 1, 2, 3])) for name, split in table.splits.items()}
    found = dvf.select_heads(table_of(turned, heads=3), criterion="agreement_drop")
    assert found[0].kept == SHORTCUT


class TestMistakes:
    def test_is_the_mean_over_right_and_wrong(self):
        table = shortcut_table()
        hits = table.splits["id"].hits
        found = scores(table, "mistakes")
        for head in range(3):
            right, wrong = (hits[head + 1][part].double().mean() for part in (hits[1], ~hits[1]))
            assert found[head] == pytest.approx(float(right + wrong) / 2, abs=1e-12)
        assert found[0] == 0.5

    def test_estimates_ood_accuracy(self):
        table = shortcut_table(n=20000)
        found, wanted = scores(table, "mistakes"), scores(table, "accuracy")
        assert found[1] == pytest.approx(wanted[1], abs=0.02)

    def test_the_reference_is_the_best_single_head_or_the_whole_model(self):
        table = shortcut_table()
        split = table.splits["id"].rows(torch.tensor([2, 1, 2, 3]))  # the model is the core head
        table = table_of({"id": split}, heads=3)
        assert scores(table, "mistakes", reference="all")[1] == 0.5
        assert scores(table, "mistakes", reference="best")[0] == 0.5

    def test_is_refused_where_there_are_few(self):
        table = shortcut_table(n=200)
        wrong = int((~table.splits["id"].hits[1]).sum())
        assert wrong < 30
        with pytest.raises(UsageError, match=rf"at least 30 mistakes .*, got {wrong}; give more"):
            dvf.select_heads(table, criterion="mistakes")

    def test_is_refused_where_nearly_all_is_wrong(self):
        table = shortcut_table(n=400)
        split: Any = table.splits["id"]
        wrong = split_of(logits_for(1 - split.labels.expand(4, -1)), split.labels)
        with pytest.raises(UsageError, match=r"at least 30 right answers .*, got 0"):
            dvf.select_heads(table_of({"id": wrong}, heads=3), criterion="mistakes")

    def test_warns_with_the_standard_error_below_100(self):
        table = shortcut_table(n=600)
        with pytest.warns(UserWarning, match=r"standard error of 0\.0\d\d") as said:
            found = dvf.select_heads(table, criterion="mistakes")
        assert f"{found[0].error:.3f}" in str(said[0].message)
        assert said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dvf.select_heads(shortcut_table(n=3000), criterion="mistakes")

    def test_the_standard_error_is_that_of_repetitions(self):
        found = [
            dvf.select_heads(shortcut_table(seed, n=1500), criterion="mistakes")[0]
            for seed in range(0, 240, 2)
        ]
        assert all(choice.kept == CORE for choice in found)
        spread = torch.tensor([choice.score for choice in found]).std()
        assert float(spread) == pytest.approx(found[0].error, rel=0.25)

    def test_wrong_labels_bring_the_score_down_but_the_choice_holds(self):
        clean, noisy = (scores(shortcut_table(noise=noise), "mistakes") for noise in (0.0, 0.1))
        assert noisy[1] < clean[1] - 0.05
        assert noisy[1] > noisy[0]


class TestAgreementDrop:
    def test_is_agreement_on_id_less_agreement_on_ood(self):
        table = shortcut_table()
        agreed = [
            (split.predicted[2] == split.predicted[0]).double().mean()
            for split in table.splits.values()
        ]
        assert scores(table, "agreement_drop")[1] == pytest.approx(float(agreed[0] - agreed[1]))

    def test_leaves_constant_heads_out(self):
        table = shortcut_table()
        assert set(scores(table, "agreement_drop")) == {0, 1}

    def test_needs_no_labels(self):
        table = shortcut_table()
        bare = {name: split_of(logits_for(split.predicted)) for name, split in table.splits.items()}
        assert scores(table_of(bare, heads=3), "agreement_drop") == scores(table, "agreement_drop")

    def test_says_where_nothing_is_left(self):
        split = split_of(logits_for(torch.zeros(4, 50, dtype=torch.long)))
        table = table_of({"id": split, "ood": split}, heads=3)
        with pytest.raises(UsageError, match=r"^criterion: expected one that scores a choice"):
            dvf.select_heads(table, criterion="agreement_drop")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 80), st.integers(2, 4))
def test_groups_are_counted_one_by_one(seed, n, classes):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, n, classes, generator=g)
    labels = torch.randint(0, classes, (n,), generator=g)
    groups = torch.randint(0, 3, (n,), generator=g)
    table = table_of({"ood": split_of(logits, labels, groups)}, heads=3, classes=classes)
    worst, mean = scores(table, "worst_group"), scores(table, "group_mean")
    for head in range(3):
        accuracies = []
        for group in set(groups.tolist()):
            members = [i for i in range(n) if groups[i] == group]
            hits = [int(logits[head + 1, i].argmax()) == int(labels[i]) for i in members]
            accuracies.append(sum(hits) / len(hits))
        assert worst[head] == pytest.approx(min(accuracies))
        assert mean[head] == pytest.approx(sum(accuracies) / len(accuracies))


def test_mano_is_the_fourth_norm_of_the_probabilities():
    logits = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0))
    table = table_of({"ood": split_of(logits)}, heads=3, classes=3)
    p = logits.double().softmax(-1)
    for head, score in scores(table, "mano").items():
        assert score == pytest.approx(float((p[head + 1] ** 4).mean() ** 0.25), rel=1e-6)


class TestRegistry:
    def test_names_are_those_of_the_signature(self):
        assert list(dvf.head_criteria()) == list(typing.get_args(CriterionName))

    def test_every_criterion_is_described(self):
        for name, criterion in dvf.head_criteria().items():
            assert criterion.name == name
            assert all((criterion.needs, criterion.formula, criterion.source, criterion.failure))
            assert set(criterion.options) <= {
                *("split", "id_split", "ood_split", "reference", "fewest", "request", "labels")
            }

    def test_a_function_gets_the_table(self):
        table = shortcut_table()
        found = dvf.select_heads(table, criterion=lambda t: -t.split("ood").entropy.mean(1))
        assert len(found) == 3
        some = dvf.select_heads(table, criterion=lambda t: [0.0, torch.nan, 1.0, 2.0])
        assert [c.kept for c in some] == [CONSTANT, CORE]

    @pytest.mark.parametrize(
        ("criterion", "options", "message"),
        [
            ("best", {}, "criterion: expected one of"),
            (None, {}, "criterion: expected one of"),
            ("mano", {"reference": "all"}, "options: expected options of 'mano': split"),
            ("mistakes", {"reference": "last"}, "reference: expected one of"),
            ("accuracy", {"split": "test"}, "table: expected a split 'test', got id, ood"),
            (lambda t: [1.0], {}, "criterion: expected 4 numbers"),
            (lambda t: [1.0] * 4, {"split": "id"}, "options: expected none for a function"),
        ],
    )
    def test_what_is_refused(self, criterion, options, message):
        with pytest.raises(UsageError, match=f"^{message}"):
            dvf.select_heads(shortcut_table(), criterion=criterion, **options)

    @pytest.mark.parametrize(
        ("criterion", "message"),
        [
            *((name, "a split with labels") for name in ("accuracy", "mistakes", "atc")),
            ("worst_group", "a split with"),
        ],
    )
    def test_what_is_missing(self, criterion, message):
        split = split_of(torch.randn(4, 30, 2))
        table = table_of({"id": split, "ood": split}, heads=3)
        with pytest.raises(UsageError, match=f"^table: expected {message}"):
            dvf.select_heads(table, criterion=criterion)

    def test_a_table_and_a_model_are_not_mixed_up(self):
        table = shortcut_table()
        with pytest.raises(UsageError, match=r"^criterion: expected a table and a criterion, got"):
            dvf.select_heads(table, [], criterion="mano")  # pyright: ignore[reportCallIssue, reportArgumentType]
        model = dvf.models.DiverseViT(depth=1, dim=8, head_dim=4, mlp_dim=8)
        with pytest.raises(UsageError, match=r"^model: expected a HeadTable to go with criterion"):
            dvf.select_heads(model, [], criterion="mano")  # pyright: ignore[reportCallIssue, reportArgumentType]
