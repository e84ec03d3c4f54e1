"""The commands of ``diversevit``, as a typer app; ``cli.main`` turns errors into one line."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import usage_error
from . import options as o
from .config import is_path
from .cost_commands import cost
from .data_commands import data_app
from .help_panels import arrange
from .run_commands import run, train
from .run_files import check_new
from .sweep_commands import sweep
from .terminal import is_quiet

_BY_RANKS = ("run", "train")  # commands that torchrun's ranks can share

app = typer.Typer(
    help="Train vision transformers whose attention heads look at different things.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")


@app.callback()
def _check_launch(ctx: typer.Context, version: o.Version = False, quiet: o.Quiet = False) -> None:
    from .distributed import launched

    if launched() and ctx.invoked_subcommand not in _BY_RANKS:
        hint = f"start {ctx.invoked_subcommand} without it"
        raise usage_error(
            "torchrun", f"one of {', '.join(_BY_RANKS)}", ctx.invoked_subcommand, hint
        )


app.command()(run)
app.command()(train)
app.command(name="sweep")(sweep)


@app.command()
def evaluate(
    ctx: typer.Context,
    weights: o.Weights,
    data: o.Data = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    img_size: o.ImgSize = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    config: o.DataConfig = None,
    num_heads: o.NumHeads = None,
    image_size: o.ImageSize = None,
    corrupt: o.Corrupt = False,
    out: o.CorruptOut = None,
    as_json: o.Json = False,
) -> None:
    """Accuracy of all heads and of each head of the last layer alone, on every split."""
    from .corrupted import check_corrupted, evaluate_corrupted, show_corrupted, write_rows
    from .model_files import load_model, sizes_of
    from .trained_model import show_evaluation, splits_for

    file = check_corrupted(corrupt, out)

    options = o.settings_of(ctx)
    model = load_model(weights, config, sizes_of(num_heads, image_size))
    splits, named = splits_for(weights, options, config, model)
    if not corrupt:
        return show_evaluation(model, splits, f"{weights} on {named}", as_json=as_json)
    said = o.silent if is_quiet.get() else lambda line: typer.echo(line, err=True)
    rows = evaluate_corrupted(model, splits, said=said)
    if file is not None:
        write_rows(rows, file)
    show_corrupted(rows, f"{weights} on {named}", as_json=as_json)


@app.command()
def select_heads(
    ctx: typer.Context,
    weights: o.Weights,
    search: Annotated[str, typer.Option(help="single, greedy or exhaustive.")] = "single",
    score: Annotated[
        str | None,
        typer.Option(help="accuracy (default), worst_group or confidence, on OOD validation."),
    ] = None,
    criterion: o.Criterion = None,
    labels: o.Labels = None,
    list_criteria: o.ListCriteria = None,
    save: Annotated[
        str | None, typer.Option(help="New file for the model without the other heads.")
    ] = None,
    data: o.Data = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    img_size: o.ImgSize = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    config: o.DataConfig = None,
    num_heads: o.NumHeads = None,
    image_size: o.ImageSize = None,
    as_json: o.Json = False,
) -> None:
    """Choose heads of the last layer on validation data; say what they reach on the test sets."""
    from . import trained_model as t
    from .criteria import check_criterion
    from .model_files import load_model, sizes_of

    if criterion is not None and score is not None:
        raise usage_error("criterion", "--score or --criterion", "both", "drop one")
    rule = t.Rule(search, score or "accuracy", criterion, labels)
    for name, value, words in (("search", search, t.SEARCHES), ("score", rule.score, t.SCORES)):
        if value not in words:
            raise usage_error(
                name, f"one of {', '.join(words)}", reprlib.repr(value), "check the spelling"
            )
    if criterion is not None:
        check_criterion(criterion, search, labels)
    elif labels is not None:
        raise usage_error("labels", "--criterion few_labels", "no criterion", "name it")
    if save is not None:
        check_new("save", save)
    options = o.settings_of(ctx)
    model = load_model(weights, config, sizes_of(num_heads, image_size))
    splits, named = t.splits_for(weights, options, config, model)
    found, title = t.select(model, splits, rule), f"{weights} on {named}"
    if not as_json:
        t.show_selection(found, title)
    if save is not None:
        t.save_pruned(model, found.choices[0], save)
    if as_json:
        t.print_selection(found, title, save)
    elif save is not None:
        typer.echo(save)


@app.command()
def probe(
    ctx: typer.Context,
    weights: Annotated[
        str,
        typer.Argument(metavar="WEIGHTS|RUN", help="A .safetensors file, or the folder of a run."),
    ],
    layers: Annotated[str, typer.Option(help="last or all.")] = "last",
    split: Annotated[
        str, typer.Option(help="Probed images: val_id, val_ood, test_id or test_ood.")
    ] = "test_ood",
    data: o.Data = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    img_size: o.ImgSize = None,
    download: o.Download = None,
    correlation: o.Correlation = None,
    samples: o.Samples = None,
    config: o.DataConfig = None,
    num_heads: o.NumHeads = None,
    image_size: o.ImageSize = None,
) -> None:
    """What each head uses, holds and attends to: a table, and CSV and JSON files beside the weights."""
    from .model_files import load_model, sizes_of
    from .show_probes import check_probe_options, show_probes

    files = check_probe_options(weights, layers, split)
    ctx.params.pop("layers")  # of the probes, not the setting of a training
    sizes = sizes_of(num_heads, image_size)

    def load(file: Path) -> Any:
        return load_model(str(file), config, sizes)

    show_probes(files, load, o.settings_of(ctx), config, layers, split)


@app.command()
def predict(
    weights: o.Weights,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")
    ],
    heads: Annotated[
        str | None,
        typer.Option(
            help="Of the last layer: numbers such as 0,2, or selected (by the run); default: all."
        ),
    ] = None,
    as_json: o.Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    config: o.DataConfig = None,
    num_heads: o.NumHeads = None,
    image_size: o.ImageSize = None,
) -> None:
    """Class and probability of images in files, by all heads or by some."""
    from . import predict as p
    from .model_files import config_beside, load_model, sizes_of

    if as_json and as_csv:
        raise usage_error("csv", "--json or --csv", "both", "drop one")
    paths = p.find_images(images)
    model = load_model(weights, config, sizes_of(num_heads, image_size))
    names = p.class_names(config_beside(weights, config), model)
    found, resized = p.predict(model, paths, p.heads_of(heads, model, weights), names)
    shown = p.as_json if as_json else p.as_csv if as_csv else p.as_table
    typer.echo(shown(found), nl=False)
    if resized:
        height, width = model.config["image_size"]
        counted = f"{resized} of {len(found)} images resized to {height} x {width} pixels"
        typer.echo(f"{counted} (height x width), as the model takes", err=True)


@app.command()
def selection_study(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        str, typer.Option(help="Folder for results and tables; continued if it exists.")
    ],
    epoch: Annotated[
        str, typer.Option(help="Weights: best (the selected head's epoch) or last.")
    ] = "best",
    id_split: Annotated[
        str, typer.Option(help="ID data that rules look at: val_id or train.")
    ] = "val_id",
    label_noise: Annotated[
        float, typer.Option(help="Fraction of wrong labels among the ID data.")
    ] = 0.0,
    shift: Annotated[
        bool, typer.Option(help="--no-shift: in-distribution data in place of the OOD data.")
    ] = True,
) -> None:
    """Compare rules that choose heads with few OOD labels or none, over the models of runs."""
    from .selection_study import Conditions, study

    folder = study(runs, out, Conditions(epoch, id_split, label_noise, shift), typer.echo)
    typer.echo((folder / "selection.md").read_text(encoding="utf-8"))


@app.command()
def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")
    ],
    out: Annotated[
        str | None,
        typer.Option(help="New .html file; needed for several runs, whose trainings it joins."),
    ] = None,
) -> None:
    """Write report.html of a finished run again; or a page of several runs, or of one that goes on.

    Such a page, and a .csv file beside it, lie outside of the runs' folders, in which nothing is changed:
    of one run that goes on in RUN-so-far.html. Runs are joined if they differ in seeds or methods alone.
    """
    from rich.console import Console

    from .report import write_page, write_report
    from .several import join, read_run
    from .summary import show_trainings

    if out is None and len(folders) > 1:
        raise usage_error("out", "the page of several runs", "none", "name it: --out all.html")
    if out is not None:
        if not is_path(out) or Path(out).suffix != ".html":
            raise usage_error("out", "a name that ends in .html", repr(out), "name it so")
        check_new("out", out)
        check_new("out", str(Path(out).with_suffix(".csv")))
    trainings = join([read_run(folder) for folder in folders])
    if out is None and (Path(folders[0]) / "metrics.csv").exists():
        typer.echo(write_report(Path(folders[0])))
        return
    page = Path(out) if out else Path(folders[0]).with_name(f"{trainings.name}-so-far.html")
    write_page(trainings, page)
    show_trainings(trainings, page, Console())


@app.command()
def doctor(as_json: o.Json = False) -> None:
    """Versions, devices, backends, a numerical self-check, and what to do; exits with 1 if the check fails."""
    from .doctor import report_health

    if not report_health(as_json=as_json):
        raise typer.Exit(1)


app.command()(cost)
arrange(app)
