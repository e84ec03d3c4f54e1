"""Read files and write them atomically, with errors that tell a failing system from a wrong content.

New content goes to a temporary file in the same folder, under a random name, is flushed to the disk and
then renamed. No link that somebody else put there is followed.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError, usage_error

StrPath = str | os.PathLike[str]
_TEMPORARY = ".tmp"
_NO_SYNC = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EBADF,
}  # raised by file systems without fsync


class FileError(UsageError):
    """The system refused to read or write a file; this says nothing about the file's content.

    Attributes:
        reason: the system's message.
    """

    reason = ""


@contextmanager
def writing(path: StrPath) -> Iterator[None]:
    """Turn errors of the system inside the block into a ``FileError`` that names ``path``.

    Raises:
        FileError: writing failed (permission, a full disk, a limit), or memory ran out.
    """
    with _file_errors(path, "a place that can be written"):
        yield


@contextmanager
def reading(path: StrPath) -> Iterator[None]:
    """Do the same as ``writing`` for a file that is read."""
    with _file_errors(path, "a file that can be read"):
        yield


def write_atomically(path: StrPath, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a new file and rename it to ``path``; after an error ``path`` is unchanged.

    Raises:
        FileError: as ``writing``.
    """
    path = Path(path)
    with writing(path):
        temporary, descriptor = _new_file(path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                _sync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def path_exists(path: StrPath) -> bool:
    """True if ``path`` exists, also as a link to a file that does not.

    Raises:
        FileError: the system does not allow to look.
    """
    with _file_errors(path, "a place that can be looked into"):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return False
        return True


def list_names(folder: StrPath) -> list[str]:
    """The names in ``folder``, sorted.

    Raises:
        FileError: the folder cannot be read.
    """
    with _file_errors(folder, "a folder that can be read"):
        return sorted(os.listdir(folder))


def check_writable(folder: Path) -> None:
    """Check that files can be written in ``folder``.

    Raises:
        FileError: they cannot.
    """
    with writing(folder):
        path, descriptor = _new_file(folder)
        os.close(descriptor)
        path.unlink()


def is_leftover(path: Path) -> bool:
    """True if ``path`` is a temporary file left behind by an interrupted ``write_atomically``."""
    name = path.name
    return name.startswith(".") and name.endswith(_TEMPORARY) and len(name) == len(_TEMPORARY) + 17


def make_folder(path: Path) -> None:
    """Create the folder ``path`` unless it exists.

    Raises:
        FileError: the system refuses, or something else is there, such as a link to elsewhere.
    """
    with writing(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise OSError(errno.ENOTDIR, "a link, or no folder") from None


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # a folder may be writable but not readable
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: StrPath, most: int | None = None) -> bytes:
    """Read the whole file ``path``.

    Raises:
        FileError: it cannot be read, or has more than ``most`` bytes.
    """
    with reading(path), open_plain(path) as file:
        data = file.read() if most is None else file.read(most + 1)
        if most is not None and len(data) > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes")
        return data


def open_plain(path: StrPath) -> BinaryIO:
    """Open the file ``path`` for reading.

    Raises:
        OSError: the system refuses, or it is a device or a pipe, on which reading would block.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "a device or a pipe")
    return file


def _new_file(folder: Path) -> tuple[Path, int]:
    """Create a temporary file; return its path and its descriptor, open for writing."""
    path = folder / f".{secrets.token_hex(8)}{_TEMPORARY}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    return path, os.open(path, flags, 0o666)


@contextmanager
def _file_errors(path: StrPath, wanted: str) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise _refused(path, wanted, failure.strerror or str(failure), "mend that") from None
    except MemoryError:
        raise _refused(path, wanted, "too little memory for it", "free some") from None


def _refused(path: StrPath, wanted: str, reason: str, hint: str) -> FileError:
    refused = FileError(str(usage_error(str(path), wanted, reason, f"{hint} first")))
    refused.reason = reason
    return refused


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as failure:
        if failure.errno not in _NO_SYNC:
            raise
