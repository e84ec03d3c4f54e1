"""The README's two tables of what is supported, made of what the tests said.

``python tools/docs/support.py`` runs the tests that attach to every library and combine every training system, keeps
what each said in ``docs/support.json``, and writes the tables between the README's markers. A row whose
test failed is shown as failed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/support.json"
README = ROOT / "README.md"
TESTS = ("tests/attachment/test_zoo.py", "tests/attachment/test_systems.py")
USES = ("wrt='input'", "wrt='output'", "mask", "prune")
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
Tables = dict[str, dict]


def run() -> Tables:
    """What every test said: models {name: {use: outcome}}, systems {row: outcome}."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return tables([(properties_of(case), failed(case)) for case in cases])


def properties_of(case: ElementTree.Element) -> dict[str, str]:
    return {p.get("name", ""): p.get("value", "") for p in case.iter("property")}


def failed(case: ElementTree.Element) -> bool:
    return any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))


def tables(said: list[tuple[dict[str, str], bool]]) -> Tables:
    """The tests' properties and failures, by row; a row is as bad as the worst of its tests."""
    found: Tables = {"models": {}, "systems": {}}
    for properties, bad in said:
        if "model" in properties:
            row = found["models"].setdefault(properties["model"], {})
            row[properties["use"]] = "failed" if bad else properties["outcome"]
        if "system" in properties:
            name, outcome = properties["system"].split("\t")
            if found["systems"].get(name) != "failed":
                found["systems"][name] = "failed" if bad else outcome
    return found


def markdown(found: Tables) -> str:
    """Both tables; "yes" is right to rounding, "no" is refused in one line."""
    words = {"right": "yes", "refused": "no", "failed": "FAILED"}
    lines = [f"| model | {' | '.join(f'`{use}`' for use in USES)} |", "|---|---|---|---|---|"]
    for name in sorted(found["models"], key=str.casefold):
        row = found["models"][name]
        lines.append(f"| {name} | {' | '.join(words[row[use]] for use in USES)} |")
    lines += ["", "| combined with | |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in found["systems"].items()]
    return "\n".join(lines)


def between(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    results = run()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    README.write_text(between(README.read_text("utf-8"), markdown(results)), encoding="utf-8")
