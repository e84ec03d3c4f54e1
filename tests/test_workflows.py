"""The files that GitHub and pre-commit read: they parse, and what they run exists."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
TOOLS = {"build", "ls", "mkdocs", "pip", "pyright", "ruff"}
"""Commands of others, which an extra or the runner brings."""


def read(path: Path):
    return yaml.safe_load(path.read_text("utf-8"))


def steps(workflow: Path):
    """Each step of a workflow's jobs, with its job's matrix."""
    for job in read(workflow)["jobs"].values():
        for step in job["steps"]:
            yield step, job.get("strategy", {}).get("matrix", {})


def commands(workflow: Path) -> list[str]:
    """The command lines that a workflow runs."""
    return [line for step, _ in steps(workflow) for line in step.get("run", "").splitlines()]


def extras() -> set[str]:
    section = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def complaint(line: str) -> str | None:
    """What is wrong with a command line; None if all that it names exists."""
    from typer.main import get_command

    from diversevit_fast.experiment.cli import app

    words = shlex.split(line)
    for extra in re.findall(r"\[([\w,-]+)\]", line):
        if not set(extra.split(",")) <= extras():
            return f"no such extra: {extra}"
    if words[:2] == ["python", "-m"]:
        if words[2] not in TOOLS and find_spec(words[2]) is None:
            return f"no such module: {words[2]}"
    elif words[0] == "diversevit":
        if words[1] in ("--version", "--help"):
            return None
        command = get_command(app).commands.get(words[1])
        if command is None:
            return f"no such command: {words[1]}"
        options = {o for p in command.params for o in p.opts}
        if unknown := {w for w in words if w.startswith("--")} - options:
            return f"no such option: {unknown}"
    elif words[0] == "pytest":
        for path in (w for w in words if w.startswith("tests")):
            if not (ROOT / path).exists():
                return f"no such tests: {path}"
    elif words[0] not in TOOLS:
        return f"no such tool: {words[0]}"
    return None


def test_there_is_a_workflow_for_each_thing():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "packages", "tests"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists(workflow):
    pytest.importorskip("typer")
    content = read(workflow)
    assert set(content) == {"name", True, "permissions", "concurrency", "jobs"} | (
        {"env"} & set(content)
    )  # YAML 1.1 reads the key "on" as True
    assert content["permissions"] == {"contents": "read"}
    assert {"push", "pull_request"} <= set(content[True])
    lines = commands(workflow)
    assert lines
    assert not [said for line in lines if (said := complaint(line))]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_uses_versions_that_are_supported(workflow):
    low, high = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT)[0]
    asked = set()
    for step, matrix in steps(workflow):
        if step.get("uses", "").startswith("actions/setup-python"):
            version = step["with"]["python-version"]
            asked |= set(matrix["python"]) if "matrix" in version else {version}
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/a@v1"))
    assert asked <= {f"3.{minor}" for minor in range(int(low), int(high))}


def test_the_oldest_and_the_newest_are_tested():
    lowest = re.findall(r'"torch>=([\d.]+)"', PROJECT)[0]
    lines = commands(ROOT / ".github/workflows/tests.yml")
    assert {line for line in lines if "torch==" in line} == {
        line for line in lines if f'"torch=={lowest}.*"' in line
    }
    jobs = read(ROOT / ".github/workflows/tests.yml")["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    ours = (ROOT / ".ci/run").read_text("utf-8")
    for line in lines:  # what runs here is what runs there, but for the number of processes
        if line.startswith("pytest") and "tests/" in line:
            assert line.replace("-n 4", "-n 2") in ours, line


def test_what_does_not_exist_is_seen():
    pytest.importorskip("typer")
    assert complaint("python -m tools.nowhere") == "no such module: tools.nowhere"
    assert complaint("pytest tests/nowhere.py") == "no such tests: tests/nowhere.py"
    assert complaint("diversevit rum") == "no such command: rum"
    assert complaint("diversevit doctor --deep") == "no such option: {'--deep'}"
    assert complaint('pip install -e ".[everything]"') == "no such extra: everything"
    assert complaint("tox") == "no such tool: tox"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_asks(form):
    content = read(form)
    if form.name == "config.yml":
        assert content == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(content)
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    assert asked
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)
    assert all(field["validations"]["required"] is True for field in asked)


def test_hooks_before_a_commit_run_what_exists():
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert {hook["id"] for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "tree", "types"}
    assert not [said for hook in repo["hooks"] if (said := complaint(hook["entry"]))]


@pytest.mark.parametrize(
    "name", ["SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md"]
)
def test_pages_for_contributors_are_linked_and_short(name):
    text = (ROOT / name).read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 120
    if not name.startswith("."):
        assert f"({name})" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
