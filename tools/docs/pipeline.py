"""Draw ``docs/pipeline.svg``, what happens in a training step: ``python -m tools.docs.pipeline``."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tools.docs.svg import FILL, LINE, picture, text

PICTURE = Path(__file__).parents[2] / "docs/pipeline.svg"


class Box(NamedTuple):
    """One step: its name, two lines that say what happens, and the file that does it."""

    name: str
    lines: tuple[str, str]
    file: str


LANES = {
    "with diversity:  logits = model(images)": (
        Box(
            "attach",
            ("each chosen attention module", "gets a wrapping class"),
            "attachment/attachment.py",
        ),
        Box(
            "capture",
            ("the layer's qkv is kept in the", "context, with its graph"),
            "penalty/head_diversity.py",
        ),
        Box(
            "operators",
            ("attention, LayerNorm, GELU from", "here up: twice differentiable"),
            "ops/attention.py",
        ),
        Box(
            "leave",
            ("the classes are restored,", "the graph stays"),
            "attachment/attachment.py",
        ),
    ),
    "penalty = diversity.penalty(logits)": (
        Box("prediction", ("p* = the largest logit", "of each sample"), "penalty/score.py"),
        Box(
            "head gradients",
            ("one backward pass, all heads:", "r_h = ∂p*/∂qkv_h"),
            "penalty/head_gradients.py",
        ),
        Box(
            "Gram matrices",
            ("u_h = r_h W_h; per token,", "C = cosines of u_h and u_h'"),
            "ops/routed_head_penalty.py",
        ),
        Box(
            "penalty",
            ("R = mean of C², counting", "pairs of different heads"),
            "ops/routed_head_penalty.py",
        ),
    ),
    "loss = cross_entropy + 100 * penalty;  loss.backward()": (
        Box(
            "backward of R",
            ("through Gram matrices,", "to the head gradients"),
            "ops/routed_head_penalty.py",
        ),
        Box(
            "double backward",
            ("of attention, LayerNorm, GELU", "from the layer up, O(N) memory"),
            "ops/autograd.py",
        ),
        Box("backward", ("of the whole model,", "as without the penalty"), "ops/autograd.py"),
        Box("gradients", ("of every parameter,", "for any optimizer"), "your training loop"),
    ),
}
WIDTH, HEIGHT, GAP, MARGIN, HEADING = 232, 104, 30, 14, 34


def draw() -> str:
    """The SVG: a lane for each line of the user's code, its steps as boxes from left to right."""
    columns = max(map(len, LANES.values()))
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP
    lane_height = HEADING + HEIGHT + GAP // 2
    height = 2 * MARGIN + len(LANES) * lane_height - GAP // 2
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
    )
    parts: list[str] = []
    for i, (code, boxes) in enumerate(LANES.items()):
        parts += _lane(code, boxes, MARGIN + i * lane_height)
    return picture(width, height, parts, tip)


def _lane(code: str, boxes: tuple[Box, ...], top: int) -> list[str]:
    """The code as a heading, the boxes below it, and the arrows between them."""
    parts = [text(MARGIN, top + 20, 15, code, "monospace", anchor="start")]
    corners = [MARGIN + i * (WIDTH + GAP) for i in range(len(boxes))]
    for x, box in zip(corners, boxes, strict=True):
        parts += _box(box, x, top + HEADING)
    middle = top + HEADING + HEIGHT // 2
    parts += [
        f'<path d="M{x + WIDTH} {middle}H{following - 2}" stroke="{LINE}" stroke-width="2" '
        'marker-end="url(#tip)"/>'
        for x, following in pairwise(corners)
    ]
    return parts


def _box(box: Box, x: int, y: int) -> list[str]:
    middle = x + WIDTH // 2
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{FILL}" stroke="{LINE}"/>'
    return [
        frame,
        text(middle, y + 27, 17, box.name, weight="bold"),
        text(middle, y + 49, 13, box.lines[0]),
        text(middle, y + 68, 13, box.lines[1]),
        text(middle, y + 91, 12, box.file, "monospace", color=LINE),
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
