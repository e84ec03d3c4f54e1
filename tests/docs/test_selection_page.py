"""The page of the selection study shows what was recorded."""

import json

from diversevit_fast.experiment.selection_rules import rules
from tools.docs import selection


def recorded():
    return json.loads(selection.RECORD.read_text(encoding="utf-8"))


def test_the_page_prints_the_record():
    text = selection.PAGE.read_text(encoding="utf-8")
    assert selection.page(text, recorded()) == text
    for marker in selection.parts(recorded()):
        assert f"<!-- {marker}:begin -->" in text


def test_another_number_would_be_seen():
    studies = recorded()
    first = next(iter(studies.values()))["pools"]["single"][1]
    first["regret"][0] += 0.25
    text = selection.PAGE.read_text(encoding="utf-8")
    assert selection.page(text, studies) != text


def test_every_rule_is_in_every_study():
    for study in recorded().values():
        for entries in study["pools"].values():
            assert {rule.name for rule in rules()} <= {entry["rule"] for entry in entries}
            assert {e["models"] + e["refused"] for e in entries} == {len(study["models"])}


def test_studies_are_kept_as_they_are(tmp_path):
    studies = recorded()
    for i, study in enumerate(studies.values()):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "selection.json").write_text(json.dumps(study))
    folders = {name: str(tmp_path / str(i)) for i, name in enumerate(studies)}
    assert json.loads(selection.keep(folders)) == studies
    first, *_, last = studies
    added = json.loads(selection.keep({first: folders[last], "new": folders[first]}, studies))
    assert list(added) == [*studies, "new"]
    assert added == {**studies, first: studies[last], "new": studies[first]}
