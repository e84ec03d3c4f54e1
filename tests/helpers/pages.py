"""The pages of documentation, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        *(ROOT / name for name in ("examples/README.md", "kernels/README.md")),
    )
}
"""Text of every page, by its path in the repository."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page that are marked as ``language``."""
    return [code for marked, code in _FENCE.findall(PAGES[page]) if marked == language]


def spans(page: str) -> list[str]:
    """Return what stands in single backticks on a page, outside its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", PAGES[page]))


def shell(page: str) -> list[str]:
    """Return the command lines of a page: its bash blocks' lines and its spans, cut at ``&&``."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [part.strip() for line in (*lines, *spans(page)) for part in line.split("&&")]


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
