"""Ctrl-C where a test wants it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diversevit_fast.experiment.progress import Progress


@contextmanager
def interrupted_after_an_epoch() -> Iterator[None]:
    """A training inside ends after its first epoch, whose checkpoint is written."""
    done = Progress.epoch_done

    def epoch_done(self, *arguments):
        done(self, *arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "epoch_done", epoch_done)
        yield
