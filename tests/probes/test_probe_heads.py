"""probe_heads on models whose heads are known to read one half of the image only."""

import csv
import io
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError

pytest.importorskip("sklearn")

TOP = torch.zeros(8, 4, dtype=torch.bool)
TOP[:4] = True
SPURIOUS, CORE, CONSTANT = range(3)  # the heads of ``Halves``


class Halves(nn.Module):
    """Two patches, and three heads: of the upper patch, of the lower one, and of nothing.

    Tokens are ``(is class token, is upper, is lower, brightness)``. The class is the sign of what the heads
    give, the upper patch counting ``upper`` times; of nothing, it is class 0.
    """

    def __init__(self, upper: float = 2.0, layers: int = 1):
        super().__init__()
        self.blocks = nn.ModuleList(self._attention(upper) for _ in range(layers))

    @staticmethod
    def _attention(upper: float) -> nn.Module:
        attention = dvf.nn.MultiHeadAttention(4, 3, 4, qkv_bias=False, proj_bias=False).double()
        query, key, value = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
        for head, patch in ((SPURIOUS, 1), (CORE, 2)):
            query[head, 0, 0] = 60.0  # the class token asks for the patch
            key[head, 0, patch] = 1.0
            value[head, 0, 3] = 1.0  # and gets its brightness
        out = torch.zeros(4, 3, 4, dtype=torch.float64)
        out[3, SPURIOUS, 0], out[3, CORE, 0] = upper, 1.0
        with torch.no_grad():
            attention.qkv.weight.copy_(torch.stack([query, key, value]).reshape(-1, 4))
            attention.proj.weight.copy_(out.flatten(1))
        return attention

    def forward(self, images: Tensor) -> Tensor:
        bright = images.reshape(len(images), 2, -1).mean(-1)
        kinds = torch.eye(3, dtype=images.dtype).expand(len(images), 3, 3)
        tokens = torch.cat([kinds, torch.cat([0 * bright[:, :1], bright], 1)[..., None]], 2)
        for block in self.blocks[:-1]:
            block(tokens)
        y = self.blocks[-1](tokens)[:, 0, 3]
        return torch.stack([-y, y], 1)


def data(n: int = 200, agree: float = 0.5, seed: int = 0):
    """Images whose halves are bright or dark by two attributes that agree in a share ``agree`` of them."""
    g = torch.Generator().manual_seed(seed)
    core = torch.arange(n) % 2
    same = torch.arange(n) // 2 < agree * n / 2
    spurious = torch.where(same, core, 1 - core)
    images = 0.1 * torch.randn(n, 1, 8, 4, generator=g, dtype=torch.float64)
    images[:, :, :4] += (2.0 * spurious - 1)[:, None, None, None]
    images[:, :, 4:] += (2.0 * core - 1)[:, None, None, None]
    order = torch.randperm(n, generator=g)
    return images[order], core[order], spurious[order]


def batches(images, labels, size=64):
    return list(zip(images.split(size), labels.split(size), strict=True))


def probed(model=None, n=200, agree=0.5, **options):
    images, core, spurious = data(n, agree)
    options = {"regions": {"spurious": TOP, "core": ~TOP}, "swaps": "regions", **options}
    attributes = {"core": "labels", "spurious": spurious}
    return dvf.probe_heads(model or Halves(), batches(images, core), attributes, **options)


@pytest.fixture(scope="module")
def probes():
    return probed(ablation="mean")


def assert_row(row, **wanted):
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, abs=1e-9), name


def test_a_head_of_one_half_uses_that_half_alone(probes):
    spurious, core, constant = probes.rows()
    assert_row(spurious, use_spurious=1, use_core=0.5, prevalence=0.5)
    assert_row(core, use_spurious=0.5, use_core=1, prevalence=0.5)
    assert_row(constant, use_spurious=0.5, use_core=0.5, prevalence=1)
    assert [row["kind"] for row in probes.rows()] == ["spurious", "robust", "dead"]
    assert probes.counts == {"dead": 1, "spurious": 1, "robust": 1, "neither": 0}
    assert probes.specialisation == pytest.approx(0.5)
    assert_row(probes.whole, use_spurious=1, use_core=0.5, prevalence=0.5)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_without_the_strong_head_the_model_turns_to_the_other(probes, how):
    spurious, core, constant = probes.rows()
    assert_row(spurious, **{f"{how}_spurious": -0.5, f"{how}_core": 0.5})
    assert_row(core, **{f"{how}_spurious": 0, f"{how}_core": 0})
    assert_row(constant, **{f"{how}_spurious": 0, f"{how}_core": 0})


def test_mean_ablation_keeps_what_a_head_says_of_every_image():
    """A head that gives the same in all images but not zero: without it the class is another, without its part none."""
    model = Halves()
    attention: Any = model.blocks[0]
    with torch.no_grad():  # head CONSTANT: 4 times "is class token", from the class token itself
        attention.qkv.weight[[8, 20, 32], 0] = torch.tensor([60.0, 1.0, 4.0]).double()
        attention.proj.weight[3, 8] = 1.0
    rows = probed(model, ablation="mean").rows()
    assert_row(rows[CONSTANT], zero_spurious=0.5, zero_core=0, mean_spurious=0, mean_core=0)


def test_swapping_a_part_changes_the_heads_that_read_it(probes):
    spurious, core, constant = probes.rows()
    assert_row(spurious, swap_spurious=1, swap_core=0)
    assert_row(core, swap_spurious=0, swap_core=1)
    assert_row(constant, swap_spurious=0, swap_core=0)
    assert_row(probes.whole, swap_spurious=1, swap_core=0)


def test_attention_is_where_the_head_looks(probes):
    spurious, core, constant = probes.rows()
    assert_row(spurious, mass_spurious=1, mass_core=0)
    assert_row(core, mass_spurious=0, mass_core=1)
    assert_row(constant, mass_spurious=0.5, mass_core=0.5, area_spurious=0.5, area_core=0.5)


def test_probes_find_what_an_output_holds(probes):
    spurious, core, constant = probes.rows()
    assert_row(spurious, decode_spurious=1)
    assert_row(core, decode_core=1)
    for row, attribute in ((spurious, "core"), (core, "spurious"), (constant, "core")):
        assert 0.3 < row[f"decode_{attribute}"] < 0.7
    for row in probes.rows():
        for attribute in ("core", "spurious"):
            held, control = row[f"decode_{attribute}"], row[f"control_{attribute}"]
            assert row[f"selectivity_{attribute}"] == pytest.approx(held - control)
            assert 0.3 < control < 0.7


def test_cka_of_a_constant_head_does_not_exist(probes):
    matrix = torch.tensor(probes.cka[0])
    assert matrix[CONSTANT].isnan().all()
    assert matrix[:, CONSTANT].isnan().all()
    assert matrix[0, 0] == pytest.approx(1)
    assert matrix[0, 1] < 0.05  # independent attributes


def test_correlated_attributes_are_told_apart():
    """90 % agree, yet a head that reads one of them is not said to use the other."""
    rows = probed(agree=0.9).rows()
    assert_row(rows[SPURIOUS], use_spurious=1, use_core=0.5, prevalence=0.5)
    assert_row(rows[CORE], use_spurious=0.5, use_core=1, swap_core=1, swap_spurious=0)
    assert 0.3 < rows[SPURIOUS]["decode_core"] < 0.7


def test_every_layer_is_probed_by_itself():
    """The first layer's output is not used, so nothing that is done to it changes a prediction."""
    probes = probed(Halves(layers=2), layers="all")
    first, last = probes.rows()[:3], probes.rows()[3:]
    assert [(row["layer"], row["head"]) for row in probes.rows()] == [
        (layer, head) for layer in (0, 1) for head in range(3)
    ]
    for row in first:
        assert_row(row, use_spurious=1, use_core=0.5, zero_spurious=0, zero_core=0)
    assert [row["mass_core"] for row in first] == pytest.approx([0, 1, 0.5])
    for one, other in zip(last, probed().rows(), strict=True):
        names = ("use_core", "use_spurious", "zero_core", "swap_spurious", "mass_core")
        assert_row(one, **{name: other[name] for name in names})
    assert set(probes.cka) == {0, 1}


def test_as_inside_keep_heads():
    """The model's predictions with one head are those of ``keep_heads``, on a model of random weights."""
    torch.manual_seed(3)
    model = dvf.models.DiverseViT((8, 4), 4, 1, dim=8, depth=2, num_heads=3, head_dim=4, mlp_dim=8)
    images, core, spurious = data(64)
    images = images.float()
    loader = batches(images, core, 24)
    probes = dvf.probe_heads(
        model.train(), loader, {"core": "labels", "spurious": spurious}, layers=[0, 1], decode=False
    )
    assert model.training
    model.eval()
    with torch.no_grad():
        whole = model(images).argmax(1)
        for row in probes.rows():
            rest = [head for head in range(3) if head != row["head"]]
            with dvf.keep_heads(model, {row["layer"]: [row["head"]]}):
                alone = model(images).argmax(1)
            with dvf.keep_heads(model, {row["layer"]: rest}):
                without = model(images).argmax(1)
            for name, values in (("core", core), ("spurious", spurious)):
                hit = [(x == values).double().mean().item() for x in (whole, alone, without)]
                assert_row(row, **{f"use_{name}": hit[1], f"zero_{name}": hit[2] - hit[0]})
    assert "decode_core" not in row
    assert not probes.cka


def test_swaps_by_functions_and_masks_of_single_images():
    def lower(images, donors):
        return torch.cat([images[:, :, :4], donors[:, :, 4:]], 2)

    masks = TOP.expand(200, 8, 4)
    rows = probed(swaps={"core": lower}, regions={"upper": masks}).rows()
    assert [row["swap_core"] for row in rows] == [0, 1, 0]
    assert "swap_spurious" not in rows[0]
    assert [row["mass_upper"] for row in rows] == pytest.approx([1, 0, 0.5])


def test_groups_functions_and_dictionaries_are_attributes():
    images, core, spurious = data()
    loader = [
        {"images": x, "labels": y, "groups": g}
        for x, y, g in zip(
            images.split(64), core.split(64), (2 * core + spurious).split(64), strict=True
        )
    ]
    attributes = {"core": "labels", "spurious": lambda labels, groups: groups % 2}
    probes = dvf.probe_heads(Halves(), loader, attributes, decode=False)
    assert [row["kind"] for row in probes.rows()] == ["spurious", "robust", "dead"]


def test_one_seed_one_result():
    assert probed().table == probed().table
    assert probed(seed=1).table != probed().table


def test_tables_and_files_hold_the_rows(probes, tmp_path):
    text = probes.to_csv(tmp_path / "probes.csv")
    assert (tmp_path / "probes.csv").read_text() == text
    for line, row in zip(csv.DictReader(io.StringIO(text)), probes.rows(), strict=True):
        assert line.keys() == row.keys()
        assert float(line["use_core"]) == pytest.approx(row["use_core"])
        assert line["kind"] == row["kind"]
    text = probes.to_json(tmp_path / "probes.json")
    json.loads(text, parse_constant=pytest.fail)  # no NaN, which is not JSON
    read = dvf.HeadProbes.from_json(tmp_path / "probes.json")
    assert (read.table, read.whole, read.images) == (probes.table, probes.whole, 200)
    assert math.isnan(read.cka[0][0][CONSTANT])
    probes.rows()[0]["use_core"] = 7
    assert probes.rows()[0]["use_core"] != 7


def test_a_data_frame_where_pandas_is(probes):
    pandas = pytest.importorskip("pandas")
    frame = probes.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["kind"]) == ["spurious", "robust", "dead"]


def test_without_pandas_one_line_says_so(probes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pandas: expected an installed package.*rows\(\)"):
        probes.to_pandas()


def test_other_names_have_no_kinds():
    images, core, spurious = data()
    attributes = {"shape": "labels", "colour": spurious}
    probes = dvf.probe_heads(Halves(), batches(images, core), attributes, decode=False)
    assert "kind" not in probes.rows()[0]
    with pytest.raises(UsageError, match="specialisation: expected attributes named core"):
        _ = probes.specialisation


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"table": [], "whole": {}}', "[" * 10**5])
def test_a_file_of_something_else_is_one_line(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"probes: expected a file of HeadProbes.to_json, got"):
        dvf.HeadProbes.from_json(tmp_path / "x.json")


ONES = torch.ones(200, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attributes": {}}, "attributes: expected a dictionary of attributes by name, got none"),
        ({"attributes": {"a b": "labels"}}, "attributes: expected names that are words"),
        ({"attributes": {"a": "label"}}, "attributes['a']: expected labels or groups, got label"),
        ({"attributes": {"a": "groups"}}, "loader: expected groups in the batches, got none"),
        ({"attributes": {"a": torch.rand(200)}}, "attributes['a']: expected whole numbers [n]"),
        ({"attributes": {"a": [0, 1]}}, "one value for each image of the loader, got 2"),
        ({"attributes": {"a": [0, 1] * 101}}, "expected 200 values, one for each image"),
        ({"attributes": {"a": ONES}}, "attributes['a']: expected at least two values, got 1"),
        ({"attributes": {"a": [0, 2] * 100}}, "expected class indices from 0 to 1, got 0 to 2"),
        (
            {"attributes": {"a": "labels", "b": lambda labels, _: labels}},
            "loader: expected images of all 4 combinations of a, b, got 2 combinations",
        ),
        ({"loader": []}, "loader: expected at least one batch"),
        ({"loader": torch.rand(3)}, "loader: expected an iterable of batches"),
        ({"ablation": "shuffle"}, "ablation: expected"),
        ({"ablation": "mean", "loader": iter([])}, "run through twice for ablation='mean'"),
        ({"layers": [3]}, "layers: expected layer indices from -1 to 0, got 3"),
        ({"regions": {"a": TOP.int()}}, "regions['a']: expected booleans"),
        ({"regions": {"a": TOP.T}}, "regions['a']: expected a mask of 8 x 4 pixels"),
        ({"regions": {"a": TOP.expand(199, 8, 4)}}, "regions['a']: expected a mask of 8 x 4"),
        ({"regions": {"a": TOP.expand(201, 8, 4)}}, "regions['a']: expected 200, one for each"),
        ({"swaps": "halves"}, "swaps: expected 'regions', functions by attribute or None"),
        ({"swaps": "regions"}, "swaps: expected a region [height, width] with the name"),
        ({"swaps": {"b": min}}, "swaps: expected functions for attributes among a"),
        ({"swaps": {"a": lambda x, y: x[:1]}}, "swaps['a']: expected images"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_one_line(change, said):
    images, core, _ = data()
    given = {"loader": batches(images, core), "attributes": {"a": "labels"}, **change}
    with pytest.raises(UsageError) as error:
        dvf.probe_heads(Halves(), **given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_have_no_class_token():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1,), "num_heads": (3,)},
        num_classes=2,
    )
    loader = [(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)]
    rows = dvf.probe_heads(model, loader, {"a": "labels"}, decode=False).rows()
    assert len(rows) == 3
    with pytest.raises(UnsupportedError, match="attends within windows"):
        dvf.probe_heads(model, loader, {"a": "labels"})
