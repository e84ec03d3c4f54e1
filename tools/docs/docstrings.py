"""A Markdown extension for docstrings: examples after ``>>>``, and tables between lines of ``=``."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_RULE = re.compile(r"^(=+)( +=+)+ *$")


class Docstrings(Extension):
    """Examples become blocks of code, and tables those of Markdown; fenced blocks stay as they are."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (Markdown's name)
        """Run before every other preprocessor."""
        md.preprocessors.register(_Rewrite(md), "docstrings", 100)


class _Rewrite(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return list(rewritten(lines))


def rewritten(lines: list[str]) -> Iterator[str]:
    """Yield the lines of a text, with its examples and tables in Markdown."""
    rest, fenced = iter(lines), False
    for line in rest:
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.lstrip().startswith(">>> "):
            yield from _example([line, *_until(rest, lambda one: not one.strip())])
        elif not fenced and _RULE.match(line):
            body = list(_until(rest, _RULE.match))
            head = body if len(body) == 1 else []  # a single line above a rule names the columns
            yield from _table(line, head, list(_until(rest, _RULE.match)) if head else body)
        else:
            yield line


def _until(lines: Iterator[str], ends: Callable[[str], object]) -> Iterator[str]:
    """Yield lines up to one that ends them, which is taken too."""
    for line in lines:
        if ends(line):
            return
        yield line


def _example(lines: list[str]) -> Iterator[str]:
    indent = len(lines[0]) - len(lines[0].lstrip())
    yield from ("", "```python")
    for line in lines:
        shown = line[indent:]
        prompt = shown.startswith((">>> ", "... ")) or shown in (">>>", "...")
        yield shown[4:] if prompt else f"# {shown}"
    yield from ("```", "")


def _table(rule: str, head: list[str], body: list[str]) -> Iterator[str]:
    starts = [found.start() for found in re.finditer("=+", rule)]
    columns = [*pairwise(starts), (starts[-1], None)]

    def cells(line: str) -> list[str]:
        return [line[start:end].strip().replace("|", "\\|") for start, end in columns]

    rows: list[list[str]] = []
    for line in body:
        found = cells(line)
        if found[0] or not rows:
            rows.append(found)
        else:  # goes on from the line above
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], found, strict=True)]
    titles = cells(head[0]) if head else [""] * len(columns)
    for row in (titles, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""
