"""Headline steps: their checks bite, the search for the largest batch, what tables say of them."""

import json

import pytest
import torch

from benchmarks import headline, records, report
from benchmarks.headline import MODELS, VARIANTS, Headline, Model, Variant, check, next_batch
from benchmarks.steps import erm, penalised

PAPER = "DiverseViT"


@pytest.fixture
def on_cpu(monkeypatch):
    """Headline steps on a CPU, where ``graph_step`` runs a step plainly."""
    monkeypatch.setattr(headline, "DEVICE", "cpu")
    monkeypatch.setitem(MODELS, "ViT-Ti", Model("vit_tiny_patch16_224", 2, torch.bfloat16))


def variants(how: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(who, x) for who, one in VARIANTS.items() if one.how in how for x in one.layers]


@pytest.mark.parametrize(("who", "layers"), variants(("calls", "graph")))
def test_steps_of_the_papers_model_pass_their_check(who, layers, on_cpu):
    check(Headline(PAPER, layers, who))


@pytest.mark.parametrize("who", ["ours", "published loop", "stock ERM"])
def test_steps_of_a_stock_model_pass_their_check_in_bfloat16(who, on_cpu):
    pytest.importorskip("timm")
    check(Headline("ViT-Ti", "last", who))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda layers: erm,  # no penalty
        lambda layers: penalised("all"),  # too much of it
        lambda layers: lambda model: lambda *batch: penalised(layers)(model)(*batch).detach() + 0,
    ],
    ids=["no penalty", "other layers", "no gradient"],
)
def test_a_wrong_step_fails_its_check(wrong, on_cpu, monkeypatch):
    monkeypatch.setitem(VARIANTS, "wrong", Variant(wrong))
    with pytest.raises(
        (AssertionError, RuntimeError), match=r"off PyTorch's|does not require grad"
    ):
        check(Headline(PAPER, "last", "wrong"))


def search(limit: int, first: int, trials: dict[int, bool]) -> dict[int, bool]:
    """Carry a search to its end, where batches up to ``limit`` fit."""
    while batch := next_batch(trials, first):
        assert batch not in trials
        trials[batch] = batch <= limit
    return trials


@pytest.mark.parametrize("first", [1, 64, 80])
@pytest.mark.parametrize("limit", [0, 1, 2, 31, 63, 64, 65, 100, 1000, 24567])
def test_the_largest_batch_is_found_to_a_thirty_second(limit, first):
    trials = search(limit, first, {})
    found = headline.largest(trials)
    assert found <= limit
    assert limit - found <= max(1, found // 32)
    assert found == limit or limit > 31
    assert len(trials) <= 25


def test_a_search_ends_where_everything_fits():
    assert headline.largest(search(1 << 40, 64, {})) == headline.MOST


def test_a_search_goes_on_from_its_trials():
    whole = search(1000, 64, {})
    for n in range(len(whole)):
        begun = dict(list(whole.items())[:n])
        assert search(1000, 64, begun) == whole


def measured_steps() -> dict:
    """A file of ``tools.measure_gpu`` with tests, steps and trials."""
    ours, loop = (Headline("ViT-S", "last", who) for who in ("ours", "published loop"))

    def times(seconds: float, host: float) -> dict:
        return {"seconds": [seconds] * 5, "host_seconds": host, "peak_bytes": 3 << 30}

    def trials(case: Headline, **fits: bool) -> list[dict]:
        named = {"group": case.group, "implementation": case.variant}
        return [{**named, "batch": int(n[1:]), "fits": one} for n, one in fits.items()]

    refused = {"seconds": [], "refused": "eager one-pass: out of memory"}
    eager = Headline("ViT-S", "last", "eager one-pass")
    common = {"commit": "a", "machine": {"device": "NVIDIA H200", "commit": "a"}, "done": True}
    steps = [
        {**ours.row(), **times(0.02, 4e-3)},
        {**loop.row(), **times(0.05, 3e-2)},
        {**eager.row(), **refused},
    ]
    searches = trials(ours, b64=True, b512=True, b528=False) + trials(loop, b64=True)
    return {
        "tests: test_gelu.py": {**common, "rows": [{"tests": 5, "failures": 0}]},
        "step: ViT-S last": {**common, "rows": steps},
        "largest batch: ViT-S last": {**common, "rows": searches},
    }


def test_tables_of_steps_have_host_time_and_the_largest_batch(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    content = json.dumps(measured_steps())
    path.write_text(content)
    assert report.main([str(path)]) == 0
    assert path.read_text() == content  # measure_gpu goes on with it
    text = capsys.readouterr().out
    group = "| ViT-S last batch 64 bfloat16 |"
    assert f"{group} ours | 4000 us | 20 ms | 20 - 20 | 1.00 | 3072.0 MiB | 512 (not 528) |" in text
    assert f"{group} published loop | 3e+04 us | 50 ms | 50 - 50 | 2.50 |" in text
    assert "| at least 64 |" in text
    assert "Left out: bfloat16, eager one-pass: out of memory." in text
    assert [row.implementation for row in records.read(path)][:2] == ["ours", "published loop"]
