"""The commands ``diversevit data ...``, which make data sets."""

from typing import Annotated

import typer

from ..errors import usage_error
from .config import is_path
from .run_files import check_new

data_app = typer.Typer(help="Make data sets.", no_args_is_help=True)


@data_app.command()
def prepare(
    root: Annotated[str, typer.Option(help="torchvision's data folder.")],
    out: Annotated[str, typer.Option(help="The .npz file to write.")],
    data: Annotated[str, typer.Option(help="mnist-cifar or garments-places.")] = "mnist-cifar",
    garments: Annotated[
        str | None, typer.Option(help="Fashion-MNIST's folder in Debian's package of it.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch what is missing.")] = False,
) -> None:
    """Write a data set's images to one file that later runs take as --source."""
    from ..data import prepare_garments_places, prepare_mnist_cifar

    for name, value in (("root", root), ("garments", garments)):
        if value is not None and not is_path(value):
            raise usage_error(name, "a folder", repr(value), "name it")
    check_new("out", out)
    if data == "garments-places":
        prepare_garments_places(root, out, garments=garments, download=download)
    elif data != "mnist-cifar":
        wanted = "one of mnist-cifar, garments-places"
        raise usage_error("data", wanted, repr(data), "pick one of these")
    elif garments is not None:
        raise usage_error("garments", "nothing for mnist-cifar", garments, "leave it out")
    else:
        prepare_mnist_cifar(root, out, download=download)
    typer.echo(out)


@data_app.command()
def compose(
    foregrounds: Annotated[
        str, typer.Option(help="Folder with a folder of cut-outs for each class.")
    ],
    backgrounds: Annotated[
        str, typer.Option(help="Folder with a folder of photographs for each place.")
    ],
    out: Annotated[str, typer.Option(help="New folder for the set.")],
    correlation: Annotated[
        float, typer.Option(help="How often a training image's place is that of its class.")
    ] = 0.95,
    train: Annotated[int, typer.Option(help="Training images.")] = 1000,
    val: Annotated[int, typer.Option(help="Validation images.")] = 200,
    test: Annotated[int, typer.Option(help="Test images.")] = 400,
    img_size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Decides every draw.")] = 0,
) -> None:
    """Lay cut-outs over photographs and write a set in the layout of Waterbirds."""
    from ..data import compose_folder

    for name, value in (("foregrounds", foregrounds), ("backgrounds", backgrounds)):
        if not is_path(value):
            raise usage_error(name, "a folder", repr(value), "name it")
    check_new("out", out)
    record = compose_folder(
        foregrounds,
        backgrounds,
        out,
        correlation=correlation,
        images={"train": train, "val": val, "test": test},
        img_size=img_size,
        seed=seed,
    )
    for split, said in record["splits"].items():
        for what in ("species", "photographs"):
            counts = (f"{kind} {of['count']}" for kind, of in said[what].items())
            typer.echo(f"{split}: {what}: {', '.join(counts)}")
        groups = (f"{group} {count}" for group, count in said["images"].items())
        typer.echo(f"{split}: images: {', '.join(groups)}")
    typer.echo(out)
