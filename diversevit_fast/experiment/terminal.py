"""Print text without ever stopping the work: unencodable characters degrade, failing streams go quiet."""

import codecs
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

_PLAIN = {"±": "+-", "’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-"}
_PLAIN |= {"×": "x", "…": "...", "→": "->", "━": "-", "─": "-", "╸": "-", "╺": " ", "•": "*"}
_DEGRADE = "diversevit-degrade"

is_quiet = ContextVar("is_quiet", default=False)
"""Whether lines of progress are left out: ``--quiet``."""


class Steady:
    """Wrapper of a text stream that can always be written to.

    A character that the encoding lacks becomes a plainer one; a byte of a file name that is no text
    stays the byte it is. After the first error of ``stream`` (a closed pipe, a full disk) nothing
    more is written.

    Attributes:
        lost: that error, or None.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write ``text``, as far as the stream takes it."""
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write every line, as ``write`` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream, ignoring failures."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def settle(self) -> None:
        """Flush, and leave nothing for the interpreter's own flush at exit to complain about."""
        self.flush()
        if self.lost is not None:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _attempt(self, job: Callable[[], object]) -> None:
        if self.lost is None:
            try:
                job()
            except (OSError, ValueError) as failure:  # a ValueError: its owner has closed the file
                self.lost = failure

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None)
        if encoding is None or _fits(text, encoding):  # without one it holds text, not bytes
            self._stream.write(text)
            return
        raw = text.encode(encoding, _DEGRADE)
        buffer = getattr(self._stream, "buffer", None)
        if buffer is None:
            self._stream.write(raw.decode(encoding, "replace"))
            return
        self._stream.flush()
        buffer.write(raw)
        buffer.flush()


def steady(stream: Any) -> Any:
    """Wrap ``stream`` so that writing never fails; None stays None."""
    return stream if stream is None or isinstance(stream, Steady) else Steady(stream)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Context manager: make this process's standard output and error never fail."""
    before = sys.stdout, sys.stderr
    during = sys.stdout, sys.stderr = steady(before[0]), steady(before[1])
    try:
        yield
    finally:
        for stream in during:
            if isinstance(stream, Steady):
                stream.settle()
        sys.stdout, sys.stderr = before


@contextmanager
def steady_console(console: Any) -> Iterator[Any]:
    """Context manager: make printing on the rich ``console`` raise nothing."""
    before = console._file  # None: standard output, whatever that is at the time
    console.file = steady(console.file)
    try:
        yield console
    finally:
        console._file = before


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _degrade(failure: UnicodeError) -> tuple[str | bytes, int]:
    """Return the replacement of the first character that cannot be encoded."""
    if not isinstance(failure, UnicodeEncodeError):
        raise failure
    character, after = failure.object[failure.start], failure.start + 1
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte that is no text
        return bytes([ord(character) - 0xDC00]), after
    plain = _PLAIN.get(character) or unicodedata.normalize("NFKD", character)
    return plain.encode("ascii", "ignore").decode() or "?", after


codecs.register_error(_DEGRADE, _degrade)
