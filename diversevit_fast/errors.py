"""Errors of one line: the argument, what was expected, what came, and a hint."""

import importlib
from types import ModuleType


class UsageError(ValueError):
    """A mistake the caller can mend. The command line prints its one line and exits with 2."""


class UnsupportedError(NotImplementedError):
    """Something this library refuses to do, rather than do it wrong."""


def usage_error(argument: str, wanted: str, got: object, hint: str) -> UsageError:
    """The one-line error: ``argument: expected wanted, got got; hint``."""
    return UsageError(" ".join(f"{argument}: expected {wanted}, got {got}; {hint}".split()))


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Raises:
        UsageError: ``module`` is not installed, or fails when it is imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not module.startswith(missing.name):
            raise
        raise usage_error(
            module.partition(".")[0],
            "an installed package",
            "no such module",
            f'pip install "diversevit-fast[{extra}]"',
        ) from None
    except (MemoryError, ImportError):
        raise
    except Exception as failure:  # say, of a variable of the environment that it reads
        got = f"{type(failure).__name__}: {failure}"
        raise usage_error(
            module, "a package that can be imported", got, "mend that first"
        ) from None
