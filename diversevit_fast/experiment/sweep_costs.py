"""What a training step of a sweep's cells costs, predicted once for all that cost the same, and kept in its folder."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from ..cost.calibration import load
from ..cost.devices import DEVICES, Device
from ..cost.predict import Cost
from ..cost.predict import cost as predict
from ..errors import UnsupportedError, UsageError
from ..files import make_folder, path_exists
from .config import Settings, read_json
from .model_files import load_model
from .run_files import write_json
from .sweep_grid import said_of

COSTS = ("predicted_step_flops", "predicted_step_peak_bytes", "predicted_step_seconds")
"""Columns of ``results.csv``: operations of a training step in the mean, its largest memory, and its time where the
rates of the machine are known: those of a calibration, or a GPU's of the table of ``cost``."""
_SAME = (
    *("preset", "source", "metadata", "download", "correlation", "samples", "data_seed"),
    "label_noise",
    *("methods", "seeds", "epochs", "schedule_epochs", "lr", "erm_lr", "weight_decay"),
    *("penalty_weight", "augment", "pretrained", "workers", "tensorboard", "keep_checkpoints"),
)
"""Settings that a step costs the same without; of the penalty's weight it matters only whether it is 0."""


def costs_of(
    settings: Settings, gpu: str | None, weights: Path, folder: Path
) -> dict[str, float | None]:
    """Return ``COSTS`` of a finished cell; what cannot be predicted is None.

    Args:
        gpu: that it was trained on, as the driver names it; None for a CPU.
        weights: its file of weights, which says the sizes of its model and images.
        folder: where predictions are kept, one file for all cells whose step is the same.
    """
    plain = settings.penalty_weight == 0
    device = _calibration() if gpu is None else next((d for d in DEVICES if d in gpu), None)
    said = f"{plain} {gpu} {device} {said_of(settings, _SAME)}"
    path = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"
    if not path_exists(path):
        make_folder(folder)
        known = gpu is None or device is not None  # else nobody knows which kernels would run
        found = _predicted(settings, plain, device or "cpu", weights) if known else None
        numbers = dict.fromkeys(COSTS, None) if found is None else _numbers(found, device)
        write_json(path, numbers)
    kept = read_json(path, "costs")
    return {name: kept.get(name) for name in COSTS}


def _predicted(settings: Settings, plain: bool, device: Device | str, weights: Path) -> Cost | None:
    """What a step costs; None for a frozen trunk, whose steps see tokens, and for what cannot be counted."""
    if settings.freeze_below is not None:
        return None
    names = ("layers", "wrt", "granularity", "every", "fraction")
    penalty = None if plain else {name: getattr(settings, name) for name in names}
    try:
        model: Any = load_model(str(weights))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a calibration that is not used
            return predict(
                model,
                penalty,
                batch=settings.batch_size,
                dtype="float32" if settings.amp is None else "bfloat16",
                optimizer=settings.optimizer,
                inputs=(model.config["channels"], *model.config["image_size"]),
                device=device,
                graph=settings.graph,
            )
    except (UnsupportedError, UsageError):
        return None


def _calibration() -> Device | None:
    """The rates of this CPU, if they were measured on it as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return load()
        except (UserWarning, UsageError):  # of another machine, or damaged: cost itself says so
            return None


def _numbers(found: Cost, device: object) -> dict[str, float | None]:
    seconds = None if device is None else found.seconds
    values = (
        sum(found.flops.values()),
        found.peak_bytes,
        None if seconds is None else seconds.step,
    )
    return dict(zip(COSTS, values, strict=True))
