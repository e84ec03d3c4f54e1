"""Tests of ``dvf.supported``, and of the documentation's tables of what is supported."""

import json
from pathlib import Path

import pytest
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.helpers.vits import timm_vit
from tests.helpers.zoo import ZOO
from tools.docs import support

DOCS = Path(__file__).parents[2] / "docs"


def recorded():
    return json.loads((DOCS / "support.json").read_text("utf-8"))


@pytest.mark.parametrize("name", support.PAGES)
def test_the_pages_show_what_was_recorded(name):
    page = support.PAGES[name].read_text("utf-8")
    assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
    assert support.between(page, name, support.markdown(recorded())[name]) == page


def test_what_was_recorded_is_what_the_tests_ask_for():
    """Every model and use of the zoo, refused where it must be; every system; nothing failed."""
    uses = support.USES
    expect = {
        name: {use: "refused" if use in entry.refused else "right" for use in uses}
        for name, entry in ZOO.items()
    }
    assert recorded()["models"] == expect
    marks = [
        line
        for line in (DOCS.parent / "tests/attachment/test_systems.py").read_text().splitlines()
        if "@system(" in line
    ]
    assert len(recorded()["systems"]) == len(marks)
    assert set(recorded()["systems"].values()) == {"right", "refused"}


def test_a_failed_test_is_shown():
    said = [({"model": "a", "use": use, "outcome": "right"}, use == "mask") for use in support.USES]
    said += [({"system": "b\tright"}, True), ({"system": "b\tright"}, False)]
    text = support.markdown(support.tables(said))
    assert "| a | yes | yes | FAILED | yes |" in text["models"]
    assert "| b | failed |" in text["systems"]


def test_supported():
    model = timm_vit()
    layers = dvf.supported(model)
    assert [layer.name for layer in layers] == [f"blocks.{i}.attn" for i in range(3)]
    assert all(layer.allows(use) for layer in layers for use in support.USES)
    assert str(layers[0]).startswith("0 blocks.0.attn (Attention, 3 heads): wrt='input': yes")
    model.blocks[1].attn.gate = nn.Identity()
    assert not dvf.supported(model)[1].allows("prune")
    assert "gate" in str(dvf.supported(model)[1])
    with pytest.raises(UsageError, match="model: expected a model with attention layers"):
        dvf.supported(nn.Linear(2, 2))


def test_inside_a_context_the_same():
    model = timm_vit()
    before = dvf.supported(model)
    with dvf.HeadDiversity(model):
        assert dvf.supported(model) == before
