"""The commands ``diversevit run`` and ``diversevit train``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import usage_error
from . import options as o
from .config import MOST_SEEDS, is_path


def run(
    ctx: typer.Context,
    data: o.Data = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    img_size: o.ImgSize = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    label_noise: o.LabelNoise = None,
    preset: o.Preset = None,
    config: o.Config = None,
    architecture: o.Model = None,
    pretrained: o.Pretrained = None,
    freeze_below: o.FreezeBelow = None,
    epochs: o.Epochs = None,
    schedule_epochs: o.ScheduleEpochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    erm_lr: o.ErmLr = None,
    optimizer: o.Optimizer = None,
    weight_decay: o.WeightDecay = None,
    amp: o.Amp = None,
    augment: o.Augment = None,
    penalty_weight: o.PenaltyWeight = None,
    wrt: o.Wrt = None,
    granularity: o.Granularity = None,
    layers: o.Layers = None,
    every: o.Every = None,
    fraction: o.Fraction = None,
    seeds: o.Seeds = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    workers: o.Workers = None,
    device: o.Device = None,
    tensorboard: o.TensorBoard = None,
    fsdp: o.Fsdp = None,
    graph: o.Graph = None,
    keep_checkpoints: o.KeepCheckpoints = None,
    out: o.Out = None,
    resume: o.Resume = None,
    continued: o.Continue = None,
) -> None:
    """The experiment end to end: train ERM and DiverseViT, select heads, write a report."""
    if resume is not None:
        return _resume(ctx, resume)
    if continued is not None:
        return _continue(ctx, continued, out)
    if seed is not None and seeds is not None:
        raise usage_error("seed", "--seed or --seeds", "both", "drop one")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        wanted = f"a number of seeds, at least 1 and at most {MOST_SEEDS}"
        raise usage_error("seeds", wanted, seeds, "try --seeds 2")
    chosen = {} if seeds is None else {"seeds": tuple(range(seeds))}
    chosen |= {} if seed is None else {"seeds": (seed,)}
    _start(o.settings_of(ctx) | chosen, config, out)


def train(
    ctx: typer.Context,
    method: Annotated[str, typer.Argument(help="erm or diversevit.")],
    seed: Annotated[int, typer.Option(help="Initial weights and order of batches.")] = 0,
    data: o.Data = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    img_size: o.ImgSize = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    label_noise: o.LabelNoise = None,
    preset: o.Preset = None,
    config: o.Config = None,
    architecture: o.Model = None,
    pretrained: o.Pretrained = None,
    freeze_below: o.FreezeBelow = None,
    epochs: o.Epochs = None,
    schedule_epochs: o.ScheduleEpochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    optimizer: o.Optimizer = None,
    weight_decay: o.WeightDecay = None,
    amp: o.Amp = None,
    augment: o.Augment = None,
    penalty_weight: o.PenaltyWeight = None,
    wrt: o.Wrt = None,
    granularity: o.Granularity = None,
    layers: o.Layers = None,
    every: o.Every = None,
    fraction: o.Fraction = None,
    threads: o.Threads = None,
    device: o.Device = None,
    tensorboard: o.TensorBoard = None,
    fsdp: o.Fsdp = None,
    graph: o.Graph = None,
    keep_checkpoints: o.KeepCheckpoints = None,
    out: o.Out = None,
) -> None:
    """Train one method on one seed; the folder is that of a run."""
    options = o.settings_of(ctx)
    if method == "erm" and "lr" in options:
        options["erm_lr"] = options.pop("lr")
    _start({**options, "methods": (method,), "seeds": (seed,)}, config, out)


def _resume(ctx: typer.Context, folder: str) -> None:
    from .continued_run import CHANGEABLE
    from .run import resume

    _check_folder("resume", folder)
    if given := _given(ctx, "resume"):
        listed, hint = ", ".join(map(o.spelling, given)), "the run folder holds the settings"
        if set(given) <= {*CHANGEABLE, "out"}:
            hint += f"; to train it further in a new folder: --continue {folder} with {listed}"
        raise usage_error("resume", "no other option", listed, hint)
    _work(lambda console: resume(folder, console=console))


def _continue(ctx: typer.Context, folder: str, out: str | None) -> None:
    from .continued_run import CHANGEABLE, continue_run

    _check_folder("continue", folder)
    _check_out(out)
    if other := [name for name in _given(ctx, "continued") if name not in {*CHANGEABLE, "out"}]:
        wanted = f"only {', '.join(map(o.spelling, CHANGEABLE))} beside it"
        hint = "the rest is the old run's; for another recipe start a new run from its --weights"
        raise usage_error("continue", wanted, ", ".join(map(o.spelling, other)), hint)
    changes = o.settings_of(ctx)
    _work(lambda console: continue_run(folder, out, console=console, **changes))


def _given(ctx: typer.Context, but: str) -> list[str]:
    """Return the names of the options that were given, except one."""
    return [name for name, value in ctx.params.items() if value is not None and name != but]


def _check_folder(option: str, folder: str) -> None:
    if not is_path(folder):
        raise usage_error(option, "the folder of a run", repr(folder), "name it")


def _check_out(out: str | None) -> None:
    if out is not None and not is_path(out):
        raise usage_error("out", "the name of a folder", repr(out), "name it, or leave it out")


def _start(options: dict[str, Any], config: str | None, out: str | None) -> None:
    from .config import resolve
    from .run import run

    settings = resolve(options, config)
    _check_out(out)
    _work(lambda console: run(settings, out, console=console))


def _work(job: Callable[[Any], Path]) -> None:
    """Run ``job`` and print its comparison; an interrupt prints one line and exits with 130."""
    from rich.console import Console

    from .distributed import ReportedError, close_ranks, first_rank
    from .run import Interrupted
    from .summary import show_comparison

    console = Console()
    try:
        folder = job(console)
        close_ranks()
        if first_rank():
            show_comparison(folder, console)
    except ReportedError:
        raise typer.Exit(2) from None
    except KeyboardInterrupt as interrupted:  # an ``Interrupted``, or before there was a folder
        if first_rank():
            said = interrupted if isinstance(interrupted, Interrupted) else "interrupted"
            typer.echo(said, err=True)
        raise typer.Exit(130) from None
