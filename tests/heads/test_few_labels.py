"""A few labels: which images are asked for, and that the estimate is unbiased."""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.helpers.head_tables import logits_for, split_of, table_of


@pytest.fixture(scope="module")
def table():
    """Three heads; they disagree about the images that are hard, where head 0 is wrong."""
    n, g = 60, torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (n,), generator=g)
    hard = torch.rand(n, generator=g) < 0.3
    rows = torch.stack([labels.clone() for _ in range(4)])
    rows[1, hard] = (labels[hard] + 1) % 3
    rows[2, hard] = (labels[hard] + torch.randint(0, 3, (int(hard.sum()),), generator=g)) % 3
    return table_of({"ood": split_of(logits_for(rows, 3), labels)}, heads=3, classes=3)


def draws(table, k, count):
    return [dvf.suggest_labels(table, k, seed=seed) for seed in range(count)]


def estimates(table, k, count, error=False):
    labels = table.splits["ood"].labels
    found = []
    for request in draws(table, k, count):
        answers = labels[request.indices]
        choices = dvf.select_heads(table, criterion="few_labels", request=request, labels=answers)
        by_head = {c.kept[0][0]: c for c in choices}
        found.append([[by_head[h].score, by_head[h].error] for h in range(3)])
    return torch.tensor(found, dtype=torch.float64)


def test_images_are_drawn_as_often_as_their_weights_say(table):
    n, k, count = 60, 12, 1500
    seen, chance = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    for request in draws(table, k, count):
        assert len(set(request.indices.tolist())) == k
        seen[request.indices] += 1
        chance[request.indices] = 1 / (n * request.weights)
    assert float(chance.sum()) == pytest.approx(k)
    error = (chance * (1 - chance) / count).sqrt()
    assert ((seen / count - chance).abs() < 5 * error + 1e-9).all()


def test_images_about_which_heads_disagree_are_drawn_more_often(table):
    split = table.splits["ood"]
    disputed = (split.predicted[1:] != split.predicted[1]).any(0)
    found = torch.cat([request.indices for request in draws(table, 12, 300)])
    assert disputed[found].double().mean() > 1.5 * disputed.double().mean()


@pytest.mark.parametrize("k", [6, 20, 50])
def test_the_estimate_is_unbiased(table, k):
    count = 500
    found = estimates(table, k, count)[:, :, 0]
    wanted = table.splits["ood"].hits[1:].double().mean(1)
    error = found.std(0) / count**0.5
    assert ((found.mean(0) - wanted).abs() < 4 * error + 1e-9).all()


def test_the_plain_mean_of_the_drawn_images_is_biased(table):
    """So the test above can fail."""
    hits = table.splits["ood"].hits[1].double()
    found = torch.stack([hits[request.indices].mean() for request in draws(table, 20, 500)])
    assert float(found.mean()) < float(hits.mean()) - 0.05


def test_the_interval_holds_the_truth(table):
    found = estimates(table, 20, 300)
    wanted = table.splits["ood"].hits[1:].double().mean(1)
    inside = (found[:, :, 0] - wanted).abs() <= 1.96 * found[:, :, 1]
    assert (inside.double().mean(0) > 0.9).all()


def test_all_labels_give_the_accuracy(table):
    found = estimates(table, 60, 1)[0, :, 0]
    torch.testing.assert_close(found, table.splits["ood"].hits[1:].double().mean(1))


def test_no_weight_is_twice_that_of_a_plain_draw(table):
    for request in draws(table, 12, 50):
        assert float(request.weights.max()) <= 2 / 12 + 1e-12


def test_the_same_seed_asks_for_the_same_images(table):
    first, again, other = (dvf.suggest_labels(table, 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)


def test_labels_are_not_looked_at(table):
    split = table.splits["ood"]
    bare = table_of({"ood": split_of(logits_for(split.predicted, 3))}, heads=3, classes=3)
    assert torch.equal(dvf.suggest_labels(bare, 10).indices, dvf.suggest_labels(table, 10).indices)


@pytest.mark.parametrize("k", [0, 1, 61, True, 2.0])
def test_numbers_of_images_that_are_refused(table, k):
    with pytest.raises(UsageError, match=r"^k: expected a number of images from 2 to 60"):
        dvf.suggest_labels(table, k)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0] * 9, "labels: expected shape"),
        ([3] * 10, "labels: expected class indices from 0 to 2"),
        (["cat"] * 10, "labels: expected class indices"),
    ],
)
def test_labels_that_are_refused(table, labels, message):
    request = dvf.suggest_labels(table, 10)
    with pytest.raises(UsageError, match=f"^{message}"):
        dvf.select_heads(table, criterion="few_labels", request=request, labels=labels)
