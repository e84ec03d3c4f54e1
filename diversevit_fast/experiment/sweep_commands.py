"""The command ``diversevit sweep``."""

import time
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from ..errors import UsageError, usage_error
from . import options as o
from .config import is_path
from .sweep_claims import STALE_AFTER
from .terminal import is_quiet

_LISTS, _WORK = "Settings, each a comma list of values", "Work"


def _list(said: str) -> Any:
    return typer.Option(help=said, rich_help_panel=_LISTS, metavar="LIST")


def sweep(
    ctx: typer.Context,
    penalty_weight: Annotated[str | None, _list("Weights of the penalty; 0 is ERM.")] = None,
    lr: Annotated[str | None, _list("Learning rates, of ERM too.")] = None,
    epochs: Annotated[str | None, _list("Numbers of epochs.")] = None,
    batch_size: Annotated[str | None, _list("Samples per step.")] = None,
    data: Annotated[str | None, _list("Data sets.")] = None,
    correlation: Annotated[str | None, _list("How often digit and label agree.")] = None,
    samples: Annotated[str | None, _list("Images per split.")] = None,
    label_noise: Annotated[
        str | None, _list("Fractions of the training images with wrong labels.")
    ] = None,
    img_size: Annotated[str | None, _list("Sizes of a folder's images, in pixels.")] = None,
    data_seed: Annotated[str | None, _list("Seeds of the data.")] = None,
    wrt: Annotated[str | None, _list("input, output.")] = None,
    granularity: Annotated[str | None, _list("token, sample.")] = None,
    layers: Annotated[str | None, _list("last, all, or numbers joined by /: 0/-1.")] = None,
    optimizer: Annotated[str | None, _list("adam, adamw, sgd.")] = None,
    weight_decay: Annotated[str | None, _list("Weight decays of the optimizer.")] = None,
    amp: Annotated[str | None, _list("bf16, none.")] = None,
    augment: Annotated[
        str | None, _list("none, flip, crop; both in one training: flip/crop.")
    ] = None,
    schedule_epochs: Annotated[
        str | None, _list("Epochs of the learning-rate schedule; none: --epochs.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--model", help="diversevit, timm:NAME.", rich_help_panel=_LISTS, metavar="LIST"
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="Files to begin with, or none; of several models one each, in their order.",
            rich_help_panel=_LISTS,
            metavar="LIST",
        ),
    ] = None,
    every: Annotated[str | None, _list("The penalty every N-th step only.")] = None,
    fraction: Annotated[str | None, _list("The penalty of a part of each batch.")] = None,
    seeds: Annotated[str | None, _list("Reported seeds: 0-9 or 0,3,5-7.")] = None,
    pilot_seeds: Annotated[
        str | None, _list("Other seeds, on which the best setting is chosen.")
    ] = None,
    source: o.Source = None,
    metadata: o.Metadata = None,
    download: o.Download = None,
    freeze_below: o.FreezeBelow = None,
    preset: o.Preset = None,
    config: o.Config = None,
    threads: o.Threads = None,
    device: o.Device = None,
    graph: o.Graph = None,
    keep_checkpoints: Annotated[
        bool | None,
        typer.Option(
            "--keep-checkpoints",
            help="Keep what run --continue needs, in each cell's folder.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the sweep; new, or of the same sweep.", rich_help_panel=_WORK),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Folder of a sweep to go on with.", rich_help_panel=_WORK)
    ] = None,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="With --resume: failed cells too.", rich_help_panel=_WORK),
    ] = False,
    status: Annotated[
        bool,
        typer.Option("--status", help="Say how far it is; train nothing.", rich_help_panel=_WORK),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes; default: what cores allow.", rich_help_panel=_WORK),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to use: 0,1.", rich_help_panel=_WORK, metavar="LIST")
    ] = None,
    per_gpu: Annotated[
        int | None, typer.Option(help="Processes on each GPU.", rich_help_panel=_WORK)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Every n-th cell from the k-th on: k/n.", rich_help_panel=_WORK),
    ] = None,
    stale_after: Annotated[
        float,
        typer.Option(
            help="Minutes of silence after which a process is gone.", rich_help_panel=_WORK
        ),
    ] = STALE_AFTER,
    quiet: o.Quiet = False,
) -> None:
    """One training for every combination of settings and every seed, resumable, by many processes."""
    from .sweep import resume_sweep, run_sweep

    for name, folder in (("out", out), ("resume", resume)):
        if folder is not None and not is_path(folder):
            raise usage_error(name, "the name of a folder", repr(folder), "name it")
    given = {k for k, v in ctx.params.items() if v is not None and v is not False}
    given -= {"stale_after", "retry", "status"}
    if status:
        if len(given) != 1 or not given <= {"out", "resume"}:
            got = ", ".join(map(o.spelling, sorted(given))) or "nothing"
            raise usage_error("status", "only the folder of a sweep", got, "say --out FOLDER")
        return _show_status(out or resume or "", stale_after)
    hands = _hands(workers, gpus, per_gpu, shard, stale_after)
    if resume is not None:
        others = sorted(given - {"resume", "workers", "gpus", "per_gpu", "shard"})
        if others:
            got = ", ".join(map(o.spelling, others))
            raise usage_error("resume", "no setting", got, "the sweep's folder holds them")
        return _work(lambda say: resume_sweep(resume, hands=hands, retry=retry, say=say))
    if retry:
        raise usage_error("retry", "--resume FOLDER beside it", "none", "name the sweep")
    if out is None:
        raise usage_error("out", "the folder of the sweep", "none", "say --out sweeps/NAME")
    if seeds is None:
        raise usage_error("seeds", "seeds such as 0-9", "none", "list them")
    grid = _grid(ctx.params, seeds, pilot_seeds, config)
    _work(lambda say: run_sweep(grid, out, hands=hands, say=say))


def _grid(params: dict[str, Any], seeds: str, pilot_seeds: str | None, config: str | None) -> Any:
    from .config import Settings
    from .sweep_grid import SINGLE, Grid, parse_list, parse_seeds, parse_weights

    known = Settings.__dataclass_fields__
    given = {k: v for k, v in params.items() if k in known and v is not None and k != "seeds"}
    fixed = {name: value for name, value in given.items() if name in SINGLE}
    lists = {name: parse_list(name, v) for name, v in given.items() if name not in SINGLE}
    weights = None
    if len(lists.get("architecture", ())) > 1 and "pretrained" in lists:
        del lists["pretrained"]
        weights = parse_weights(lists["architecture"], given["pretrained"])
    return Grid.of(
        lists,
        weights=weights,
        seeds=parse_seeds("seeds", seeds),
        pilot_seeds=() if pilot_seeds is None else parse_seeds("pilot_seeds", pilot_seeds),
        config=config,
        **fixed,
    )


def _hands(
    workers: int | None, gpus: str | None, per_gpu: int | None, shard: str | None, minutes: float
) -> Any:
    from .sweep import Hands

    if workers is not None and not 1 <= workers <= 1024:
        raise usage_error("workers", "a number from 1 to 1024", workers, "try 2")
    if gpus is not None and workers is not None:
        raise usage_error("workers", "--workers or --gpus", "both", "say --per-gpu instead")
    if per_gpu is not None and gpus is None:
        raise usage_error("per-gpu", "--gpus beside it", "none", "say --gpus 0")
    if per_gpu is not None and not 1 <= per_gpu <= 1024:
        raise usage_error("per-gpu", "a number from 1 to 1024", per_gpu, "try 4")
    if not 0.5 <= minutes <= 1e6:
        raise usage_error("stale-after", "minutes, 0.5 at least", minutes, "leave it out")
    names = [] if gpus is None else [name.strip() for name in gpus.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise usage_error("gpus", "different GPUs such as 0,1", repr(gpus), "list them")
    return Hands(workers, tuple(names), per_gpu or 1, _shard(shard), minutes)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 10**6:
        return int(index), int(count)
    raise usage_error("shard", "one of n shards such as 1/4", repr(text), "count from 1")


def _work(job: Any) -> None:
    """Run ``job`` and say how the sweep stands; exit with 1 if a cell failed or was missed, with 130 on Ctrl-C."""
    from .run import Interrupted

    try:
        outcome = job(o.silent if is_quiet.get() else _say)
    except KeyboardInterrupt as interrupted:
        said = interrupted if isinstance(interrupted, Interrupted) else "interrupted"
        typer.echo(said, err=True)
        raise typer.Exit(130) from None
    for name, reason in outcome.failed.items():
        _say(f"failed: {name}: {reason}")
    parts = [f"{outcome.done} done"]
    parts += [f"{outcome.running} with other processes"] * bool(outcome.running)
    parts += [f"{len(outcome.failed)} failed"] * bool(outcome.failed)
    parts += [f"{outcome.left} left"] * bool(outcome.left)
    _say(", ".join(parts))
    if outcome.done:
        _say(str(outcome.folder / "sweep.html"))
    if outcome.failed or outcome.missed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    typer.echo(f"{datetime.now():%H:%M:%S} {line}")


def _show_status(folder: str, stale_after: float) -> None:
    from .sweep_folder import SweepFolder
    from .sweep_results import read_results

    sweep = SweepFolder.open(folder, stale_after)
    progress = sweep.progress()
    counts = {
        "done": len(progress.done),
        "running": len(progress.running),
        "to do": len(progress.left),
        "failed": len(progress.failed),
    }
    typer.echo(f"{len(sweep.cells)} cells: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    for name, holder in progress.running.items():
        since = timedelta(seconds=round(holder.since))
        typer.echo(f"running: {name}: {holder}, for {since}")
    for name, holder in progress.gone.items():
        typer.echo(f"stopped: {name}: {holder} is gone")
    for name, reason in progress.failed.items():
        typer.echo(f"failed: {name}: {reason}")
    try:
        rows = read_results(sweep.path)
    except UsageError:  # none yet
        rows = []
    spent = {row["cell"]: row["seconds"] for row in rows}
    if progress.running and spent:
        mean = sum(spent.values()) / len(spent)
        begun = sum(min(holder.since, mean) for holder in progress.running.values())
        rest = mean * (len(progress.left) + len(progress.running)) - begun
        end = datetime.fromtimestamp(time.time() + max(0.0, rest) / len(progress.running))
        typer.echo(
            f"estimated end: {end:%Y-%m-%d %H:%M}, from a mean of {mean:.0f} s for {len(spent)} cells"
        )
    elif progress.left:
        typer.echo("estimated end: none, nobody works on it" if not progress.running else "")
