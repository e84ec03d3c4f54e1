"""Switches that a user sets in the environment, all read by the same rule.

On   ``1``, ``true``, ``yes``, ``on``, ``y``, in any case.
Off  ``0``, ``false``, ``no``, ``off``, ``n``, and nothing (``DIVERSEVIT_COMPILE= python ...``).

Any other word is said to be unknown, once, and the default holds.
"""

import os
import warnings

_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on", "y"), True),
    **dict.fromkeys(("0", "false", "no", "off", "n", ""), False),
}
_unknown: set[tuple[str, str]] = set()  # that a warning has named


def switch(name: str, default: bool) -> bool:
    """Whether the environment switches ``name`` on; ``default`` where it does not mention it."""
    word = os.environ.get(name)
    if word is None:
        return default
    found = _WORDS.get(word.strip().lower())
    if found is None:
        _warn_once(name, word, default)
        return default
    return found


def _warn_once(name: str, word: str, default: bool) -> None:
    if (name, word) not in _unknown:
        _unknown.add((name, word))
        warnings.warn(
            f"{name}: expected 1, true, yes, on, or 0, false, no, off, got {word[:40]!r}; "
            f"going on as if it were {int(default)}",
            stacklevel=4,
        )
