"""Write and read a run's files: text, JSON, and content with a checksum."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import usage_error
from ..files import open_plain, read_bytes, reading, write_atomically, writing
from .config import is_path

MARK = b"\nsha256:"
_SEAL = len(MARK) + 64  # at the end of a file, where PyTorch's own reader does not look


class DamagedError(Exception):
    """Raised when a file's content is not what was written."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8."""
    data = text.encode("utf-8")
    write_atomically(path, lambda file: file.write(data))


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` as indented JSON."""
    text = json.dumps(values, indent=2, ensure_ascii=not _is_text(values)) + "\n"
    write_text(path, text)


def write_sealed(path: Path, content: bytes) -> None:
    """Write ``content`` followed by its checksum."""
    seal = MARK + hashlib.sha256(content).hexdigest().encode("ascii")
    write_atomically(path, lambda file: (file.write(content), file.write(seal)))


def read_sealed(path: Path) -> tuple[bytes, bool]:
    """Return the content of ``path``, and True if ``write_sealed`` wrote it.

    Raises:
        FileError: the file cannot be read.
        DamagedError: the content does not fit the checksum.
    """
    data = read_bytes(path)
    content, seal = data[:-_SEAL], data[-_SEAL:]
    if not seal.startswith(MARK):
        return data, False
    if seal[len(MARK) :] != hashlib.sha256(content).hexdigest().encode("ascii"):
        raise DamagedError
    return content, True


def check_seal(path: Path) -> bool:
    """Return True if the file ends with ``MARK`` and the checksum of all that precedes it; it is read in parts.

    Raises:
        FileError: the file cannot be read.
    """
    digest, seal = hashlib.sha256(), b""
    with reading(path), open_plain(path) as file:
        while part := file.read(1 << 20):
            part = seal + part
            content, seal = part[:-_SEAL], part[-_SEAL:]
            digest.update(content)
    return seal == MARK + digest.hexdigest().encode("ascii")


def check_new(option: str, name: str) -> None:
    """Raise if the file exists, or if its folder cannot be written to."""
    path, hint = Path(name), "choose another name"
    if not is_path(name):
        raise usage_error(option, "a new file", repr(name), hint)
    with writing(path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        else:
            raise usage_error(option, "a new file", f"{name}, which exists", hint)
        if path.parent.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
            raise usage_error(option, "a folder to write into", path.parent, "choose another")


def digest_of(path: Path) -> str:
    """Return the SHA-256 digest of a file.

    Raises:
        FileError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path), open_plain(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def out_of_memory(failure: BaseException) -> bool:
    """Return True if ``failure`` says that Python or PyTorch ran out of memory."""
    said = ("allocate memory", "out of memory")
    return isinstance(failure, MemoryError) or any(sign in str(failure) for sign in said)


def printable(name: str) -> str:
    """Return ``name`` as printable text; a path may hold bytes that are not valid text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_text(values: Any) -> bool:
    """Return True if UTF-8 can encode the string; a path's other bytes have to be escaped."""
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
