"""The cache folder of compiled code: checked to belong to the user alone, since its files are run as the user.

``DIVERSEVIT_CACHE_DIR`` (an absolute path), else ``diversevit`` in ``XDG_CACHE_HOME``, else in ``~/.cache``; created
with mode 0700. Refused with an OSError of one line: a folder that is a link, belongs to somebody else or is writable
by others, and one below a folder in which others could replace it. A file is read through the same descriptor that was
checked. On systems without owners (Windows) none of this is checked.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

_HINT = "set DIVERSEVIT_CACHE_DIR to a folder of your own"
_MAX_FILE_BYTES = 1 << 28
"""Larger files are not read; these libraries are far smaller."""
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """Return the folder; create it if it is missing.

    Raises:
        OSError: it cannot be created or is not safe to use, and why.
    """
    path = _chosen()
    if not hasattr(os, "getuid"):
        path.mkdir(parents=True, exist_ok=True)
        return path
    for missing in _missing_folders(path):
        _check_above(missing)
        with suppress(FileExistsError):  # another process was quicker
            missing.mkdir(mode=0o700)
    _check_above(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{path} is a link or no folder; {_HINT}")
    _check_owner(path, found)
    return path


def read(path: Path) -> bytes | None:
    """Return the file's content; None if it does not exist, is not the user's or is writable by others."""
    try:
        with open(path, "rb", opener=_open_no_follow) as file:
            found = os.fstat(file.fileno())
            _check_owner(path, found)
            return file.read() if found.st_size <= _MAX_FILE_BYTES else None
    except OSError:
        return None


def write_whole(path: Path, content: bytes, temporary: Path) -> None:
    """Write ``path`` atomically and durably, by renaming a file of the folder ``temporary``."""
    made = temporary / f"{path.name}.whole"
    with open(made, "wb", opener=_open_new) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(made, path)
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _chosen() -> Path:
    """Return the folder that the environment names, as an absolute path.

    Raises:
        OSError: it names none.
    """
    named = os.environ.get("DIVERSEVIT_CACHE_DIR")
    if named:
        path = Path(os.path.expanduser(named))
        if not path.is_absolute():
            raise OSError(f"DIVERSEVIT_CACHE_DIR: expected an absolute path, got {named!r}")
        return path
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # its specification: relative paths are ignored
        homeless = os.environ.get("HOME") == ""  # which expanduser takes for the root folder
        base = "" if homeless else os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise OSError(f"there is no home folder; {_HINT}")
    return Path(base) / "diversevit"


def _missing_folders(path: Path) -> list[Path]:
    """Return ``path`` and its parents as far as they do not exist, outermost first."""
    return [p for p in (*reversed(path.parents), path) if not os.path.lexists(p)]


def _check_above(path: Path) -> None:
    """Raise OSError if somebody else could replace ``path`` or a folder above it."""
    real = Path(os.path.realpath(path))
    for above in dict.fromkeys((*path.parents, *real.parents)):
        if not os.path.lexists(above):
            continue  # it will be created
        here, target = above.lstat(), above.stat()
        sticky = target.st_mode & stat.S_ISVTX  # only owners rename or delete entries
        if {here.st_uid, target.st_uid} - {0, os.getuid()}:
            raise OSError(f"{above} is not yours; {_HINT}")
        if (
            target.st_mode & _WRITABLE_BY_OTHERS
            and not sticky
            and not _only_private_group_writes(target)
        ):
            raise _writable(above)


def _check_owner(path: Path, found: os.stat_result) -> None:
    """Raise OSError if ``path`` is not the user's or is writable by others."""
    if not hasattr(os, "getuid"):
        return
    if found.st_uid != os.getuid():
        raise OSError(f"{path} is not yours; remove it, or {_HINT}")
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise _writable(path)


def _writable(path: Path) -> OSError:
    return OSError(f"others can write to {path}; chmod go-w it, or {_HINT}")


def _only_private_group_writes(found: os.stat_result) -> bool:
    """Return whether only the owner and their private group can write; many systems create folders like this."""
    import grp
    import pwd

    if found.st_mode & stat.S_IWOTH:
        return False
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    is_private = group.gr_gid == user.pw_gid and group.gr_name == user.pw_name
    return is_private and set(group.gr_mem) <= {user.pw_name}


def _open_no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
