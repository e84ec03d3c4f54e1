"""What a run is made of: presets, config file, options; the last one that speaks wins."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data.load import NAMES
from ..errors import UsageError, expected

METHODS = ("erm", "diversevit")
MODEL_KEYS = (
    "patch_size",
    "dim",
    "depth",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "last_residual",
)

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 100, "batch_size": 80, "lr": 1e-3, "erm_lr": 1e-4, "penalty_weight": 100.0},
    # For digits-photos in minutes on two cores. Chosen on validation, two seeds: learning rate of
    # each method among 5e-4, 1e-3, 2e-3; penalty weight among 10, 100. The time decided the rest.
    "quick": {
        "epochs": 20,
        "batch_size": 80,
        "lr": 1e-3,
        "erm_lr": 1e-3,
        "penalty_weight": 10.0,
        "model": {"patch_size": 8, "depth": 3, "head_dim": 32},
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers. Defaults: the published recipe (preset ``paper``).

    Attributes:
        preset: the preset the settings started from (a label; the values below decide).
        data: name of a data set of ``diversevit_fast.data``.
        source, download, correlation, samples: passed to ``diversevit_fast.data.load_splits``.
        data_seed: seed of the data, one for all ``seeds``: none trains on another's test images.
        methods: which of ``"erm"`` (penalty weight 0) and ``"diversevit"`` to train.
        seeds: one training per method and seed; decides initial weights and the order of batches.
        epochs: the learning rate falls tenfold after 70 % and again after 80 % of them.
        batch_size: samples per step.
        lr, erm_lr: Adam's initial learning rate of DiverseViT and of ERM.
        penalty_weight: lambda, the weight of the diversity penalty.
        layers, wrt, granularity, every, fraction: passed to ``HeadDiversity``. Evaluation always takes
            the penalty of every sample.
        model: arguments of ``models.DiverseViT`` that differ from its defaults.
        threads: CPU threads; PyTorch's own choice if None.
        device: ``"auto"``, ``"cpu"`` or a PyTorch device name.
        tensorboard: also write TensorBoard event files.
        fsdp: of several ranks, each keeps a part of the parameters (FSDP2), not all of them (DDP).
    """

    preset: str = "paper"
    data: str = "digits-photos"
    source: str | None = None
    download: bool = False
    correlation: float | None = None
    samples: int | None = None
    data_seed: int = 0
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 100
    batch_size: int = 80
    lr: float = 1e-3
    erm_lr: float = 1e-4
    penalty_weight: float = 100.0
    layers: str | tuple[int, ...] = "last"
    wrt: str = "input"
    granularity: str = "token"
    every: int = 1
    fraction: float = 1.0
    model: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    device: str = "auto"
    tensorboard: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name))
        if unknown := [key for key in self.model if key not in MODEL_KEYS]:
            raise _unknown([f"model.{key}" for key in unknown], MODEL_KEYS)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Settings from JSON values; lists become tuples.

        Raises:
            UsageError: a key is unknown or a value is unfit; the message names it.
        """
        names = [entry.name for entry in fields(cls)]
        if unknown := [key for key in values if key not in names]:
            raise _unknown(unknown, names)
        plain: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """The inverse of ``from_json``."""
        return asdict(self)

    def base_lr(self, method: str) -> float:
        """Initial learning rate of ``method``."""
        return self.lr if method == "diversevit" else self.erm_lr


def resolve(options: Mapping[str, Any], config: str | Path | None = None) -> Settings:
    """Options over config file over preset over defaults.

    Args:
        options: values by name of ``Settings`` field; None means not given.
        config: a JSON file of the same names, or a run's ``config.json``.

    Raises:
        UsageError: unknown preset or key, unfit value, unreadable file.
    """
    given = {key: value for key, value in options.items() if value is not None}
    filed = {} if config is None else read_config(config)
    preset = given.get("preset", filed.get("preset", "quick"))
    if not isinstance(preset, str) or preset not in PRESETS:
        raise expected("preset", f"one of {', '.join(PRESETS)}", repr(preset), "check the spelling")
    return Settings.from_json({**PRESETS[preset], **filed, **given, "preset": preset})


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file: the file itself, or its ``settings`` if a run wrote it.

    Raises:
        UsageError: no such file, no JSON, or no JSON object.
    """
    values = read_json(Path(path), "config")
    inner = values.get("settings", values) if "versions" in values else values
    if not isinstance(inner, dict):
        raise expected("config", "settings as a JSON object", type(inner).__name__, f"mend {path}")
    return inner


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """A JSON object read from ``path``.

    Raises:
        UsageError: no such file, no JSON, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise expected(
            argument, "a readable file", f"{path} ({error.strerror})", "check it"
        ) from None
    except ValueError as error:
        raise expected(argument, "a JSON file", f"{path} ({error})", "mend the file") from None
    if not isinstance(values, dict):
        raise expected(argument, "a JSON object", type(values).__name__, f"mend {path}")
    return values


def _unknown(keys: list[str], names: Any) -> UsageError:
    return expected("config", f"keys among {', '.join(names)}", ", ".join(keys), "remove or rename")


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= low


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
            return False
        return x <= high and (x > low if open_low else x >= low)

    return fits


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or fits(x)


def _several(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, tuple) and all(map(fits, x)) and 0 < len(set(x)) == len(x)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "preset": (_text, "the name of a preset"),
    "data": (lambda x: x in NAMES, f"one of {', '.join(NAMES)}"),
    "source": (_maybe(_text), "a path"),
    "download": (_flag, "true or false"),
    "correlation": (_maybe(_number(0, 1)), "a number from 0 to 1"),
    "samples": (_maybe(_whole(1)), "a whole number of at least 1"),
    "data_seed": (_whole(0), "a whole number of at least 0"),
    "methods": (_several(METHODS.__contains__), "different methods among erm, diversevit"),
    "seeds": (_several(_whole(0)), "different whole numbers of at least 0"),
    "epochs": (_whole(1), "a whole number of at least 1"),
    "batch_size": (_whole(1), "a whole number of at least 1"),
    "lr": (_number(0, open_low=True), "a number above 0"),
    "erm_lr": (_number(0, open_low=True), "a number above 0"),
    "penalty_weight": (_number(0), "a number of at least 0"),
    "layers": (
        lambda x: x in ("last", "all") or _several(lambda i: type(i) is int)(x),
        "last, all or different layer numbers such as 0,-1",
    ),
    "wrt": (("input", "output").__contains__, "input or output"),
    "granularity": (("token", "sample").__contains__, "token or sample"),
    "every": (_whole(1), "a whole number of at least 1"),
    "fraction": (_number(0, 1, open_low=True), "a number above 0 and at most 1"),
    "model": (lambda x: isinstance(x, dict), "an object of DiverseViT's arguments"),
    "threads": (_maybe(_whole(1)), "a whole number of at least 1"),
    "device": (_text, "auto, cpu or a PyTorch device"),
    "tensorboard": (_flag, "true or false"),
    "fsdp": (_flag, "true or false"),
}


def _check(name: str, value: Any) -> None:
    fits, wanted = _CHECKS[name]
    if not fits(value):
        raise expected(name, wanted, repr(value), "change the option or the config file")
