"""The parts of an SVG that the programs which draw pictures for the documentation share."""

from xml.sax.saxutils import escape

INK, LINE, FILL = "#14283c", "#47617a", "#eef3f8"


def picture(width: int, height: int, parts: list[str], definitions: str = "") -> str:
    """Return the SVG: ``parts`` on white, so that it can be read on a dark page too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">'
    )
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([*filter(None, (head, definitions, ground)), *parts, "</svg>", ""])


def text(
    x: float,
    y: float,
    size: int,
    words: str,
    family: str = "inherit",
    weight: str = "normal",
    anchor: str = "middle",
    color: str = INK,
) -> str:
    """Return a line of text at ``(x, y)``, the middle of its baseline unless ``anchor`` says otherwise."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'font-family="{family}" fill="{color}">{escape(words)}</text>'
    )
