"""The splits of a data set in one file, which processes map into their memory instead of preparing them again.

A sweep keeps such files in its folder (``sweep_work.Shelf``). A file appears whole or not at all, however many
processes write it at once, and ends with a checksum of all that precedes it. The pages of a mapped file are in memory
once, for all processes of a machine that read them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..data import MNISTCIFAR, DigitsPhotos, GarmentsPlaces, GroupImages
from ..errors import UsageError, usage_error
from ..files import FileError, reading, write_atomically
from .run_files import MARK, check_seal

_FORMAT = 1
_KINDS: Mapping[str, Any] = {
    kind.__name__: kind for kind in (DigitsPhotos, GarmentsPlaces, GroupImages, MNISTCIFAR)
}
"""The classes of ``load_splits``: their attributes are tensors and plain values."""


class _Digested:
    """A file that is written from its beginning to its end, and the digest of what was written."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_splits(path: Path, splits: Mapping[str, Any]) -> None:
    """Write the splits of ``load_splits`` to a file.

    Raises:
        FileError: the system refuses.
    """
    content = {
        "format": _FORMAT,
        "splits": {
            name: {
                "kind": type(split).__name__,
                "values": {k: _alone(v) for k, v in vars(split).items()},
            }
            for name, split in splits.items()
        },
    }

    def write(file: BinaryIO) -> None:
        digested: Any = _Digested(file)
        torch.save(content, digested)
        file.write(MARK + digested.digest.hexdigest().encode("ascii"))

    write_atomically(path, write)


def read_splits(path: Path) -> dict[str, Any]:
    """Map the splits that ``write_splits`` wrote; nothing that is done to them reaches the file.

    Raises:
        FileError: the file cannot be read.
        UsageError: it is damaged, or another one.
    """
    if not check_seal(path):
        raise _damaged(path, "a damaged one, which does not fit its checksum")
    try:
        with reading(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] != _FORMAT:
            raise _damaged(path, f"one of format {content['format']!r}")
        return {name: _made(**entry) for name, entry in content["splits"].items()}
    except (FileError, UsageError):
        raise
    except Exception as failure:  # on a foreign file the unpickler can raise anything
        got = f"one that PyTorch {torch.__version__} does not load ({type(failure).__name__})"
        raise _damaged(path, got) from None


def _alone(value: Any) -> Any:
    """Return a tensor without what else its memory holds: PyTorch writes all of that."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def _made(kind: str, values: Mapping[str, Any]) -> Any:
    split = object.__new__(_KINDS[kind])
    vars(split).update(values)
    return split


def _damaged(path: Path, got: str) -> UsageError:
    hint = "delete it: the data are prepared again"
    return usage_error("data", f"those that the sweep prepared in {path}", got, hint)
