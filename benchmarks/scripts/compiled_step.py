"""Host time of a step of the paper's size: launched, with a compiled loss, and as CUDA graphs.

    python -m benchmarks.fake_gpu -m benchmarks.scripts.compiled_step [NAME ...]

Each step is timed by itself, in the process's own time, which other processes disturb less. The first lasts longest:
compilers run, and graphs are captured.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.models import DiverseViT

BATCH, STEPS = 64, 200


def steps(name: str) -> Callable[[], object]:
    """A function that takes a step of the kind ``name``."""
    images = torch.rand(BATCH, 3, 64, 32, device="cuda")
    labels = torch.arange(BATCH, device="cuda") % 2
    model = DiverseViT().cuda()
    diversity = dvf.HeadDiversity(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def penalised(images, labels):
        with diversity:
            logits = model(images)
        return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)

    losses = {
        "erm": lambda x, y: F.cross_entropy(model(x), y),
        "compiled": dvf.compile_loss(penalised),
        "reduce-overhead": dvf.compile_loss(penalised, mode="reduce-overhead"),
    }
    losses["compiled, graph_step"] = losses["compiled"]
    loss = losses.get(name, penalised)
    if name.endswith("graph_step"):
        known = diversity if loss is penalised else None  # a compiled loss counts no steps
        step = dvf.graph_step(loss, optimizer, diversity=known)
        return lambda: step(images, labels)

    def launched():
        optimizer.zero_grad(set_to_none=True)
        loss(images, labels).backward()
        optimizer.step()

    return launched


NAMES = ("erm", "launched", "compiled", "reduce-overhead", "graph_step", "compiled, graph_step")


def main(names: list[str]) -> None:
    torch.backends.cudnn.enabled = False  # the GPU that computes nothing has none
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name in names or NAMES:
        step, times = steps(name), []
        begun = time.perf_counter()
        for _ in range(4):
            step()
        first = time.perf_counter() - begun
        for _ in range(STEPS):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        print(f"{name:24} {1e6 * min(times):7.0f} us   first four steps {first:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
