"""How this library says no: one line that names the argument, what was expected, what came, and the cure."""

import importlib
from types import ModuleType


class UsageError(ValueError):
    """A mistake the caller can mend. The command line prints its one line and exits with 2."""


class UnsupportedError(NotImplementedError):
    """Something this library refuses to do, rather than do it wrong."""


def expected(argument: str, wanted: str, got: object, cure: str) -> UsageError:
    """The one-line error: ``argument: expected wanted, got got; cure``."""
    return UsageError(" ".join(f"{argument}: expected {wanted}, got {got}; {cure}".split()))


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
        raise expected(
            module.partition(".")[0],
            "an installed package",
            "no such module",
            f'pip install "diversevit-fast[{extra}]"',
        ) from None
    except (MemoryError, ImportError):
        raise
    except Exception as failure:  # say, of a variable of the environment that it reads
        got = f"{type(failure).__name__}: {failure}"
        raise expected(module, "a package that can be imported", got, "mend that first") from None
