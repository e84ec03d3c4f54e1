"""The documentation is true: its code runs; its commands, options, links, paths and names exist."""

import pkgutil
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest

from diversevit_fast.experiment.cli import app
from tests.helpers.pages import PAGES, ROOT, anchors, blocks, shell, spans
from tests.test_tree import ALLOWED

PYTHON = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}


@pytest.mark.parametrize(("page", "i"), PYTHON, ids=[f"{page}-{i}" for page, i in PYTHON])
def test_code_blocks_run(page, i):
    prelude = "import warnings; warnings.simplefilter('ignore')\n"
    run = subprocess.run(
        [sys.executable, "-c", prelude + blocks(page, "python")[i]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_there_are_code_blocks():
    assert len(blocks("README.md", "python")) >= 2
    assert len(PYTHON) >= 5


@cache
def command(name: str):
    """The command of that name of ``diversevit``; None if there is none."""
    import typer

    found = typer.main.get_command(app)
    for word in name.split():
        found = getattr(found, "commands", {}).get(word)
    return found


def test_commands_exist():
    named = set()
    for page in PAGES:
        for line in shell(page):
            found = re.search(r"(?:^|--no-python )diversevit ((?:data )?[a-z-]+)(.*)", line)
            if found is None:
                continue
            named.add(found[1])
            assert command(found[1]) is not None, f"{page}: {line}"
            options = {o for p in command(found[1]).params for o in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"--[a-z-]+", found[2])) <= options, f"{page}: {line}"
    assert {"run", "doctor", "data prepare"} <= named


def test_options_by_themselves_exist():
    """An option that a page names without its command belongs to a command, of ours or of one named there."""
    names = [c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands]
    params = [p for name in names for p in command(name).params]
    params += command("").params  # of diversevit itself
    ours = {o for p in params for o in (*p.opts, *p.secondary_opts)}
    others = {"--readme", "--max-restarts"}  # of torchrun
    for page in ("README.md", *(name for name in PAGES if name.startswith("docs/"))):
        alone = [o for span in spans(page) if span.startswith("--") for o in span.split()]
        assert {o for o in alone if o.startswith("--")} <= ours | others, page


def test_modules_and_scripts_of_commands_exist():
    seen = set()
    for page in PAGES:
        for line in shell(page):
            line = re.sub(r"^(\w+=\S+ )*", "", line)  # variables of the environment
            words = shlex.split(line) if re.match(r"(python|pytest) ", line) else []
            if words[:2] == ["python", "-m"]:
                seen.add(words[2])
                assert find_spec(words[2]) is not None, f"{page}: {line}"
            for word in words[1:]:
                if word.endswith((".py", "/")) or word.startswith("tests/"):
                    assert (ROOT / word).exists(), f"{page}: {line}"
    assert {"benchmarks.report", "tools.docs.support"} <= seen


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(found.resolve().relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Whatever in backticks looks like a file or folder of the repository is one; X stands for an operator."""
    for span in spans(page):
        span = re.sub(r"(?<![A-Za-z])X(?![A-Za-z])", "gelu", span)
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", span) or span in ABSENT:
            continue
        first = span.split("/")[0]
        if "/" in span and first in FOLDERS:
            assert (ROOT / span).exists(), f"{page}: {span}"
        elif re.fullmatch(r"[\w\-]+\.(py|cpp|toml|cff)", span):
            assert next(ROOT.rglob(span), None) is not None, f"{page}: {span}"
        elif span.endswith("/"):  # a folder that a table names without the one around it
            assert next(ROOT.glob(f"**/{span}"), None) is not None, f"{page}: {span}"


ABSENT = {"benchmarks/results/gpu.json", "kernels/__init__.py"}
"""What a reader's own command writes, and what must not be there."""


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_library_exist(page):
    code = "\n".join((*spans(page), *blocks(page, "python")))
    for name in re.findall(r"\b(?:dvf|diversevit_fast|diversevit_kernels)(?:\.\w+)+", code):
        assert pkgutil.resolve_name(name.replace("dvf.", "diversevit_fast.")), f"{page}: {name}"


def test_the_import_rules_of_contributing_are_those_of_the_tree():
    """Each row of a folder of the library names what its imports are allowed to be."""
    rows = re.findall(
        r"^\| `diversevit_fast/([\w]+)(?:/|\.py)` \|.*\|([^|]*)\|$", PAGES["CONTRIBUTING.md"], re.M
    )
    told = {name: set(re.findall(r"`(\w+)`", rules)) for name, rules in rows}
    assert told == {name: rules for name, rules in ALLOWED.items() if name != "version"}


def test_variables_of_the_environment_exist():
    sources = "\n".join(
        path.read_text("utf-8")
        for folder in ("diversevit_fast", "kernels", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    for page in PAGES:
        for name in set(re.findall(r"DIVERSEVIT_[A-Z_]+", PAGES[page])):
            assert f'"{name}"' in sources, f"{page}: {name}"


@pytest.mark.parametrize("index", ["docs/README.md", "docs/design/README.md"])
def test_every_page_is_in_its_index(index):
    folder = (ROOT / index).parent
    pages = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([^)/]+\.md)\)", PAGES[index]))


def test_private_words_stay_out():
    """Pages speak the field's language: forward, operator, reference, hint."""
    for page in set(PAGES) - {"kernels/README.md"}:
        found = re.search(r"\b(rungs?|ladders?|seams?|misfit)\b", PAGES[page], re.I)
        assert found is None, f"{page}: {found}"


def test_lines_are_short():
    """Prose to 120 columns; tables, pictures and commands as long as they need to be."""
    for page in set(PAGES) - {"kernels/README.md", "examples/README.md"}:
        text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
        long = [x for x in text.splitlines() if len(x) > 120 and not x.startswith(("|", "!["))]
        assert not long, f"{page}: {long}"


def test_the_front_page_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160


def test_a_path_that_does_not_exist_is_seen(monkeypatch):
    monkeypatch.setitem(PAGES, "made up", "See `diversevit_fast/nowhere.py` and [x](nowhere.md).")
    with pytest.raises(AssertionError, match=r"nowhere\.py"):
        test_paths_exist("made up")
    with pytest.raises(AssertionError, match=r"nowhere\.md"):
        test_links_lead_somewhere("made up")
