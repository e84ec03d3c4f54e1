"""Safetensors files: read whole, written whole or not at all; the error for one that does not fit.

A file of ours holds a checksum of all of it among its metadata, and is not read when it is another's.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UsageError, require, usage_error
from .files import StrPath, read_bytes, reading, there, write_atomically

_BROKEN = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # no header
_CHECKSUM, _KIND = "checksum", "sha256:"


def existing_file(path: StrPath) -> Path:
    """``path`` as a ``Path``.

    Raises:
        UsageError: it is no file, or one that the system does not let us read.
    """
    with reading(path):
        folder = os.path.isdir(path)
        if folder or not there(path):
            got = "a folder" if folder else "nothing there"
            raise path_error(path, "a file", got, "check the path")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)))
    return Path(path)


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; a reader of ``path`` sees all of it or what was there before.

    Raises:
        UsageError: the folder does not exist, the system refuses, or safetensors is not installed.
        RuntimeError: what safetensors cannot store.
    """
    safetensors = require("safetensors.torch", extra="train")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise path_error(path, "a file name in an existing folder", "none", "make its folder first")
    plain = safetensors.save(dict(tensors), metadata={"format": "pt", **metadata})
    header, body = _parts(plain)
    entries = {**header["__metadata__"], _CHECKSUM: _checksum(header, body)}
    text = json.dumps({"__metadata__": entries, **_listed(header)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8

    def write(file: Any) -> None:
        for part in (len(text).to_bytes(8, "little"), text, body):
            file.write(part)

    write_atomically(path, write)


def read_tensors(path: StrPath, hint: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors are copies, which outlive it.

    Raises:
        UsageError: no such file, one that cannot be read, or no intact one, for which ``hint`` helps.
    """
    safetensors: Any = require("safetensors", extra="train")
    torch_safetensors: Any = require("safetensors.torch", extra="train")
    data = read_bytes(existing_file(path))
    try:
        header, body = _parts(data)
        metadata = dict(header.get("__metadata__", {}))
        with reading(path):  # too little memory is not the file's fault
            tensors = dict(sorted(torch_safetensors.load(data).items()))
    except UsageError:
        raise
    except (safetensors.SafetensorError, *_BROKEN):
        raise path_error(
            path, "an intact safetensors file", "another or a damaged one", hint
        ) from None
    # by name and by value, lest a damaged name or value hide that there is one
    found = {k: v for k, v in metadata.items() if k == _CHECKSUM or v.startswith(_KIND)}
    if found and found != {_CHECKSUM: _checksum(header, body)}:
        got = "one that does not fit its checksum: it was damaged or changed"
        raise path_error(path, "an intact safetensors file", got, "restore it from a copy")
    metadata.pop(_CHECKSUM, None)
    return metadata, tensors


def _parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and all that follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]


def _checksum(header: Mapping[str, Any], body: memoryview) -> str:
    """Of all that the file says but this."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != _CHECKSUM}
    said = json.dumps([metadata, _listed(header)], sort_keys=True).encode()
    return _KIND + hashlib.sha256(said + hashlib.sha256(body).digest()).hexdigest()


def _listed(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a header says of the tensors."""
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def path_error(path: StrPath, wanted: str, got: object, hint: str) -> UsageError:
    """The error for a file that is not what it should be."""
    return usage_error(f"path {str(path)!r}", wanted, got, hint)


def listing(keys: Sequence[object]) -> str:
    """The first three keys by name, the rest by number."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(str, keys[:3])) + more
