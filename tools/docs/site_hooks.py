"""Hooks of mkdocs: the repository's pages as one site, with nothing fetched from a network.

The pages stay where GitHub shows them. Those outside of docs/ get a place on the site here (``PLACES``), links between
all of them are made to fit, and a link to a file that is no page becomes the name of that file. Formulas become MathML,
which browsers draw themselves. The page of the command line's options is made of the program.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # mkdocs does not look for modules in the folder it is run in
from tools.docs.docstrings import Docstrings  # noqa: E402

PLACES = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "derivations.md",
    "examples/README.md": "examples.md",
    "examples/second_order/README.md": "examples_second_order.md",
    "benchmarks/fake_gpu/README.md": "fake_gpu.md",
}
"""Pages of the repository, and where they are on the site; the others of docs/ keep their path in it."""
OPTIONS = "command_line_options.md"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation; give headings the anchors that GitHub gives them, and formulas their renderer."""
    config.markdown_extensions.append(Docstrings())  # pyright: ignore[reportArgumentType]
    nav = [_listed(entry) for entry in config.nav or []]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    if forgotten := sorted(page for page in pages if f"'{page}'" not in str(nav)):
        nav.append({"More": forgotten})
    config.nav = nav
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    math = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [math]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the one of the command line's options."""
    for page, place in PLACES.items():
        if page.startswith("docs/"):
            files.remove(files.src_uris[page.removeprefix("docs/")])
        text = (ROOT / page).read_text("utf-8")
        files.append(File.generated(config, place, content=text))
    files.append(File.generated(config, OPTIONS, content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a page fit the site."""
    came = {place: source for source, place in PLACES.items()}
    here = page.file.src_uri
    source = came.get(here, f"docs/{here}")
    parts = _FENCE.split(markdown)
    parts[::2] = [
        _LINK.sub(lambda link: _moved(link, source, here, files), part) for part in parts[::2]
    ]
    return "".join(parts)


def _moved(link: re.Match[str], source: str, here: str, files: Files) -> str:
    picture, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if target.startswith(("http://", "https://")) or not path:
        return link[0]
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (ROOT / wanted).is_dir():
        wanted = f"{wanted}/README.md"
    place = PLACES.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else "")
    if place not in files.src_uris:
        named = re.fullmatch(r"`.*`", text) or picture or text == posixpath.basename(wanted)
        return f"`{wanted}`" if named else f"{text} (`{wanted}`)"
    if text == posixpath.basename(wanted) and (
        title := _TITLE.search((ROOT / wanted).read_text("utf-8"))
    ):
        text = title[1]
    moved = posixpath.relpath(place, posixpath.dirname(here) or ".")
    return f"{picture}[{text}]({moved}{'#' + anchor if anchor else ''})"


def _listed(entry: Any) -> Any:
    """An entry of the navigation, where a folder (``design/``) stands for its pages, README.md first."""
    if isinstance(entry, dict):
        return {title: _listed(inside) for title, inside in entry.items()}
    if isinstance(entry, list):
        return [_listed(inside) for inside in entry]
    if not entry.endswith("/"):
        return entry
    found = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs" / entry).rglob("*.md")]
    found.sort(key=lambda path: (len(path.parts), path.name != "README.md", path.name))
    return [path.as_posix() for path in found]


def slug(heading: str, separator: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", separator)


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return a displayed formula as MathML, from what LaTeX would be given."""
    return f'<div class="math">{convert(" ".join(source.split()), display="block")}</div>'


def command_line() -> str:
    """Return the page of every command of ``diversevit``: its help, arguments and options."""
    os.environ.setdefault("NO_COLOR", "1")
    from diversevit_fast.experiment.cli import app

    lines = [
        "# Options of the command line",
        "",
        "What `-h` says of each command. [How they are used](command_line.md).",
        "",
    ]
    for name, command in _commands(app):
        lines += [f"## diversevit {name}", "", command.help or "", ""]
        lines += [f"`diversevit {' '.join([name, *_usage(command)])}`", ""]
        context = command.make_context(name, [], resilient_parsing=True)
        records = [p.get_help_record(context) for p in command.params]
        lines += ["| | |", "|---|---|"]
        lines += [_row(*record) for record in records if record is not None]
        lines.append("")
    return "\n".join(lines)


def _commands(app: Any) -> Iterator[tuple[str, Any]]:
    from typer.main import get_command

    from diversevit_fast.experiment.help_panels import PANELS

    groups = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for names in PANELS.values():
        for name in names:
            command = groups.get(name)
            for inner, one in getattr(command, "commands", {"": command}).items():
                if one is not None:
                    yield f"{name} {inner}".strip(), one


def _usage(command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return ["[OPTIONS]", *(p.metavar or p.name.upper() for p in arguments)]


def _row(names: str, said: str) -> str:
    cells = f"`{' '.join(names.split())}`", escape(" ".join(said.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
