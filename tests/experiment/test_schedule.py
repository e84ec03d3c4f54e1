"""Learning rates by epoch, of one schedule and of one after another."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from diversevit_fast.experiment.schedule import continued, factors, in_words, learning_rate

EPOCHS = st.integers(1, 40)


def by_epoch(changes, epochs: int) -> list[float]:
    return [
        next(x for start, x in reversed(changes) if start <= epoch)
        for epoch in range(1, epochs + 1)
    ]


@given(EPOCHS, EPOCHS)
def test_factors_are_those_that_epochs_are_trained_with(schedule, epochs):
    wanted = [round(learning_rate(1.0, epoch, schedule), 6) for epoch in range(1, epochs + 1)]
    assert by_epoch(factors(schedule, epochs), epochs) == wanted


@given(EPOCHS, st.integers(0, 40), EPOCHS, st.integers(1, 80))
def test_one_schedule_after_another(first, done, second, epochs):
    if done > epochs:
        return
    before, after = (by_epoch(factors(s, 80), 80) for s in (first, second))
    found = continued(factors(first, 80), done, second, epochs)
    assert by_epoch(found, epochs) == [*before[:done], *after[done:epochs]]
    assert all(a[1] != b[1] for a, b in pairwise(found))


@given(EPOCHS, st.integers(0, 40), st.integers(40, 80))
def test_the_same_schedule_goes_on_as_if_there_were_no_break(schedule, done, epochs):
    assert continued(factors(schedule, done or 1), done, schedule, epochs) == factors(
        schedule, epochs
    )


def test_words():
    assert in_words(factors(10, 20)) == "times 0.1 from epoch 8, times 0.01 from epoch 9"
    assert in_words(factors(10, 5)) == "the same in every epoch"
