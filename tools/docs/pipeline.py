"""Draws ``docs/pipeline.svg``, the picture in the README: ``python tools/docs/pipeline.py``."""

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

STAGES = [
    ("attention", "o_h = P_h v_h", "ops/attention.py"),
    ("capture", "qkv, o_h of a layer", "capture.py"),
    ("head gradients", "one backward: r_h = ∂p*/∂qkv_h", "head_gradients.py"),
    ("Gram", "u_h = r_h W_h, cosines", "ops/routed_head_penalty.py"),
    ("penalty", "mean of squared cosines", "diversity.py"),
    ("second order", "d0 → d1 → d2, O(N) memory", "ops/ladder.py"),
]
WIDTH, HEIGHT, GAP, MARGIN = 236, 92, 36, 12
COLUMNS = 3


def draw() -> str:
    """The SVG: boxes in two rows, arrows in reading order."""
    rows = -(-len(STAGES) // COLUMNS)
    total = (
        2 * MARGIN + COLUMNS * WIDTH + (COLUMNS - 1) * GAP,
        2 * MARGIN + rows * HEIGHT + (rows - 1) * GAP,
    )
    corners = [
        (MARGIN + (i % COLUMNS) * (WIDTH + GAP), MARGIN + (i // COLUMNS) * (HEIGHT + GAP))
        for i in range(len(STAGES))
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" '
        f'width="{total[0]}" height="{total[1]}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#47617a"/></marker></defs>',
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
    ]
    for (x, y), (name, formula, file) in zip(corners, STAGES, strict=True):
        middle = x + WIDTH / 2
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#eef3f8" '
            'stroke="#47617a"/>',
            f'<text x="{middle}" y="{y + 30}" text-anchor="middle" font-size="18" '
            f'font-weight="bold" fill="#14283c">{escape(name)}</text>',
            f'<text x="{middle}" y="{y + 54}" text-anchor="middle" font-size="14" '
            f'fill="#14283c">{escape(formula)}</text>',
            f'<text x="{middle}" y="{y + 77}" text-anchor="middle" font-size="12" '
            f'font-family="monospace" fill="#47617a">{escape(file)}</text>',
        ]
    for i, ((x, y), (x2, y2)) in enumerate(pairwise(corners)):
        if (i + 1) % COLUMNS:
            path = f"M{x + WIDTH} {y + HEIGHT / 2}H{x2 - 2}"
        else:
            half = y + HEIGHT + GAP / 2
            path = f"M{x + WIDTH / 2} {y + HEIGHT}V{half}H{x2 + WIDTH / 2}V{y2 - 2}"
        parts.append(
            f'<path d="{path}" fill="none" stroke="#47617a" stroke-width="2" marker-end="url(#tip)"/>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs/pipeline.svg").write_text(draw(), encoding="utf-8")
