"""What is shipped: the source distribution and the wheel made of it, and that the wheel works by itself."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "diversevit_fast": "diversevit_fast",
    "kernels/diversevit_kernels": "diversevit_kernels",
}
"""Folders of the repository, and the import packages that they are."""
BESIDES = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
BESIDES |= {"setup.py", "PKG-INFO", "setup.cfg"}


def files_of(folder: Path) -> set[str]:
    """Every file below a folder, but for what Python compiled."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def shipped() -> dict[str, set[str]]:
    """The files of each package's folder in the repository, by that folder."""
    return {folder: files_of(ROOT / folder) for folder in PACKAGES}


def build(what: str, tree: Path, out: Path) -> Path:
    """Build the ``sdist`` or the ``wheel`` of a tree, in this environment, and return its file."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    made = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (found,) = out.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built in a copy, with tests and tools beside the packages: building leaves files in its tree."""
    tree = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for folder in (*PACKAGES, "tests", "tools", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    shutil.copy(ROOT / "kernels/README.md", tree / "kernels")
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built of the source distribution alone, as an installer does it."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_source_distribution_holds_what_is_built_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {
            name.partition("/")[2]
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    names = {name for name in names if ".egg-info/" not in name}
    wanted = {f"{folder}/{name}" for folder, names in shipped().items() for name in names}
    assert names == wanted | BESIDES


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (n for n in archive.namelist() if n.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    wanted = {f"{PACKAGES[folder]}/{name}" for folder, names in shipped().items() for name in names}
    assert names == wanted
    assert {f"{package}/py.typed" for package in PACKAGES.values()} <= names
    for kind in (".cpp", ".h", ".html.jinja", ".css.jinja"):
        assert any(name.endswith(kind) for name in names)


def test_the_metadata_say_what_a_reader_of_an_index_looks_for(metadata):
    from diversevit_fast import __version__

    assert metadata["Name"] == "diversevit-fast"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"] == "diversevit_fast developers"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload() == (ROOT / "README.md").read_text("utf-8")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == __version__


def test_no_extra_repeats_what_another_holds(metadata):
    """A requirement stands in one extra, with one bound; the others name that extra."""
    lines = metadata.get_all("Requires-Dist")
    plain = [line.partition(";")[0].strip() for line in lines]
    repeated = {
        one for one in plain if plain.count(one) > 1 and not one.startswith("diversevit-fast[")
    }
    assert not repeated
    names = [re.split(r"[\[<>=!~ ]", one)[0] for one in set(plain)]
    assert {name for name in names if names.count(name) > 1} <= {"diversevit-fast"}


def test_every_extra_that_a_message_names_exists(metadata):
    named = {"corruptions", "docs"}
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r'extra="([\w-]+)"', path.read_text("utf-8")))
    assert {"train", "hf", "onnx", "xformers"} <= named
    assert named <= set(metadata.get_all("Provides-Extra"))


def test_nothing_advises_to_install_from_an_index():
    """No index serves this package: what a checkout or a wheel offers is advised."""
    told = re.compile(r"pip install [^\n]*diversevit[-_]fast(?!-[\d*])")
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*"),
    ):
        if path.suffix in (".md", ".py", ".ipynb"):
            assert not told.findall(path.read_text("utf-8")), path


SMOKE = r"""
import torch
import diversevit_fast as dvf, diversevit_kernels
from diversevit_fast.installation import install_command
q, k, v = (torch.randn(1, 2, 33, 8, requires_grad=True) for _ in range(3))
inner = torch.autograd.grad(dvf.attention(q, k, v).square().sum(), (q, k, v), create_graph=True)
sum(g.square().sum() for g in inner).backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))
print(dvf.__file__, diversevit_kernels.__file__, install_command("hf"), sep="\n")
"""


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run a command where the wheel is installed, in an environment of its own outside the repository."""
    pytest.importorskip("pip")
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "env", with_pip=False, symlinks=True)
    python = home / "env/bin/python"
    if not python.exists():
        pytest.skip("needs a system whose environments have bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = (home / "env/lib").glob("python*/site-packages")
    (packages / "tests_dependencies.pth").write_text("\n".join(site.getsitepackages()))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str) -> str:
        words = [str(home / "env/bin" / command[0]), *command[1:]]
        done = subprocess.run(words, cwd=home, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.home, run.wheel = home, wheel
    return run


def test_the_wheel_computes_a_second_derivative_and_knows_where_it_came_from(installed):
    *places, advice = installed("python", "-W", "error::UserWarning", "-c", SMOKE).splitlines()
    assert all(Path(place).is_relative_to(installed.home) for place in places)
    assert advice == f'pip install "{installed.wheel}[hf]"'


def test_the_wheel_brings_the_command(installed):
    pytest.importorskip("typer")
    assert "select-heads" in installed("diversevit", "--help")


IMPORTED = """
import sys, torch
before = set(sys.modules)
import diversevit_fast, diversevit_kernels
print(*sorted({name for name in sys.modules} - before))
"""
SLOW = {
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "timm",
    "torchvision",
    "transformers",
}
SLOW |= {"sklearn", "scipy", "pandas", "matplotlib", "typer", "rich", "packaging", "safetensors"}
"""Triton is not among them: ``torch.utils.flop_counter``, which our formulas are registered with, imports it."""


def test_importing_warns_of_nothing_and_loads_nothing_slow():
    """Most of what a slow import costs is in other packages, none of which an import of ours loads."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTED], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    loaded = set(done.stdout.split())
    assert {"diversevit_fast.ops.attention", "diversevit_kernels"} <= loaded
    assert not SLOW & loaded
    known = ("diversevit_", "__editable__", "triton", "torch.")
    others = {name for name in loaded if not name.startswith(known)}
    assert len(others) < 60, sorted(others)  # modules of Python's own that nobody else imported
