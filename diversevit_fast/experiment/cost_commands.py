"""The command ``diversevit cost``: what a training step of a model costs, without training it."""

import csv
import io
import math
import time
from collections.abc import Sequence
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
    device: Annotated[
        str, _option("cpu, cuda, A100, H100, H200, B200 or MI300X.", _MACHINE)
    ] = "cpu",
    parallel: Annotated[str | None, _option("ddp:N, fsdp2:N or hsdp:RxS.", _MACHINE)] = None,
    graph: Annotated[bool, _option("Steps are replayed as CUDA graphs.", _MACHINE)] = False,
    gpus: Annotated[
        str | None,
        _option("What it would cost on so many GPUs: 1,8,64, by DDP and FSDP2.", _MACHINE),
    ] = None,
    memory: Annotated[
        float | None, _option("GB; says the largest batch that fits.", _MACHINE)
    ] = None,
    calibrate: Annotated[
        bool, _option("Measure this CPU, or with --device cuda this GPU, and keep it.", _MACHINE)
    ] = False,
    as_json: o.Json = False,
    figure: Annotated[
        str | None,
        _option("Also draw the cost over ERM's against sizes: FILE.png, .svg.", _OUTPUT),
    ] = None,
    out: Annotated[str | None, _option("Also write the rows into a CSV file.", _OUTPUT)] = None,
) -> None:
    """What a training step costs, from shapes alone: FLOPs, launches, bytes, memory, time."""
    from ..cost.predict import cost as predict
    from .cost_figure import form_of

    numbers = _gpus_of(gpus, device, parallel, memory)
    if figure is not None:
        form_of(figure)
    if memory is not None and not 0 < memory < math.inf:
        raise usage_error("memory", "GB, more than 0", memory, "say --memory 80")
    steps = {s.strip(): _penalty_of(s.strip(), every, fraction) for s in layers.split(",")}
    if calibrate:
        from ..cost.calibration import calibrate as measure
        from ..cost.calibration import save
        from ..cost.clocks import ROUNDS

        begun = time.perf_counter()
        where = save(measure(device))
        seconds = time.perf_counter() - begun
        said = f"measured in {seconds:.0f} s, each job in at most {ROUNDS} rounds: {where}"
        typer.echo(said, err=as_json)
    options: dict[str, Any] = {
        **{"batch": batch, "dtype": dtype, "optimizer": optimizer, "device": device},
        **{"checkpointing": checkpointing, "parallel": parallel, "graph": graph},
    }
    rows = []
    for step, penalty in steps.items():
        found = predict(model, penalty, **options)
        if numbers:
            rows += rows_on_gpus(step, found, numbers)
            continue
        row = row_of(step, found)
        if memory is not None:
            row["largest batch"] = found.largest_batch(int(memory * 1e9))
        rows.append(row)
    if out is not None:
        _write_csv(out, rows)
    title = f"{model}, batch {batch}, {dtype}, {device}"
    if figure is not None:
        _draw(model, steps, title, figure, options)
    if numbers and not as_json:
        return _show_gpus(rows, f"{title}, batch on each GPU")
    _show(rows, title, as_json)


def _gpus_of(
    gpus: str | None, device: str, parallel: str | None, memory: float | None
) -> list[int]:
    """The numbers of GPUs that are asked for, in rising order; none if none are."""
    if gpus is None:
        return []
    from ..cost.parallel import MOST_RANKS

    for name, value in (("parallel", parallel), ("memory", memory)):
        if value is not None:
            raise usage_error(name, "none beside --gpus", value, "leave one of them out")
    if device == "cpu":
        raise usage_error("gpus", "a GPU, named by --device", "cpu", "say --device H200")
    parts = [part.strip() for part in gpus.split(",")]
    if not all(p.isdecimal() and len(p) < 9 and 1 <= int(p) <= MOST_RANKS for p in parts):
        wanted = f"numbers from 1 to {MOST_RANKS}, with commas between"
        raise usage_error("gpus", wanted, repr(gpus), "say --gpus 1,8,64")
    return sorted(set(map(int, parts)))


def rows_on_gpus(step: str, found: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What a step takes on so many GPUs: alone, by DDP and by FSDP2. Nothing is counted again.

    Args:
        found: a ``Cost`` with a device, each GPU with its batch.
    """
    rows = []
    for count in numbers:
        for kind in ("alone",) if count == 1 else ("ddp", "fsdp2"):
            one = found if count == 1 else found.with_parallel(f"{kind}:{count}")
            times, memory = one.seconds, one.device.memory
            row = {"step": step, "GPUs": count, "by": kind, "step seconds": times.step}
            row |= {"samples per second": one.samples_per_second, "waits for": times.limit}
            row["communication seconds"] = times.communication
            row |= {"bytes sent": sum(one.sent_bytes.values()), "peak bytes": one.peak_bytes}
            row["fits"] = None if memory is None else one.peak_bytes <= memory
            rows.append(row)
    return rows


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


def _draw(
    model: str, steps: dict[str, Any], title: str, figure: str, options: dict[str, Any]
) -> None:
    from ..cost.sizes import ERM, cost_by_size
    from .cost_figure import draw_sizes

    with_penalty = {name: step for name, step in steps.items() if step is not None}
    if not with_penalty:
        raise usage_error("layers", "a step with the penalty in a figure", "erm", "say erm,last")
    draw_sizes(cost_by_size(model, {ERM: None, **with_penalty}, **options), title, figure)


def _show_gpus(rows: list[dict[str, Any]], title: str) -> None:
    from .tables import new_table, print_table

    shown = {"step": "step", "GPUs": "GPUs", "by": "by", "step seconds": "time"}
    shown |= {"samples per second": "samples/s", "waits for": "waits for"}
    shown |= {"communication seconds": "sending", "peak bytes": "peak", "fits": "fits"}
    table = new_table(*shown.values())
    for row in rows:
        said = {name: _said(name, row[name]) for name in shown}
        said["waits for"] = said["waits for"].replace("communication", "sending")
        table.add_row(*said.values())
    print_table(
        title,
        table,
        "sending is hidden behind the kernels at best; more columns: --json, --out FILE.csv",
    )


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
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if "bytes" in name or name.startswith("peak"):
        return f"{value / GIB:.3g} GiB"
    if "seconds" in name:
        return f"{1e3 * value:.3g} ms"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"
    return f"{value:,}"
