"""Measure ``select_heads`` against the loop it replaces: a whole forward in ``keep_heads`` per choice of heads.

``python -m benchmarks.scripts.selection`` times both on random weights, interleaved, checks that they find the same
scores, and stores ``benchmarks/results/selection.json``.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import diversevit_fast as dvf
from benchmarks.timing import conditions, interleaved, summary, write

Scores = dict[tuple[int, ...], float]


def cached(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Scores:
    """Return the accuracy of every choice of heads of the last layer, by ``select_heads``."""
    found = dvf.select_heads(model, batches, layers="last", search="exhaustive")
    return {tuple(heads): c.score for c in found for heads in c.kept.values()}


@torch.no_grad()
def one_by_one(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], choices: Sequence[tuple[int, ...]]
) -> Scores:
    """Return the same by a forward of the whole model for each choice."""
    scores = {}
    for heads in choices:
        with dvf.keep_heads(model, {-1: list(heads)}):
            right = [(model(images).argmax(-1) == labels).sum() for images, labels in batches]
        scores[heads] = float(sum(right)) / sum(len(labels) for _, labels in batches)
    return scores


def main(given: list[str] | None = None) -> int:
    import timm
    from timm.data import resolve_model_data_config

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="2 or more")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=10).eval()
    size = resolve_model_data_config(model)["input_size"]
    images, labels = torch.randn(options.batch, *size), torch.randint(10, (options.batch,))
    batches = [(images, labels)]
    scores = cached(model, batches)
    if scores != one_by_one(model, batches, list(scores)):
        raise RuntimeError("select_heads and keep_heads disagree about a score")
    jobs = {
        "keep_heads": lambda: one_by_one(model, batches, list(scores)),
        "select_heads": lambda: cached(model, batches),
    }
    rows = summary(interleaved(jobs, options.rounds), "keep_heads")
    for name, row in rows.items():
        print(f"{name:14}{row['median_ms']:>10.0f} ms   x {row['ratio']:.3f}")
    found = {"conditions": conditions(), **vars(options), "choices": len(scores), "rows": rows}
    print(write("selection", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
