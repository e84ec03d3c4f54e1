"""The report: self-contained, rebuilt from files alone, and saying what the numbers say."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import metrics, plots, resolve, run, write_report
from diversevit_fast.experiment.plots import PICTURES
from diversevit_fast.experiment.report import PUBLISHED, TITLES

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = {
    **{"samples": 64, "epochs": 1, "batch_size": 32, "seeds": (0, 1), "threads": 1, "workers": 1},
    "model": {
        "patch_size": 16,
        "dim": 16,
        "depth": 2,
        "num_heads": 3,
        "head_dim": 8,
        "mlp_dim": 16,
    },
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    console = rich_console.Console(file=io.StringIO())
    return run(resolve(TINY), tmp_path_factory.mktemp("runs") / "run <b>&", console=console)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the run's data files: no weights, no pictures, no page."""
    copy = tmp_path / original.name
    copy.mkdir()
    for name in ("metrics.csv", "config.json", "cosines.json"):
        shutil.copy(original / name, copy)
    for path in original.glob("*.probes.json"):
        shutil.copy(path, copy)
    return copy


def text_of(page: Path) -> str:
    """What a reader sees, in one line."""
    html = re.sub(r"<(style|title)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


class Links(HTMLParser):
    """Every address a page refers to, and its tags."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(original):
    page = (original / "report.html").read_text(encoding="utf-8")
    links = Links(page)
    assert not links.open
    names = [*PICTURES, "use.png", "subsets.png", "decoded.png", "maps.png", "cka.png"]
    assert len(links.addresses) == len(names)
    for address, name in zip(links.addresses, names, strict=True):
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (original / name).read_bytes()
    assert "url(" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_names_are_escaped(original):
    page = (original / "report.html").read_text(encoding="utf-8")
    assert "<h1>run &lt;b&gt;&amp;</h1>" in page


def test_rebuilds_from_data_files_alone(folder, original):
    write_report(folder)
    assert (folder / "report.html").read_bytes() == (original / "report.html").read_bytes()
    assert not list(folder.glob("*.tmp"))


def test_pictures_are_drawn_in_a_style_of_their_own(folder, original):
    """Whatever a ``matplotlibrc`` asks for; and what the caller's pyplot has stays."""
    matplotlib = pytest.importorskip("matplotlib")
    theirs = {"text.usetex": True, "font.size": 30, "figure.dpi": 30, "backend": "svg"}
    with matplotlib.rc_context():
        matplotlib.rcParams.update(theirs)
        write_report(folder)
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs
    for name in PICTURES:
        assert (folder / name).read_bytes() == (original / name).read_bytes()


PICTURE = """
import sys
from pathlib import Path
from diversevit_fast.experiment import write_report
from diversevit_fast.experiment.plots import rehearse
rehearse()
write_report(Path(sys.argv[1]))
import matplotlib
assert "matplotlib.pyplot" not in sys.modules
print(matplotlib.rcParams._get("backend"))
"""


@pytest.mark.parametrize("backend", ["module://not_installed", "tkagg"])
def test_pictures_need_no_backend_of_the_environment(backend, folder, original):
    """A notebook sets one that the ``!`` cell's Python may not have."""
    env = {**os.environ, "MPLBACKEND": backend}
    command = [sys.executable, "-c", PICTURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_bytes() == (original / "report.html").read_bytes()
    assert backend != "tkagg" or done.stdout == "tkagg\n"  # for the caller's pyplot


def test_a_drawing_that_fails_is_one_line_and_said_first(folder, monkeypatch):
    def fail(_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(plots, "_png", fail)
    with pytest.raises(
        UsageError, match="matplotlib: expected one that draws, got RuntimeError: no"
    ):
        plots.rehearse()
    with pytest.raises(UsageError, match=r"report: .*\(RuntimeError: no fonts at all\)"):
        write_report(folder)


def test_table_holds_the_numbers_of_the_metrics(original):
    text = text_of(original / "report.html")
    for line in metrics.compare(metrics.read_csv(original / "metrics.csv")):
        assert str(line.rule) in text
        assert f"{line.test_id} {line.test_ood} {line.worst_group}" in text
    assert text.count("oracle: chosen on the test set") == 1


def test_says_what_was_run(original):
    text = text_of(original / "report.html")
    record = json.loads((original / "config.json").read_text())
    shown = record["splits"]["val_ood"]["independent"]
    assert shown["photographs"] == 64
    for said in (
        "digits-photos, preset quick, 2 seeds, 1 epoch",
        "seeds 0, 1",
        "patch_size 16",
        "train 64, val_id 64",
        f"val_ood {shown['digits']} digits, 64 photographs;",
        f"torch {record['versions']['torch']}",
        record["machine"]["processor"],
    ):
        assert said in text


@pytest.mark.parametrize("better", ["erm", "diversevit", None])
def test_verdicts_follow_the_files(better, folder):
    """Four seeds, heads of one method made right nine times in ten: the sentences must turn with them."""
    rows = metrics.read_csv(folder / "metrics.csv")
    rows = [{**row, "seed": row["seed"] + more} for row in rows for more in (0, 2)]
    for row in rows:
        if row["heads"] != "all":
            row["accuracy"] = 0.9 if row["method"] == better else 0.5
        else:
            row["accuracy"] = 0.3
    metrics.write_csv(rows, folder / "metrics.csv")
    cosines = json.loads((folder / "cosines.json").read_text())
    alike = {"before": [[1, 0.5], [0.5, 1]], "after": [[1, 0.1], [0.1, 1]]}
    same = {"before": alike["before"], "after": alike["before"]}
    found = {
        f"{m}-seed{n}": alike if m == better else same
        for m in ("erm", "diversevit")
        for n in range(4)
    }
    assert set(cosines) < set(found)
    (folder / "cosines.json").write_text(json.dumps(found))
    text = text_of(write_report(folder))
    verdict = {"diversevit": "shows", "erm": "is contradicted", None: "cannot tell"}[better]
    assert f"{TITLES['prune']}: shows." in text  # of all eight trainings
    assert f"{TITLES['differ']}: {verdict}." in text
    assert f"{TITLES['better']}: {verdict}." in text


@pytest.mark.parametrize("data", ["mnist-cifar", "digits-photos"])
def test_published_numbers_stand_beside_mnist_cifar_only(data, folder):
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["data"] = data
    (folder / "config.json").write_text(json.dumps(config))
    text = text_of(write_report(folder))
    for number in PUBLISHED.values():
        assert (number in text) == (data == "mnist-cifar")
    assert ("not the recipe of this run" in text) == (data == "mnist-cifar")


def test_one_method_and_one_seed_have_a_report(folder):
    rows = metrics.read_csv(folder / "metrics.csv")
    kept = [r for r in rows if (r["method"], r["seed"]) == ("erm", 1)]
    metrics.write_csv(kept, folder / "metrics.csv")
    text = text_of(write_report(folder))
    assert "cannot be judged" in text
    assert TITLES["prune"] in text
    assert TITLES["better"] not in text
    assert "standard deviation over seeds" not in text


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("metrics.csv", lambda text: "", "metrics.csv: expected the columns of a run"),
        ("metrics.csv", lambda text: "a,b\n1,2\n", "metrics.csv: expected the columns of a run"),
        ("metrics.csv", lambda text: text[:-30], "metrics.csv: expected a value in every column"),
        ("metrics.csv", lambda text: text.split("\n")[0] + "\n", "metrics.csv: expected rows"),
        ("metrics.csv", lambda text: text[: text[:-1].rindex("\n") + 1], "every epoch alike"),
        (
            "metrics.csv",
            lambda text: text.replace("erm,0", "erm,zero", 1),
            "a value in every column",
        ),
        ("metrics.csv", lambda text: None, "metrics.csv: expected a readable file"),
        ("config.json", lambda text: text[:99], "config.json: expected a JSON file"),
        ("config.json", lambda text: "{}", "report: expected the files of a run"),
        (
            "config.json",
            lambda text: text.replace('"machine"', '"m"'),
            "report: expected the files",
        ),
        ("cosines.json", lambda text: None, "cosines.json: expected a readable file"),
        ("cosines.json", lambda text: '{"erm-seed0": {}}', "report: expected the files of a run"),
        ("cosines.json", lambda text: "{}", "report: expected the files of a run"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:8] else "",
)
def test_damaged_files_are_one_line(file, damage, said, folder):
    text = damage((folder / file).read_text(encoding="utf-8"))
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        write_report(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()
