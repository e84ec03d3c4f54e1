"""What the CPU backend compiles and keeps on disk: where it lies, how it is written, what is said where it cannot be.

Folder       ``diversevit`` in Inductor's own (``TORCHINDUCTOR_CACHE_DIR``); a file's name tells what it is, and a
             digest of all it was made from and of the processor.
Environment  ``DIVERSEVIT_COMPILE=0`` compiles nothing.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_warned = False


def allowed() -> bool:
    """Whether anything may be compiled or loaded."""
    return os.environ.get("DIVERSEVIT_COMPILE") != "0"


def path_of(name: str, suffix: str, *made_from: str) -> Path:
    """Where the file lies, if it is compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    described = (*made_from, str(sorted(torch.cpu.get_capabilities().items())))
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return Path(cache_dir()) / "diversevit" / f"{name}_{digest}{suffix}"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what then becomes ``path`` in one step: processes that compile at once do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        os.replace(made, path)


def warn_once(name: str, error: Exception) -> None:
    """Say that ``name`` could not be compiled, if it is the first."""
    global _warned
    if not _warned:
        _warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"diversevit: {name} could not be compiled ({reason[:200]}); "
            "running the slower path (DIVERSEVIT_COMPILE=0 stops trying)",
            stacklevel=3,
        )
