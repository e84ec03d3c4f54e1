"""Read and write ``HeadTable`` files: NumPy archives without compression and without pickles.

A member ``table`` holds a JSON text with the choices of heads; every split has the members
``<number>/predicted`` and so on. Stored without compression, so that a file cannot hold more than its size.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import UsageError, usage_error
from ..files import FileError, StrPath, read_bytes, write_atomically
from .candidates import MAX_CANDIDATES, Kept
from .head_table import DTYPES, MEASURES, HeadTable, SplitPredictions

VERSION = 1
_BROKEN = (  # raised by zipfile, NumPy and JSON for files that are damaged or crafted
    *(OSError, EOFError, ValueError, RuntimeError, SyntaxError, ArithmeticError),
    *(LookupError, TypeError, AttributeError, RecursionError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)
_HINT = "make it again with dvf.head_table"


class _NoTableError(Exception):
    """The file is no table; the message says why."""


def write_table(table: HeadTable, path: StrPath) -> None:
    """Write ``table`` to ``path`` atomically."""
    about = {
        "version": VERSION,
        "kept": [[[layer, heads] for layer, heads in kept.items()] for kept in table.kept],
        "heads": list(table.heads.items()),
        "classes": table.classes,
        "search": table.search,
        "splits": list(table.splits),
        "group_names": list(table.group_names),
    }
    text = json.dumps(about, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    arrays: dict[str, Any] = {"table": np.frombuffer(text, np.uint8)}
    for place, split in enumerate(table.splits.values()):
        for name in ("predicted", *MEASURES, "labels", "groups"):
            value = getattr(split, name)
            if value is not None:
                arrays[f"{place}/{name}"] = value.numpy()
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_table(path: StrPath) -> HeadTable:
    """Read the table in ``path``; the errors are those of ``HeadTable.load``."""
    data = read_bytes(path)
    try:
        return _parse(data)
    except FileError:
        raise
    except _NoTableError as wrong:
        reason = str(wrong)
    except UsageError as wrong:
        reason = str(wrong)
    except _BROKEN as broken:
        reason = f"{type(broken).__name__}: {broken}"
    raise usage_error("table", "a file that HeadTable.save wrote", f"{path} ({reason})", _HINT)


def _parse(data: bytes) -> HeadTable:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {}
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise _NoTableError(f"{info.filename!r} is compressed")
            members[info.filename.removesuffix(".npy")] = archive.read(info)
    about = json.loads(_array(members, "table", "u1", 1).tobytes().decode("ascii"))
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise _NoTableError(f"not of version {VERSION}")
    heads = {_whole(layer): _whole(count, 1) for layer, count in about["heads"]}
    kept = tuple(_kept(entry, heads) for entry in about["kept"])
    names, groups = (tuple(map(_text, about[key])) for key in ("splits", "group_names"))
    classes, search = _whole(about["classes"], 1), about["search"]
    if search not in ("single", "exhaustive"):
        raise _NoTableError("search is neither 'single' nor 'exhaustive'")
    if not 1 <= len(kept) <= MAX_CANDIDATES + 1 or not heads or not names:
        raise _NoTableError(f"{len(kept)} choices of {len(heads)} layers on {len(names)} splits")
    if any(kept[0].get(layer) != list(range(count)) for layer, count in heads.items()):
        raise _NoTableError("the first row is not the whole model")
    if len(set(names)) < len(names):
        raise _NoTableError("two splits of the same name")
    splits = {
        name: _split(members, place, len(kept), classes, len(groups))
        for place, name in enumerate(names)
    }
    return HeadTable(kept, heads, classes, search, splits, groups)


def _split(
    members: Mapping[str, bytes], place: int, rows: int, classes: int, groups: int
) -> SplitPredictions:
    predicted = _array(members, f"{place}/predicted", "i8", 2)
    if len(predicted) != rows or not predicted.shape[1]:
        raise _NoTableError(f"{place}/predicted has the shape {predicted.shape}")
    columns = {"predicted": _indices(predicted, f"{place}/predicted", classes)}
    for name in MEASURES:
        values = _array(members, f"{place}/{name}", f"f{DTYPES[name].itemsize}", 2)
        if values.shape != predicted.shape or not np.isfinite(values).all():
            raise _NoTableError(f"{place}/{name} is not {predicted.shape} finite numbers")
        columns[name] = torch.from_numpy(values)
    for name, most in (("labels", classes), ("groups", groups)):
        if f"{place}/{name}" in members:
            values = _array(members, f"{place}/{name}", "i8", 1)
            if values.shape != predicted.shape[1:]:
                raise _NoTableError(f"{place}/{name} has the shape {values.shape}")
            columns[name] = _indices(values, f"{place}/{name}", most)
    return SplitPredictions(**columns)


def _array(members: Mapping[str, bytes], name: str, dtype: str, ndim: int) -> np.ndarray:
    if name not in members:
        raise _NoTableError(f"no {name}")
    file = io.BytesIO(members[name])
    value = np.lib.format.read_array(file, allow_pickle=False)
    if value.dtype != np.dtype(f"<{dtype}") or value.ndim != ndim:
        raise _NoTableError(f"{name} is {value.dtype} of {value.ndim} axes")
    return np.array(value, order="C")


def _indices(values: np.ndarray, name: str, count: int) -> torch.Tensor:
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise _NoTableError(f"{name} has values outside 0 to {count - 1}")
    return torch.from_numpy(values)


def _kept(entry: Any, heads: Mapping[int, int]) -> Kept:
    kept = {_whole(layer): [_whole(head) for head in listed] for layer, listed in entry}
    for layer, listed in kept.items():
        if layer not in heads or not listed or sorted(set(listed)) != listed:
            raise _NoTableError(f"heads {listed} of layer {layer}")
        if listed[-1] >= heads[layer]:
            raise _NoTableError(f"heads {listed} of layer {layer}")
    return kept


def _whole(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise _NoTableError(f"{value!r:.40} where a whole number has to be")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _NoTableError(f"{value!r:.40} where a name has to be")
    return value
