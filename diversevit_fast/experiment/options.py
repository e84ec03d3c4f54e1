"""Options that several commands share, as annotated types of typer."""

from typing import Annotated

import typer

_DATA, _RECIPE, _MACHINE = "Data", "Recipe", "Run"
Data = Annotated[
    str | None, typer.Option(help="digits-photos or mnist-cifar.", rich_help_panel=_DATA)
]
Source = Annotated[
    str | None,
    typer.Option(help="Prepared .npz file, or torchvision's data folder.", rich_help_panel=_DATA),
]
Download = Annotated[
    bool | None,
    typer.Option("--download", help="Let torchvision fetch the data.", rich_help_panel=_DATA),
]
Correlation = Annotated[
    float | None,
    typer.Option(help="How often the digit agrees with the label.", rich_help_panel=_DATA),
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
    typer.Option(help="The learning rate falls at 70 and 80 % of them.", rich_help_panel=_RECIPE),
]
BatchSize = Annotated[int | None, typer.Option(help="Samples per step.", rich_help_panel=_RECIPE)]
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
Threads = Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_MACHINE)]
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
Lr = Annotated[
    float | None, typer.Option(help="Learning rate (run: of DiverseViT).", rich_help_panel=_RECIPE)
]
ErmLr = Annotated[float | None, typer.Option(help="Learning rate of ERM.", rich_help_panel=_RECIPE)]
Seeds = Annotated[int | None, typer.Option(help="Run seeds 0 to N-1.", rich_help_panel=_RECIPE)]
Seed = Annotated[int | None, typer.Option(help="Run this one seed.", rich_help_panel=_RECIPE)]
Resume = Annotated[
    str | None, typer.Option(help="Finish this unfinished run.", rich_help_panel=_MACHINE)
]
DataConfig = Annotated[
    str | None,
    typer.Option(
        help="Run's config.json that says which data; default: the one beside the weights.",
        rich_help_panel=_DATA,
    ),
]
Weights = Annotated[str, typer.Argument(help="A .safetensors file of a run.")]
