"""A process that trains for a run: ``python -m diversevit_fast.experiment.worker FOLDER``.

It reads the settings from the folder of the unfinished run, then the name of a training a line, and writes what it has
to say, pickled, to its standard output; what libraries print there goes to standard error. Once the run is gone, it
ends at the next thing it has to say.
"""

import pickle
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import UsageError, usage_error
from .config import Settings, read_json
from .distributed import OneProcess
from .frozen_trunk import inputs_of
from .head_probes import try_to_probe
from .machine import choose_device
from .run import fingerprint, load, save_weights, tasks_of
from .run_folder import Place
from .train import train
from .workers import Relay


def work(folder: Path, names: Iterable[str], out: BinaryIO) -> None:
    """Train what ``names`` says, line by line.

    Written to ``out``: calls for a ``train.Watcher``, None after each training, and an error that ended one.
    """

    def say(what: Any) -> None:
        pickle.dump(what, out)
        out.flush()

    try:
        place = Place.of(folder)
        record = read_json(place.record, "config.json")
        settings = Settings.from_json(record["settings"])
        torch.set_num_threads(record["threads"])
        splits = load(settings)
        prints = {name: fingerprint(data) for name, data in splits.items()}
        if prints != record["splits"]:
            hint = "restore the data it started with"
            raise usage_error("data", "what the run started with", "other data", hint)
        tasks = {str(task): task for task in tasks_of(settings)}
        ranks = OneProcess(choose_device(settings.device))
        images = splits
        splits = inputs_of(settings, images, prints, ranks.device, Relay(say).noted)
        for name in names:
            task = tasks[name.strip()]
            path = place.checkpoints / f"{task}.pt"
            save_weights(train(settings, task, splits, path, Relay(say), ranks), task, folder)
            if splits is images:
                weights = folder / f"{task}.safetensors"
                if note := try_to_probe(weights, images, ranks.device):
                    Relay(say).noted(note)
            say(None)
    except (UsageError, MemoryError) as failure:
        say(failure)


if __name__ == "__main__":
    spoken, sys.stdout = sys.stdout.buffer, sys.stderr
    with suppress(BrokenPipeError):
        work(Path(sys.argv[1]), sys.stdin, spoken)
