"""Head tables: what is in them is what the model says; files come back whole or not at all."""

import io
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.helpers import vits
from tests.helpers.vits import images_for

CHOICES = [
    *[("last", search) for search in ("single", "exhaustive")],
    *[("all", search) for search in ("single", "exhaustive")],
]


@pytest.fixture(scope="module")
def model():
    return vits.diverse_vit(depth=2).train()


@pytest.fixture(scope="module")
def loaders(model):
    images = images_for(model, 20)
    labels = torch.arange(20) % 2
    groups = 2 * labels + torch.arange(20) // 10
    cut = (slice(0, 12), slice(12, 20))
    return {
        "id": [(images[i], labels[i], groups[i]) for i in cut],
        "ood": [(images[i].flip(-1), labels[i], groups[i] + 1) for i in cut],
        "bare": [images[i] for i in cut],
    }


@pytest.fixture(scope="module")
def table(model, loaders):
    return dvf.head_table(model, loaders)


@pytest.mark.parametrize(("layers", "search"), CHOICES)
def test_rows_are_what_the_model_says(model, loaders, layers, search):
    if (layers, search) == ("all", "exhaustive"):  # 225 choices
        loaders = {"id": [(x[:3], y[:3]) for x, y, _ in loaders["id"][:1]]}
    table = dvf.head_table(model, loaders, layers=layers, search=search)
    counts = {"last": {"single": 5, "exhaustive": 15}, "all": {"single": 9, "exhaustive": 225}}
    assert len(table.kept) == counts[layers][search]
    assert all(m.training for m in model.modules())
    rows = range(len(table.kept)) if len(table.kept) < 20 else (0, 77, 224)
    batches: Any
    for name, batches in loaders.items():
        images = torch.cat([b if name == "bare" else b[0] for b in batches])
        split = table.splits[name]
        for row in rows:
            with torch.no_grad(), dvf.keep_heads(model.eval(), table.kept[row]):
                logits = model(images)
            model.train()
            p = logits.softmax(-1)
            assert split.predicted[row].tolist() == logits.argmax(-1).tolist()
            for found, wanted in (
                (split.confidence, p.amax(-1)),
                (split.entropy, torch.distributions.Categorical(p).entropy()),
                (split.logsumexp, logits.exp().sum(-1).log()),
                (split.fourth_powers, p.square().square().sum(-1)),
            ):
                torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-6)


def test_labels_are_kept_where_there_are_any(table):
    assert table.splits["bare"].labels is None
    assert table.splits["bare"].groups is None
    assert table.splits["id"].labels.tolist() == [i % 2 for i in range(20)]


def test_the_first_row_is_the_whole_model(table):
    assert table.kept[0] == {1: [0, 1, 2, 3]}
    assert table.choices == list(range(15))
    assert [table.kept[row] for row in table.singles] == [{1: [h]} for h in range(4)]


def test_single_heads_of_a_table_are_the_table_of_single_heads(model, loaders, table):
    cut, made = table.single_heads(), dvf.head_table(model, loaders, search="single")
    assert cut.kept == made.kept
    assert cut.choices == made.choices == [1, 2, 3, 4]
    for name in loaders:
        assert torch.equal(cut.splits[name].predicted, made.splits[name].predicted)
        torch.testing.assert_close(cut.splits[name].entropy, made.splits[name].entropy)


@pytest.mark.parametrize("score", ["accuracy", "worst_group", "confidence", "atc"])
@pytest.mark.parametrize("search", ["single", "exhaustive"])
def test_a_criterion_of_the_same_name_ranks_as_the_model(model, loaders, score, search):
    reference = {"reference_loader": loaders["id"]} if score == "atc" else {}
    wanted = dvf.select_heads(model, loaders["ood"], score=score, search=search, **reference)
    table = dvf.head_table(model, loaders, search=search)
    found = dvf.select_heads(table, criterion=score)
    assert [c.score for c in found] == pytest.approx([c.score for c in wanted], abs=1e-6)
    by_heads = {str(c.kept): c.score for c in wanted}
    assert [c.score for c in found] == pytest.approx(
        [by_heads[str(c.kept)] for c in found], abs=1e-6
    )
    if score != "confidence":  # ties are ranked alike; confidences are rounded to float32
        assert [c.kept for c in found] == [c.kept for c in wanted]


def test_groups_have_the_names_of_the_loader(model, loaders, table):
    names = [table.group_names[i] for i in table.splits["ood"].groups.tolist()]
    wanted = torch.cat([batch[2] for batch in loaders["ood"]]).tolist()
    assert names == [str(group) for group in wanted]
    named = [(x, y, [f"g{int(z)}" for z in g]) for x, y, g in loaders["id"]]
    assert set(dvf.head_table(model, {"id": named}).group_names) == {"g0", "g1", "g2", "g3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {}, "loaders: expected loaders by the name of the split, got none"),
        (lambda b: b, "loaders: expected loaders by the name of the split, got list"),
        (lambda b: {"id": []}, "id: expected at least one batch"),
        (lambda b: {"id": [b[0], b[1][:2]]}, "id: expected groups in every batch, got none in 1"),
        (lambda b: {"id": [b[0][0], b[1][:2]]}, "id: expected labels in every batch, got none in"),
        (lambda b: {"id": [(b[0][0], b[0][1] + 1)]}, "labels: expected class indices from 0 to 1"),
    ],
)
def test_what_is_refused(model, loaders, change, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        dvf.head_table(model, change(loaders["id"]))
    assert all(m.training for m in model.modules())


class TestFiles:
    def test_come_back(self, table, tmp_path):
        table.save(tmp_path / "t.npz")
        back = dvf.HeadTable.load(tmp_path / "t.npz")
        for name in ("kept", "heads", "classes", "search", "group_names"):
            assert getattr(back, name) == getattr(table, name)
        assert list(back.splits) == list(table.splits)
        for name, split in table.splits.items():
            value: Any
            for key, value in vars(split).items():
                other: Any = getattr(back.splits[name], key)
                assert (other is None) if value is None else torch.equal(other, value)
                assert other is None or other.dtype == value.dtype
        assert dvf.select_heads(back, criterion="mano") == dvf.select_heads(table, criterion="mano")

    def test_no_file(self, tmp_path):
        with pytest.raises(UsageError, match="No such file"):
            dvf.HeadTable.load(tmp_path / "none.npz")

    def test_damaged_ones_are_refused_in_a_line(self, table, tmp_path):
        path = tmp_path / "t.npz"
        table.save(path)
        whole = path.read_bytes()
        generator = np.random.default_rng(0)
        cuts = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
        flips = []
        for place in generator.integers(0, len(whole), 60):
            flips.append(bytearray(whole))
            flips[-1][place] ^= 0x55
        said = []
        for data in [*cuts, *flips]:
            path.write_bytes(bytes(data))
            try:
                back = dvf.HeadTable.load(path)
            except UsageError as error:
                said.append(str(error))
            else:  # a byte that means nothing, such as a date
                assert back.kept == table.kept
                assert torch.equal(back.splits["id"].predicted, table.splits["id"].predicted)
        assert len(said) > 50
        assert all(str(path) in line and "\n" not in line for line in said)

    @pytest.mark.parametrize(
        ("member", "value", "message"),
        [
            ("0/entropy", np.array([[object()]]), "."),
            ("0/entropy", np.full((15, 20), np.nan, np.float32), "finite"),
            ("0/entropy", np.zeros((15, 20)), "float64"),
            ("0/entropy", np.zeros((15, 19), np.float32), "finite numbers"),
            ("0/predicted", np.full((15, 20), 2), "outside 0 to 1"),
            ("0/predicted", np.zeros((14, 20), np.int64), "shape"),
            ("1/labels", np.full(20, -1), "outside 0 to 1"),
            ("1/groups", np.full(20, 9), "outside 0 to"),
            ("1/groups", np.zeros(3, np.int64), "shape"),
            ("2/confidence", None, "no 2/confidence"),
            ("table", np.frombuffer(b"{}", np.uint8), "version"),
            ("table", np.frombuffer(b"[" * 10**5, np.uint8), "Recursion"),
        ],
    )
    def test_crafted_ones_are_refused(self, table, tmp_path, member, value, message):
        path = tmp_path / "t.npz"
        table.save(path)
        with np.load(path) as stored:
            arrays = {**stored, member: value}
        if value is None:
            del arrays[member]
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=message):
            dvf.HeadTable.load(path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"kept":[[[1,[0,1,2,3]]]', b'"kept":[[[1,[0,1,2]]]'),
            (b"[[1,[0]]]", b"[[1,[4]]]"),
            (b"[[1,[0]]]", b"[[2,[0]]]"),
            (b"[[1,[0,1]]]", b"[[1,[1,0]]]"),
            (b"[[1,[0]]]", b"[[1,[]]]"),
            (b'"search":"exhaustive"', b'"search":"all"'),
            (b'"splits":["id","ood"', b'"splits":["id","id"'),
            (b'"classes":2', b'"classes":true'),
        ],
    )
    def test_crafted_choices_are_refused(self, table, tmp_path, old, new):
        path = tmp_path / "t.npz"
        table.save(path)
        with np.load(path) as stored:
            arrays = dict(stored)
        text = arrays["table"].tobytes()
        assert old in text
        arrays["table"] = np.frombuffer(text.replace(old, new, 1), np.uint8)
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=r"^table: expected a file that HeadTable\.save wrote"):
            dvf.HeadTable.load(path)

    def test_compressed_ones_are_refused(self, table, tmp_path):
        path = tmp_path / "t.npz"
        table.save(path)
        with np.load(path) as stored:
            np.savez_compressed(path, **dict(stored))
        with pytest.raises(UsageError, match="is compressed"):
            dvf.HeadTable.load(path)

    def test_a_pickle_is_not_run(self, table, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the file ran code",))

        path = tmp_path / "t.npz"
        table.save(path)
        hidden = io.BytesIO()
        np.lib.format.write_array(hidden, np.array([Bomb()]), allow_pickle=True)
        with np.load(path) as stored:
            arrays = dict(stored)
        del arrays["0/labels"]
        np.savez(path, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("0/labels.npy", hidden.getvalue())
        with pytest.raises(UsageError, match="allow_pickle"):
            dvf.HeadTable.load(path)
