"""The documentation as a site: it builds without a warning and shows everything without a network."""

import inspect
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")

import diversevit_fast as dvf
from tests.helpers.pages import PAGES, ROOT
from tools.docs import site_hooks
from tools.docs.docstrings import rewritten


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a strict build, in which every warning is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_on_it(site):
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    for page in (*PAGES, *site_hooks.PLACES):
        place = site_hooks.PLACES.get(page, page.removeprefix("docs/"))
        place = re.sub(r"README\.md$", "index.md", place)
        assert place.removesuffix("md") + "html" in built, page


def test_nothing_is_fetched(site):
    """Pictures, programs, styles and fonts come from the site itself."""
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)"', text)
        fetched += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]*)"', text
        )
        assert not fetched, path
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?https?:", path.read_text("utf-8")), path


def test_formulas_are_drawn_by_the_browser(site):
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in (
        site / "index.html"
    ).read_text("utf-8")


def test_names_have_their_signatures(site):
    """Nothing that is public is missing, and no function is taken for the module of its name."""
    page = (site / "api.html").read_text("utf-8")
    shown = re.findall(
        r'id="([\w.]+)" class="doc doc-heading">\s*<span class="[^"]*doc-(\w+)-name', page
    )
    kinds = {name.rpartition(".")[2]: kind for name, kind in shown}
    for name in dvf.__all__:
        value = getattr(dvf, name)
        wanted = (
            "module"
            if inspect.ismodule(value)
            else "class"
            if inspect.isclass(value)
            else "function"
        )
        if name != "__version__":
            assert kinds.get(name) == wanted, name
    assert set(dvf.data.__all__) - {"CORRUPTIONS", "SPLITS"} <= set(kinds)
    assert "Nq" in page
    assert "&gt;&gt;&gt;" not in page


def test_the_options_are_those_of_the_program():
    pytest.importorskip("typer")
    page = site_hooks.command_line()
    assert "## diversevit data prepare\n" in page
    assert "\n| `--penalty-weight <float>` | Weight of the diversity penalty. |\n" in page
    assert page.count("\n## diversevit ") >= 12


@pytest.mark.parametrize(
    ("source", "here", "link", "moved"),
    [
        ("docs/heads.md", "heads.md", "[x](models.md#adapters)", "[x](models.md#adapters)"),
        ("docs/heads.md", "heads.md", "[models.md](models.md)", "[Supported models](models.md)"),
        ("README.md", "index.md", "![a](docs/pipeline.svg)", "![a](pipeline.svg)"),
        ("docs/design/a.md", "design/a.md", "[x](../../kernels/README.md#b)", "[x](../derivations.md#b)"),
        ("docs/heads.md", "heads.md", "[`tiny.py`](../examples/tiny.py)", "`examples/tiny.py`"),
        ("README.md", "index.md", "[c](CITATION.cff)", "c (`CITATION.cff`)"),
    ],
)  # fmt: skip
def test_links_are_moved(source, here, link, moved):
    class Files:
        src_uris = dict.fromkeys(
            ("models.md", "pipeline.svg", "derivations.md", "heads.md", "index.md")
        )

    found = site_hooks._LINK.sub(
        lambda one: site_hooks._moved(one, source, here, Files),  # pyright: ignore
        link,
    )
    assert found == moved


def test_docstrings_become_markdown():
    text = """Say.

>>> for x in y:
...     print(x)
1

```
>>> left
```
=====  ====
A      B
=====  ====
``x``  one
       more
=====  ====
=====  ====
``y``  two
``z``  three
=====  ===="""
    assert list(rewritten(text.splitlines())) == [
        *("Say.", "", "", "```python", "for x in y:", "    print(x)", "# 1", "```", ""),
        *("```", ">>> left", "```"),
        *("| A | B |", "| --- | --- |", "| ``x`` | one more |", ""),
        *("|  |  |", "| --- | --- |", "| ``y`` | two |", "| ``z`` | three |", ""),
    ]
