"""The page of the ViT-Ti shows what was recorded."""

import json

from tools.docs import vit_tiny
from tools.docs.support import between

MARKERS = ("verdicts", "facts", "compared", "trainings")


def test_the_page_shows_what_was_recorded():
    page = vit_tiny.PAGE.read_text("utf-8")
    tables = vit_tiny.tables(json.loads(vit_tiny.RESULT.read_text("utf-8")))
    assert set(tables) == set(MARKERS)
    for name, lines in tables.items():
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
        assert lines
        assert between(page, name, lines) == page
