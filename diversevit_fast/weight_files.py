"""Safetensors files: read whole, written whole or not at all; the error for one that does not fit."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UsageError, expected, require

StrPath = str | os.PathLike[str]


def existing_file(path: StrPath) -> Path:
    """``path`` as a ``Path``.

    Raises:
        UsageError: it is no file.
    """
    if not Path(path).is_file():
        got = "a folder" if Path(path).is_dir() else "nothing there"
        raise misfit(path, "a file", got, "check the path")
    return Path(path)


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; a reader of ``path`` sees all of it or what was there before.

    Raises:
        UsageError: the folder does not exist, or safetensors is not installed.
        RuntimeError: what safetensors cannot store.
    """
    safetensors = require("safetensors.torch", extra="train")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise misfit(path, "a file name in an existing folder", "none", "make its folder first")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(
            safetensors.save(dict(tensors), metadata={"format": "pt", **metadata})
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(path: StrPath, cure: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors are copies, which outlive it.

    Raises:
        UsageError: no such file, or no intact one, for which ``cure`` helps.
    """
    safetensors: Any = require("safetensors", extra="train")
    file = existing_file(path)
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
            return content.metadata() or {}, tensors
    except safetensors.SafetensorError:
        raise misfit(path, "an intact safetensors file", "another or a damaged one", cure) from None


def misfit(path: StrPath, wanted: str, got: object, cure: str) -> UsageError:
    """The error for a file that is not what it should be."""
    return expected(f"path {str(path)!r}", wanted, got, cure)


def listing(keys: Sequence[object]) -> str:
    """The first three keys by name, the rest by number."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(str, keys[:3])) + more
