"""The folder of compiled code: the user's own, since whoever can write to it runs code as the user.

``DIVERSEVIT_CACHE_DIR`` (an absolute path), else ``diversevit`` in ``XDG_CACHE_HOME``, else in ``~/.cache``. It is made
for the user alone (0700). Refused, each with an OSError of one line: a folder that is a link, is somebody else's or can
be written to by others; one below a folder where others could put another in its place. A file is read through one
open descriptor, which is what was checked. Where there are no owners (Windows) none of this is checked.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

_CURE = "set DIVERSEVIT_CACHE_DIR to a folder of your own"
_LARGEST = 1 << 28
"""Bytes; no library of ours comes near."""
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """The folder, made if it is missing.

    Raises:
        OSError: there is none that is the user's own, and why.
    """
    path = _chosen()
    if not hasattr(os, "getuid"):
        path.mkdir(parents=True, exist_ok=True)
        return path
    for missing in _made_in_order(path):
        _check_above(missing)
        with suppress(FileExistsError):  # another process was quicker
            missing.mkdir(mode=0o700)
    _check_above(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{path} is a link or no folder; {_CURE}")
    _check_owner(path, found)
    return path


def read(path: Path) -> bytes | None:
    """What is in the file; None if there is no such file, or one that is not the user's own and nobody else's."""
    try:
        with open(path, "rb", opener=_without_following) as file:
            found = os.fstat(file.fileno())
            _check_owner(path, found)
            return file.read() if found.st_size <= _LARGEST else None
    except OSError:
        return None


def write_whole(path: Path, content: bytes, aside: Path) -> None:
    """Make ``path`` in one step, by way of a file in the folder ``aside``; on the disk when this returns."""
    made = aside / f"{path.name}.whole"
    with open(made, "wb", opener=_only_new) as file:
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
    named = os.environ.get("DIVERSEVIT_CACHE_DIR")
    if named:
        path = Path(os.path.expanduser(named))
        if not path.is_absolute():
            raise OSError(f"DIVERSEVIT_CACHE_DIR: expected an absolute path, got {named!r}")
        return path
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says its specification
        homeless = os.environ.get("HOME") == ""  # which expanduser takes for the root folder
        base = "" if homeless else os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise OSError(f"there is no home folder; {_CURE}")
    return Path(base) / "diversevit"


def _made_in_order(path: Path) -> list[Path]:
    """The folders that have to be made for ``path``, the outermost first."""
    return [p for p in (*reversed(path.parents), path) if not os.path.lexists(p)]


def _check_above(path: Path) -> None:
    """Refuse ``path`` where somebody else could put another folder in its place, or in that of one above it."""
    real = Path(os.path.realpath(path))
    for above in dict.fromkeys((*path.parents, *real.parents)):
        if not os.path.lexists(above):
            continue  # it will be made
        here, target = above.lstat(), above.stat()
        sticky = target.st_mode & stat.S_ISVTX  # then nobody moves what is not theirs
        if {here.st_uid, target.st_uid} - {0, os.getuid()}:
            raise OSError(f"{above} is not yours; {_CURE}")
        if target.st_mode & _OTHERS and not sticky and not _is_ours_alone(target):
            raise _writable(above)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not hasattr(os, "getuid"):
        return
    if found.st_uid != os.getuid():
        raise OSError(f"{path} is not yours; remove it, or {_CURE}")
    if found.st_mode & _OTHERS:
        raise _writable(path)


def _writable(path: Path) -> OSError:
    return OSError(f"others can write to {path}; chmod go-w it, or {_CURE}")


def _is_ours_alone(found: os.stat_result) -> bool:
    """Whether only a group may write besides the owner, and it is the user's private one, as many systems make it."""
    import grp
    import pwd

    if found.st_mode & stat.S_IWOTH:
        return False
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    private = group.gr_gid == user.pw_gid and group.gr_name == user.pw_name
    return private and set(group.gr_mem) <= {user.pw_name}


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _only_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
