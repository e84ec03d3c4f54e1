"""The command ``diversevit cost``: what a training step of a model costs, without training it."""

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import usage_error
from ..files import write_atomically
from . import options as o

_STEP, _MACHINE, _OUTPUT = "Step", "Machine", "Output"
GIB = 2**30


def _option(said: str, panel: str, **more: Any) -> Any:
    return typer.Option(help=said, rich_help_panel=panel, **more)


def cost(
    model: Annotated[str, typer.Argument(help="A name of timm's.")] = "vit_base_patch16_224",
    batch: Annotated[int, _option("Samples of a step, on each process.", _STEP)] = 64,
    layers: Annotated[
        str, _option("Steps to compare: erm, last, all, or numbers joined by /.", _STEP)
    ] = "erm,last,all",
    every: Annotated[int, _option("The penalty every N-th step only.", _STEP)] = 1,
    fraction: Annotated[float, _option("The penalty of a part of each batch.", _STEP)] = 1.0,
    dtype: Annotated[
        str, _option("float32, or autocast's bfloat16 or float16.", _STEP)
    ] = "float32",
    optimizer: Annotated[str, _option("adamw, adam or sgd.", _STEP)] = "adamw",
    checkpointing: Annotated[bool, _option("Recompute activations.", _STEP)] = False,
    device: Annotated[str, _option("cpu, A100, H100, H200, B200 or MI300X.", _MACHINE)] = "cpu",
    parallel: Annotated[str | None, _option("ddp:N, fsdp2:N or hsdp:RxS.", _MACHINE)] = None,
    graph: Annotated[bool, _option("Steps are replayed as CUDA graphs.", _MACHINE)] = False,
    memory: Annotated[
        float | None, _option("GB; says the largest batch that fits.", _MACHINE)
    ] = None,
    calibrate: Annotated[
        bool, _option("Measure this machine, under a minute, and keep it.", _MACHINE)
    ] = False,
    as_json: o.Json = False,
    out: Annotated[str | None, _option("Also write the rows into a CSV file.", _OUTPUT)] = None,
) -> None:
    """What a training step costs, from shapes alone: FLOPs, launches, bytes, memory, time."""
    from ..cost import cost as predict

    if calibrate:
        from ..cost.calibration import calibrate as measure
        from ..cost.calibration import save

        where = save(measure())
        typer.echo(f"measured: {where}", err=as_json)
    if memory is not None and not memory > 0:
        raise usage_error("memory", "GB, more than 0", memory, "say --memory 80")
    rows = []
    for step in layers.split(","):
        found = predict(
            model,
            _penalty_of(step.strip(), every, fraction),
            batch=batch,
            dtype=dtype,
            optimizer=optimizer,
            checkpointing=checkpointing,
            parallel=parallel,
            device=device,
            graph=graph,
        )
        row = row_of(step.strip(), found)
        if memory is not None:
            row["largest batch"] = found.largest_batch(int(memory * 1e9))
        rows.append(row)
    if out is not None:
        _write_csv(out, rows)
    _show(rows, f"{model}, batch {batch}, {dtype}, {device}", as_json)


def row_of(step: str, found: Any) -> dict[str, Any]:
    """The numbers of one step, by name: FLOPs, calls, bytes, seconds."""
    row: dict[str, Any] = {"step": step, "parameters": found.parameters}
    row |= {f"{kind} FLOPs": n for kind, n in found.flops.items()}
    row |= {"launches": sum(found.launches.values()), "bytes moved": found.bytes_moved}
    row |= {"peak bytes": found.peak_bytes}
    row |= {f"peak: {part}": n for part, n in found.peak.parts.items()}
    row["collectives"] = sum(found.collectives.values())
    row["bytes sent"] = sum(found.sent_bytes.values())
    times = found.seconds
    for name in ("device", "host", "communication", "step"):
        row[f"{name} seconds"] = None if times is None else getattr(times, name)
    row["samples per second"] = found.samples_per_second
    return row


def _penalty_of(step: str, every: int, fraction: float) -> dict[str, Any] | None:
    if step in ("erm", "none"):
        return None
    chosen: Any = step
    if step not in ("last", "all"):
        try:
            chosen = [int(part) for part in step.split("/")]
        except ValueError:
            wanted = "erm, last, all or numbers such as 0/-1, with commas between"
            raise usage_error("layers", wanted, repr(step), "mend it") from None
    return {"layers": chosen, "every": every, "fraction": fraction}


def _write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), lambda file: file.write(text.getvalue().encode()))


def _show(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    from .tables import new_table, print_json, print_table

    if as_json:
        return print_json({"title": title, "steps": rows})
    table = new_table("", *(row["step"] for row in rows))
    for name in rows[0]:
        if name == "step" or all(not row[name] for row in rows):
            continue
        table.add_row(name, *(_said(name, row[name]) for row in rows))
    timed = rows[0]["step seconds"] is not None
    note = "" if timed else "times of a CPU need: diversevit cost --calibrate"
    print_table(title, table, note)


def _said(name: str, value: Any) -> str:
    if value is None:
        return ""
    if "bytes" in name or name.startswith("peak"):
        return f"{value / GIB:.3g} GiB"
    if "seconds" in name:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
