"""The pages of models from random weights show what was recorded."""

import json

import pytest

from tools.docs import from_scratch
from tools.docs.support import between

MARKERS = ("verdicts", "facts", "compared", "trainings")


@pytest.mark.parametrize("model", from_scratch.PAGES)
def test_the_page_shows_what_was_recorded(model):
    path = from_scratch.PAGES[model]
    page = path.read_text("utf-8")
    result = json.loads(from_scratch.result_file(path).read_text("utf-8"))
    assert result["settings"]["architecture"] == model
    tables = from_scratch.tables(result)
    assert set(tables) == set(MARKERS)
    for name, lines in tables.items():
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
        assert lines
        assert between(page, name, lines) == page
