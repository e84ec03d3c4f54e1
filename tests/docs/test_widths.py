"""The page of models of several widths shows what was recorded."""

import json

import pytest

from tools.docs import widths
from tools.docs.support import between

pytest.importorskip("scipy")


def test_the_page_shows_what_was_recorded():
    page = widths.PAGE.read_text("utf-8")
    result = json.loads(widths.RESULT.read_text("utf-8"))
    tables = widths.tables(result)
    for name, lines in tables.items():
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
        assert between(page, name, lines) == page
    row = result["sweeps"][0]["rows"][0]
    row["test_ood"] = 1 - row["test_ood"]
    assert widths.tables(result)["widths"] != tables["widths"]
