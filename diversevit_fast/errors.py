"""One-line errors: the argument, what was expected, what was passed, and a hint."""

import importlib
from types import ModuleType

from .installation import install_command


class UsageError(ValueError):
    """A mistake the caller can correct. The command line prints the message and exits with 2."""


class UnsupportedError(NotImplementedError):
    """Something that this library refuses to do because the result would be wrong."""


def usage_error(argument: str, wanted: str, got: object, hint: str) -> UsageError:
    """Build the one-line error ``argument: expected wanted, got got; hint``. The caller raises it."""
    return UsageError(" ".join(f"{argument}: expected {wanted}, got {got}; {hint}".split()))


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or raise an error that names the extra which installs it.

    Raises:
        UsageError: ``module`` is not installed, or fails when it is imported.
    """
    try:
        return importlib.import_module(module)
    except MemoryError:
        raise
    except Exception as failure:  # of an environment variable, or a library of the system
        missing = failure.name if isinstance(failure, ModuleNotFoundError) else None
        if missing is not None and module.startswith(missing):
            raise usage_error(
                module.partition(".")[0],
                "an installed package",
                "no such module",
                install_command(extra),
            ) from None
        got = f"{type(failure).__name__}: {failure}"
        raise usage_error(
            module, "a package that can be imported", got, "mend that first"
        ) from None
