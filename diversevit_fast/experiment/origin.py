"""Where a continued run comes from: the entry ``continued_from`` of its ``config.json``, and what a page says of it.

::

    run                    folder of the run whose checkpoints it began with
    commit, sha256         of the code that trained them; of that run's config.json
    epochs                 by training: after which epoch it goes on; 0: it was not begun there
    changed                settings that differ, each [there, here]
    platform               versions and processors that differ, as they were there
    learning_rate_factors  [first epoch, factor of the initial rate], of all epochs, there and here
    continued_from         the same of that run, if it was itself continued
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import usage_error
from .config import Settings
from .schedule import Factors, factors, in_words

KEY = "continued_from"


def factors_of(settings: Settings, record: Mapping[str, Any]) -> Factors:
    """Return the learning-rate factors of all epochs of the run that ``record`` is the ``config.json`` of.

    Raises:
        UsageError: ``record`` is damaged.
    """
    if KEY not in record:
        return factors(settings.schedule, settings.epochs)
    with _whole():
        return tuple((int(start), float(x)) for start, x in record[KEY]["learning_rate_factors"])


def schedule_in_words(settings: Settings, record: Mapping[str, Any]) -> str:
    """Return words that follow the initial learning rate."""
    if KEY not in record and settings.schedule_epochs is None:
        return "tenfold lower after 70 % and 80 % of the epochs"
    said = in_words(factors_of(settings, record))
    return f"{said} (schedule of {settings.schedule} epochs)"


def in_one_piece(settings: Settings, record: Mapping[str, Any]) -> bool:
    """Return True if a run of these settings has the same learning rates without a break."""
    return factors_of(settings, record) == factors(settings.schedule, settings.epochs)


def origins(record: Mapping[str, Any]) -> list[str]:
    """Return a line for each run that a run goes on from, the last first.

    Raises:
        UsageError: ``record`` is damaged.
    """
    lines = []
    with _whole():
        while (entry := record.get(KEY)) is not None:
            lines.append(_line(entry))
            record = entry
    return lines


@contextmanager
def _whole() -> Iterator[None]:
    """Context manager: turn what reading a damaged entry raises into one line."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as failure:
        got = f"another one ({type(failure).__name__})"
        hint = "restore config.json, or repeat the run"
        raise usage_error(KEY, "the entry of a continued run", got, hint) from None


def _line(entry: Mapping[str, Any]) -> str:
    parts = [f"{entry['run']}, {_after(entry['epochs'])}, commit {entry['commit'] or 'unknown'}"]
    parts += [f"{name} {_said(a)} → {_said(b)}" for name, (a, b) in entry["changed"].items()]
    parts += [f"there {name} {value or 'none'}" for name, value in entry["platform"].items()]
    return "; ".join(parts)


def _after(epochs: Mapping[str, int]) -> str:
    counts = Counter(epochs.values())
    if len(counts) == 1:
        return f"after epoch {next(iter(counts))}"
    parts = [
        f"{number} of {len(epochs)} trainings {f'after epoch {epoch}' if epoch else 'not begun'}"
        for epoch, number in sorted(counts.items(), reverse=True)
    ]
    return ", ".join(parts)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
