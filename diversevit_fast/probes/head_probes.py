"""HeadProbes: a table of what each head does, a row per head."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import UsageError, require, usage_error
from ..files import read_bytes, write_atomically

DEAD = 0.95
READS = 0.2
KINDS = ("dead", "spurious", "robust", "neither")
_LARGEST = 64 * 2**20  # bytes; a thousand heads have 1 MB


@dataclass(frozen=True)
class HeadProbes:
    """What each head does; ``probe_heads`` makes it. All shares and accuracies are from 0 to 1.

    Columns of a row, for each attribute ``A`` and region ``R``; a measure that was not taken has no column:

    =====================  =======================================================================================
    ``layer``, ``head``    numbers, from 0
    ``prevalence``         the share of images that get the head's most frequent prediction, the head alone
    ``use_A``              agreement of the prediction of the head alone with the attribute
    ``zero_A``             agreement without the head (the others times H / (H - 1)) minus that of all heads
    ``mean_A``             the same with the head replaced by its mean over the images
    ``decode_A``           accuracy of a linear classifier of the attribute from the head's output
    ``control_A``          the same with outputs of shuffled images: what chance gives
    ``selectivity_A``      ``decode_A - control_A``
    ``mass_R``             share of the class token's attention to patches that falls on the region
    ``area_R``             the region's share of the image: what even attention would give
    ``swap_A``             share of predictions of the head alone that change when the attribute's part of the
                           image is replaced by that of an image with another value
    ``kind``               with attributes ``core`` and ``spurious``: see below
    =====================  =======================================================================================

    ``zero_A`` and ``mean_A`` are None in a layer of one head. Kinds: a head is ``"dead"`` if its prevalence is at
    least 0.95. It reads an attribute if ``use_A`` is at least a fifth of the way from chance (one by the number of
    values) to 1, 0.6 for two values. It is ``"robust"`` if it reads the core attribute and ``use_core`` exceeds
    ``use_spurious``, ``"spurious"`` if it reads the spurious one and is not robust, else ``"neither"``.

    Attributes:
        table: the rows, as dictionaries.
        whole: ``use_A`` and ``swap_A`` of all heads together, and their prevalence.
        cka: by layer, linear CKA of the heads' class-token outputs, H x H; NaN for a constant head. Empty if
            outputs were not looked at.
        images: how many images were seen.
        values: by attribute, how many values it has.
        extra: what else belongs to it, as JSON values; kept in JSON files.
    """

    table: list[dict[str, Any]]
    whole: dict[str, float]
    cka: dict[int, list[list[float]]]
    images: int
    values: dict[str, int]
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per head, layer by layer; changing them changes nothing here."""
        return [dict(row) for row in self.table]

    @property
    def specialisation(self) -> float:
        """The mean of ``|use_core - use_spurious|`` over the heads that are not dead; NaN if all are.

        Raises:
            UsageError: no attributes ``core`` and ``spurious``.
        """
        self._check_pair("specialisation")
        live = [abs(r["use_core"] - r["use_spurious"]) for r in self.table if r["kind"] != "dead"]
        return sum(live) / len(live) if live else math.nan

    @property
    def counts(self) -> dict[str, int]:
        """How many heads are of each kind.

        Raises:
            UsageError: no attributes ``core`` and ``spurious``.
        """
        self._check_pair("counts")
        return {kind: sum(row["kind"] == kind for row in self.table) for kind in KINDS}

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """Return the rows as CSV, and write them to ``path`` if given; None is an empty cell.

        Raises:
            FileError: the system refuses to write there.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.table[0]), lineterminator="\n")
        writer.writeheader()
        for row in self.table:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        _write(path, text.getvalue())
        return text.getvalue()

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Return everything as JSON (a NaN is null), and write it to ``path`` if given.

        Raises:
            FileError: the system refuses to write there.
        """
        text = json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"
        _write(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> "HeadProbes":
        """Read what ``to_json`` wrote.

        Raises:
            UsageError: another file, or one that cannot be read.
        """
        try:
            held = json.loads(read_bytes(path, _LARGEST).decode("utf-8"))
            cka = {
                int(layer): [[math.nan if x is None else float(x) for x in row] for row in matrix]
                for layer, matrix in held["cka"].items()
            }
            table = [dict(row) for row in held["table"]]
            if not table or any(row.keys() != table[0].keys() for row in table):
                raise ValueError("rows of different columns, or none")
            return cls(
                table,
                dict(held["whole"]),
                cka,
                int(held["images"]),
                dict(held["values"]),
                dict(held["extra"]),
            )
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
            got = f"{path} ({type(failure).__name__}: {failure})"
            hint = "probe the model again"
            raise usage_error("probes", "a file of HeadProbes.to_json", got, hint) from None

    def to_pandas(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            pandas = require("pandas", extra="train")
        except UsageError:
            hint = "pip install pandas, or use rows()"
            raise usage_error("pandas", "an installed package", "no such module", hint) from None
        return pandas.DataFrame(self.rows())

    def _check_pair(self, what: str) -> None:
        if "kind" not in self.table[0]:
            got = ", ".join(self.values)
            hint = "name them so in probe_heads"
            raise usage_error(what, "attributes named core and spurious", got, hint)


def kind_of(row: Mapping[str, Any], values: Mapping[str, int]) -> str:
    """Return the kind of a head: see ``HeadProbes``."""

    def reads(attribute: str) -> bool:
        chance = 1 / values[attribute]
        return row[f"use_{attribute}"] >= chance + READS * (1 - chance)

    if row["prevalence"] >= DEAD:
        return "dead"
    if reads("core") and row["use_core"] > row["use_spurious"]:
        return "robust"
    return "spurious" if reads("spurious") else "neither"


def _write(path: str | PathLike[str] | None, text: str) -> None:
    if path is not None:
        write_atomically(Path(path), lambda file: file.write(text.encode("utf-8")))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
