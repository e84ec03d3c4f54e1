"""The commands of ``diversevit``, as a typer app; ``cli.main`` turns errors into one line."""

import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import usage_error
from ..files import writing
from . import options as o
from .config import MOST_SEEDS, is_path

_BY_RANKS = ("run", "train")  # commands that torchrun's ranks can share

app = typer.Typer(
    help="Train vision transformers whose attention heads look at different things.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.callback()
def _check_launch(ctx: typer.Context) -> None:
    from .distributed import launched

    if launched() and ctx.invoked_subcommand not in _BY_RANKS:
        hint = f"start {ctx.invoked_subcommand} without it"
        raise usage_error(
            "torchrun", f"one of {', '.join(_BY_RANKS)}", ctx.invoked_subcommand, hint
        )


@app.command()
def run(
    ctx: typer.Context,
    data: o.Data = None,
    source: o.Source = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    preset: o.Preset = None,
    config: o.Config = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    erm_lr: o.ErmLr = None,
    penalty_weight: o.PenaltyWeight = None,
    wrt: o.Wrt = None,
    granularity: o.Granularity = None,
    layers: o.Layers = None,
    every: o.Every = None,
    fraction: o.Fraction = None,
    seeds: o.Seeds = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    tensorboard: o.TensorBoard = None,
    fsdp: o.Fsdp = None,
    graph: o.Graph = None,
    out: o.Out = None,
    resume: o.Resume = None,
) -> None:
    """The experiment end to end: train ERM and DiverseViT, select heads, write a report."""
    if resume is not None:
        if not is_path(resume):
            raise usage_error("resume", "the folder of a run", repr(resume), "name it")
        given = [name for name, value in ctx.params.items() if value is not None]
        if len(given) > 1:
            others = ", ".join(f"--{name.replace('_', '-')}" for name in given if name != "resume")
            raise usage_error(
                "resume", "no other option", others, "the run folder holds the settings"
            )
        from .run import resume as finish

        return _work(lambda console: finish(resume, console=console))
    if seed is not None and seeds is not None:
        raise usage_error("seed", "--seed or --seeds", "both", "drop one")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        wanted = f"a number of seeds, at least 1 and at most {MOST_SEEDS}"
        raise usage_error("seeds", wanted, seeds, "try --seeds 2")
    chosen = {} if seeds is None else {"seeds": tuple(range(seeds))}
    chosen |= {} if seed is None else {"seeds": (seed,)}
    _start(_settings_of(ctx) | chosen, config, out)


@app.command()
def train(
    ctx: typer.Context,
    method: Annotated[str, typer.Argument(help="erm or diversevit.")],
    seed: Annotated[int, typer.Option(help="Initial weights and order of batches.")] = 0,
    data: o.Data = None,
    source: o.Source = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    preset: o.Preset = None,
    config: o.Config = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
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
    out: o.Out = None,
) -> None:
    """Train one method on one seed; the folder is that of a run."""
    options = _settings_of(ctx)
    if method == "erm" and "lr" in options:
        options["erm_lr"] = options.pop("lr")
    _start({**options, "methods": (method,), "seeds": (seed,)}, config, out)


@app.command()
def evaluate(
    ctx: typer.Context,
    weights: o.Weights,
    data: o.Data = None,
    source: o.Source = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    config: o.DataConfig = None,
) -> None:
    """Accuracy of all heads and of each head of the last layer alone, on every split."""
    from .trained_model import load_model, show_evaluation, splits_for

    options = _settings_of(ctx)
    model = load_model(weights)
    splits, named = splits_for(Path(weights), options, config, model)
    show_evaluation(model, splits, f"{weights} on {named}")


@app.command()
def select_heads(
    ctx: typer.Context,
    weights: o.Weights,
    search: Annotated[str, typer.Option(help="single, greedy or exhaustive.")] = "single",
    score: Annotated[str, typer.Option(help="accuracy, worst_group or confidence.")] = "accuracy",
    save: Annotated[
        str | None, typer.Option(help="New file for the model without the other heads.")
    ] = None,
    data: o.Data = None,
    source: o.Source = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    config: o.DataConfig = None,
) -> None:
    """Choose heads of the last layer on OOD validation; say what they reach on the test sets."""
    from .trained_model import SCORES, SEARCHES, load_model, save_pruned, show_selection, splits_for

    for name, value, words in (("search", search, SEARCHES), ("score", score, SCORES)):
        if value not in words:
            raise usage_error(
                name, f"one of {', '.join(words)}", reprlib.repr(value), "check the spelling"
            )
    if save is not None:
        _check_new("save", save)
    options = _settings_of(ctx)
    model = load_model(weights)
    splits, named = splits_for(Path(weights), options, config, model)
    best = show_selection(model, splits, f"{weights} on {named}", search, score)
    if save is not None:
        save_pruned(model, best, save)
        typer.echo(save)


@app.command()
def report(folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Draw the pictures and write report.html again from the files of a finished run."""
    from .report import write_report

    typer.echo(write_report(Path(folder)))


@app.command()
def doctor() -> None:
    """Versions, devices, backends, and a numerical self-check; exits with 1 if that fails."""
    from .doctor import report_health

    if not report_health():
        raise typer.Exit(1)


@data_app.command()
def prepare(
    root: Annotated[str, typer.Option(help="torchvision's data folder.")],
    out: Annotated[str, typer.Option(help="The .npz file to write.")],
    download: Annotated[bool, typer.Option("--download", help="Fetch what is missing.")] = False,
) -> None:
    """Write MNIST-CIFAR's images to one file that later runs take as --source."""
    from ..data import prepare_mnist_cifar

    if not is_path(root):
        raise usage_error("root", "torchvision's data folder", repr(root), "name it")
    _check_new("out", out)
    typer.echo(prepare_mnist_cifar(root, out, download=download))


def _check_new(option: str, name: str) -> None:
    """Raise if the file exists, or if its folder cannot be written to."""
    path, hint = Path(name), "choose another name"
    if not is_path(name):
        raise usage_error(option, "a new file", repr(name), hint)
    with writing(path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        else:
            raise usage_error(option, "a new file", f"{name}, which exists", hint)
        if path.parent.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
            raise usage_error(option, "a folder to write into", path.parent, "choose another")


def _settings_of(ctx: typer.Context) -> dict[str, Any]:
    """Return the options that are settings, with layers as numbers where possible."""
    from .config import Settings

    names = Settings.__dataclass_fields__
    given = {k: v for k, v in ctx.params.items() if k in names and k != "seeds" and v is not None}
    if "layers" in given and given["layers"] not in ("last", "all"):
        try:
            given["layers"] = tuple(int(part) for part in given["layers"].split(","))
        except ValueError:
            got = reprlib.repr(given["layers"])
            raise usage_error(
                "layers", "last, all or numbers such as 0,-1", got, "mend it"
            ) from None
    return given


def _start(options: dict[str, Any], config: str | None, out: str | None) -> None:
    from .config import resolve
    from .run import run

    settings = resolve(options, config)
    if out is not None and not is_path(out):
        raise usage_error("out", "the name of a folder", repr(out), "name it, or leave it out")
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
