"""Write the tables of what is supported, in ``docs/models.md`` and ``docs/systems.md``, from outcomes of tests.

``python -m tools.docs.support`` runs the tests that attach to every library and combine every training system, keeps
their outcomes in ``docs/support.json``, and writes the tables between the pages' markers. A row whose test failed is
shown as failed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/support.json"
PAGES = {"models": ROOT / "docs/models.md", "systems": ROOT / "docs/systems.md"}
"""The page of each table, which holds ``<!-- models:begin -->`` and so on."""
TESTS = ("tests/attachment/test_zoo.py", "tests/attachment/test_systems.py")
USES = ("wrt='input'", "wrt='output'", "mask", "prune")
Tables = dict[str, dict]


def run() -> Tables:
    """Run the tests and return their outcomes: models {name: {use: outcome}}, systems {row: outcome}."""
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
    """Sort the tests' properties and failures by row; a row is as bad as the worst of its tests."""
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


def markdown(found: Tables) -> dict[str, str]:
    """Both tables, by the names of ``PAGES``; "yes" is right to rounding, "no" is refused in one line."""
    words = {"right": "yes", "refused": "no", "failed": "FAILED"}
    models = [f"| model | {' | '.join(f'`{use}`' for use in USES)} |", "|---|---|---|---|---|"]
    for name in sorted(found["models"], key=str.casefold):
        row = found["models"][name]
        models.append(f"| {name} | {' | '.join(words[row[use]] for use in USES)} |")
    systems = ["| combined with | |", "|---|---|"]
    systems += [f"| {name} | {outcome} |" for name, outcome in found["systems"].items()]
    return {"models": "\n".join(models), "systems": "\n".join(systems)}


def between(page: str, name: str, table: str) -> str:
    """``page`` with ``table`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    results = run()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, table in markdown(results).items():
        text = between(PAGES[name].read_text("utf-8"), name, table)
        PAGES[name].write_text(text, encoding="utf-8")
