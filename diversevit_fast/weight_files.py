"""Read and write safetensors files atomically, with a checksum.

The metadata of a file written here hold a checksum of the rest; a file whose checksum differs is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UsageError, require, usage_error
from .files import (
    FileError,
    StrPath,
    open_plain,
    path_exists,
    read_bytes,
    reading,
    write_atomically,
)

_BROKEN = (
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)  # raised by a broken header
_CHECKSUM, _KIND = "checksum", "sha256:"
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors allows


def existing_file(path: StrPath) -> Path:
    """Check that ``path`` is a readable file and return it as a ``Path``.

    Raises:
        UsageError: it is no file, or cannot be read.
    """
    with reading(path):
        folder = os.path.isdir(path)
        if folder or not path_exists(path):
            got = "a folder" if folder else "nothing there"
            raise path_error(path, "a file", got, "check the path")
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)))
    return Path(path)


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically: readers see the old file or the whole new one.

    Raises:
        UsageError: the folder does not exist, the system refuses, or safetensors is not installed.
        RuntimeError: safetensors cannot store the tensors.
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
    """Read the metadata and tensors of a safetensors file; the tensors do not depend on the file.

    Args:
        hint: ends the error for a file that is not intact.

    Raises:
        UsageError: there is no such file, it cannot be read, or it is not intact.
    """
    safetensors: Any = require("safetensors", extra="train")
    torch_safetensors: Any = require("safetensors.torch", extra="train")
    data = read_bytes(existing_file(path))
    try:
        header, body = _parts(data)
        metadata = dict(header.get("__metadata__", {}))
        with reading(path):  # running out of memory says nothing about the file
            tensors = dict(sorted(torch_safetensors.load(data).items()))
    except UsageError:
        raise
    except (safetensors.SafetensorError, *_BROKEN):
        raise path_error(
            path, "an intact safetensors file", "another or a damaged one", hint
        ) from None
    # by name and by value, so that a damaged name or value does not hide the checksum
    found = {k: v for k, v in metadata.items() if k == _CHECKSUM or v.startswith(_KIND)}
    if found and found != {_CHECKSUM: _checksum(header, body)}:
        got = "one that does not fit its checksum: it was damaged or changed"
        raise path_error(path, "an intact safetensors file", got, "restore it from a copy")
    metadata.pop(_CHECKSUM, None)
    return metadata, tensors


def read_metadata(path: StrPath) -> dict[str, str]:
    """Read the metadata of a safetensors file alone; empty if it is no such file, which ``read_tensors`` says."""
    try:
        with reading(existing_file(path)), open_plain(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LONGEST_HEADER:
                return {}
            header = json.loads(file.read(length))
        found = dict(header.get("__metadata__", {}))
    except FileError:
        raise
    except _BROKEN:
        return {}
    return found if all(isinstance(value, str) for value in found.values()) else {}


def _parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Split a safetensors file into its header and the rest."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]


def _checksum(header: Mapping[str, Any], body: memoryview) -> str:
    """The checksum of the tensors and of all metadata but the checksum."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != _CHECKSUM}
    said = json.dumps([metadata, _listed(header)], sort_keys=True).encode()
    return _KIND + hashlib.sha256(said + hashlib.sha256(body).digest()).hexdigest()


def _listed(header: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a header that describe tensors."""
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def path_error(path: StrPath, wanted: str, got: object, hint: str) -> UsageError:
    """Build the ``usage_error`` for a file that is not what it should be."""
    return usage_error(f"path {str(path)!r}", wanted, got, hint)


def check_no_checkpoint(path: StrPath, content: object) -> None:
    """Refuse what a run keeps to go on from, which holds an optimizer's state and says nothing of sizes.

    Args:
        path: of the file, for the message.
        content: what was read from it.

    Raises:
        UsageError: it is one.
    """
    if isinstance(content, Mapping) and {"format", "run", "epoch", "model"} <= content.keys():
        hint = f"pass {Path(path).stem}-last.safetensors, in the folder of that run once it is finished"
        raise path_error(path, "a file of weights", "the checkpoint of a run", hint)


def listing(keys: Sequence[object]) -> str:
    """Name the first three keys and count the rest."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(str, keys[:3])) + more
