"""Image folders with groups: the published layouts give the same items, and mistakes are one line."""

import csv
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diversevit_fast.data import SPLITS, GroupFolder, from_wilds, group_accuracy, waterbirds
from diversevit_fast.errors import UsageError

Image = pytest.importorskip("PIL.Image")

PER_GROUP = {
    "train": (32, 4, 2, 12),
    "val": (6, 6, 4, 4),
    "test": (20, 20, 10, 10),
}  # y, place: 00 01 10 11
NUMBERS = {"train": 0, "val": 1, "test": 2}


def rows():
    """(number, file, split, y, place) of each image, as in the published files out of order."""
    found = []
    for split, counts in PER_GROUP.items():
        for group, count in enumerate(counts):
            found += [(split, *divmod(group, 2)) for _ in range(count)]
    found = [found[(7 * i) % len(found)] for i in range(len(found))]
    return [
        (i, f"{y:03}.Bird/Bird_{i:04}.png", split, y, place)
        for i, (split, y, place) in enumerate(found)
    ]


ROWS = rows()
HEADERS = {
    "group_DRO": ["img_id", "img_filename", "y", "split", "place", "place_filename"],
    "five": ["id", "filename", "split", "y", "a"],
}


def write_csv(path: Path, header: str, numbered: bool = True) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADERS[header])
        for i, name, split, y, place in ROWS:
            said = NUMBERS[split] if numbered else split
            five = [i, name, said, y, place]
            writer.writerow(five if header == "five" else [i, name, y, said, place, "/o/1.jpg"])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("birds")
    for i, name, *_ in ROWS:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB" if i % 3 else "L", (4, 3), color=i if i % 3 == 0 else (i, 2, 3)).save(
            folder / name
        )
    return folder


def layout(images: Path, folder: Path) -> Path:
    """The images, linked into ``folder``."""
    folder.mkdir(parents=True)
    for path in images.iterdir():
        os.symlink(path, folder / path.name)
    return folder


@pytest.fixture
def group_dro(images, tmp_path) -> Path:
    folder = layout(images, tmp_path / "cub/data/waterbird_complete95_forest2water2")
    write_csv(folder / "metadata.csv", "group_DRO")
    return tmp_path


def pixels(dataset, index):
    image, label, group = dataset[index]
    return image.mode, image.getpixel((0, 0)), label, group


class TestGroupFolder:
    def test_layouts_give_the_same_items(self, images, tmp_path):
        dro = layout(images, tmp_path / "waterbird_complete95_forest2water2")
        write_csv(dro / "metadata.csv", "group_DRO")
        write_csv(tmp_path / "metadata_waterbirds.csv", "five")
        write_csv(tmp_path / "words.csv", "five", numbered=False)
        folders = [
            {"root": dro},
            {"root": tmp_path, "metadata": "metadata_waterbirds.csv", "image_root": dro},
            {"root": dro, "metadata": tmp_path / "words.csv"},
        ]
        for split in ("train", "val", "test", None):
            first, *others = (GroupFolder(**options, split=split) for options in folders)
            parts = [PER_GROUP[split]] if split else PER_GROUP.values()
            assert first.counts.tolist() == [sum(x) for x in zip(*parts, strict=True)]
            for other in others:
                assert other.filenames == first.filenames
                assert torch.equal(other.groups, first.groups)
                assert [pixels(other, i) for i in range(len(other))] == [
                    pixels(first, i) for i in range(len(first))
                ]
        assert first.group_names == ("y=0, place=0", "y=0, place=1", "y=1, place=0", "y=1, place=1")
        assert other.group_names[3] == "y=1, a=1"

    def test_items(self, group_dro):
        root = group_dro / "cub/data/waterbird_complete95_forest2water2"
        data = GroupFolder(root, split="val", transform=lambda image: image.size)
        expected = [row for row in ROWS if row[2] == "val"]
        assert len(data) == len(expected) == 20
        for item, (_, _, _, y, place) in zip(
            [data[i] for i in range(len(data))], expected, strict=True
        ):
            assert item == ((4, 3), y, 2 * y + place)
        assert (data.num_classes, data.num_attributes, data.num_groups) == (2, 2, 4)
        plain = GroupFolder(root)
        assert {pixels(plain, i)[0] for i in range(6)} == {"RGB"}  # grey ones too

    def test_a_loader_takes_it(self, group_dro):
        root = group_dro / "cub/data/waterbird_complete95_forest2water2"
        data = GroupFolder(root, split="test", transform=lambda image: torch.tensor(image.size))
        images, labels, groups = next(iter(torch.utils.data.DataLoader(data, batch_size=8)))
        assert images.shape == (8, 2)
        assert torch.equal(groups // 2, labels)

    def test_groups_are_numbered_over_all_splits(self, images, tmp_path):
        """A training set without a group keeps its number free."""
        kept = [row for row in ROWS if not (row[2] == "train" and row[3:] == (1, 0))]
        lines = [
            "id,filename,split,y,a",
            *(",".join(map(str, (*row[:3], *row[3:]))) for row in kept),
        ]
        (tmp_path / "majority.csv").write_text("\n".join(lines))
        data = GroupFolder(images, tmp_path / "majority.csv", split="train")
        assert data.counts.tolist() == [32, 4, 0, 12]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda t: t.replace("img_filename", "file"),
                "metadata: expected a column filename or img_filename",
            ),
            (lambda t: t.replace(",y,", ",bird,"), "metadata: expected a column y"),
            (lambda t: t.replace("place,", "where,"), "metadata: expected a column a or place"),
            (lambda t: t.replace(",split,", ",part,"), "metadata: expected a column split"),
            (lambda t: t.replace(".png,0,", ".png,bird,", 1), "y: expected a whole number"),
            (lambda t: t.replace(".png,0,", ".png,-1,", 1), "y: expected a whole number"),
            (lambda t: t.replace(".png,0,", ".png,0.5,", 1), "y: expected a whole number"),
            (lambda t: t.replace(".png,0,0,", ".png,0,7,", 1), "split: expected 0, 1, 2"),
            (
                lambda t: t.replace(".png,0,2,", ".png,0,1,").replace(".png,1,2,", ".png,1,1,"),
                "split: expected one of",
            ),
            (
                lambda t: t.replace(".png,1,", ".png,0,"),
                "y: expected at least two different values",
            ),
            (lambda t: t.replace("Bird_", "Gull_"), "images of"),
            (lambda t: t.split("\n")[0] + "\n", "metadata: expected a row for each image"),
            (lambda t: t.replace(",/o/1.jpg", "", 1), "as many cells as columns"),
            (lambda t: t.replace(",/o/1.jpg", ",a,b", 1), "as many cells as columns"),
            (lambda t: t.replace("\n", '\n"', 1), "metadata: expected a CSV file"),
        ],
    )
    def test_a_damaged_file_is_one_line(self, change, said, group_dro):
        path = group_dro / "cub/data/waterbird_complete95_forest2water2/metadata.csv"
        text = path.read_text().replace("\r\n", "\n")
        assert change(text) != text
        path.write_text(change(text))
        with pytest.raises(UsageError) as caught:
            GroupFolder(path.parent, split="test")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", None])
    def test_a_damaged_image_is_one_line(self, content, images, tmp_path):
        folder = tmp_path / "copy"
        for _, name, *_ in ROWS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((images / name).read_bytes())
        write_csv(folder / "metadata.csv", "five")
        data = GroupFolder(folder)
        path = folder / data.filenames[5]
        path.write_bytes(path.read_bytes()[:40] if content is None else content)
        assert data[4]
        with pytest.raises(UsageError, match="images that can be decoded") as caught:
            data[5]
        assert str(path) in str(caught.value)

    def test_wrong_arguments(self, images, tmp_path):
        with pytest.raises(UsageError, match="split: expected train"):
            GroupFolder(images, split="valid")
        with pytest.raises(UsageError, match="metadata: expected a CSV file"):
            GroupFolder(tmp_path)
        (tmp_path / "latin.csv").write_bytes(b"id,filename,split,y,a\n1,\xff,0,0,0\n")
        with pytest.raises(UsageError, match="metadata: expected a CSV file"):
            GroupFolder(tmp_path, "latin.csv")


class TestWaterbirds:
    @pytest.mark.parametrize(
        "below", ["", "cub/data", "cub/data/waterbird_complete95_forest2water2"]
    )
    def test_five_splits(self, below, group_dro):
        if below == "cub/data":
            os.symlink(
                group_dro / below / "waterbird_complete95_forest2water2",
                group_dro / "waterbirds_v1.0",
            )
            below = ""
        splits = waterbirds(group_dro / below)
        assert tuple(splits) == SPLITS
        counts = {name: split.counts.tolist() for name, split in splits.items()}
        assert counts["val_id"] == [3, 0, 0, 1]
        assert counts["train"] == [29, 4, 2, 11]
        assert counts["val_ood"] == list(PER_GROUP["val"])
        assert counts["test_ood"] == list(PER_GROUP["test"])
        assert counts["test_id"] == [20, 2, 1, 7]  # 20 / 32 of the training set's

    def test_nothing_is_in_two_splits(self, group_dro):
        splits = waterbirds(group_dro, transform=lambda image: image.getpixel((0, 0))[0])
        seen = {name: [split[i][0] for i in range(len(split))] for name, split in splits.items()}
        assert not set(seen["train"]) & set(seen["val_id"])
        assert sorted(seen["train"] + seen["val_id"]) == sorted(
            row[0] for row in ROWS if row[2] == "train"
        )
        assert set(seen["test_id"]) < set(seen["test_ood"])

    def test_the_generator_decides_what_is_held_out(self, group_dro):
        def held(seed):
            return waterbirds(group_dro, generator=torch.Generator().manual_seed(seed))[
                "val_id"
            ].indices.tolist()

        assert held(1) == held(1)
        assert len({tuple(held(seed)) for seed in range(5)}) > 1

    def test_augmentation_is_of_training_images_alone(self, group_dro):
        splits = waterbirds(
            group_dro, transform=lambda _: "plain", train_transform=lambda _: "augmented"
        )
        assert {name: split[0][0] for name, split in splits.items()} == {
            **dict.fromkeys(SPLITS, "plain"),
            "train": "augmented",
        }

    def test_mistakes(self, tmp_path, group_dro):
        with pytest.raises(UsageError, match=r"root: expected metadata\.csv in one of"):
            waterbirds(tmp_path / "nowhere")
        for held_out in (0.0, 1.0, 1, "x"):
            with pytest.raises(UsageError, match="held_out"):
                waterbirds(group_dro, held_out=held_out)


def wilds_subset(split: str):
    """What WILDS' ``get_subset`` gives: see ``wilds.datasets.wilds_dataset.WILDSSubset``."""
    chosen = [row for row in ROWS if row[2] == split]

    class Subset:
        metadata_fields = ("background", "y", "from_source_domain")
        y_array = torch.tensor([row[3] for row in chosen])
        metadata_array = torch.tensor([(row[4], row[3], 1) for row in chosen])
        n_classes = 2
        dataset = SimpleNamespace(
            metadata_array=torch.tensor([(row[4], row[3], 1) for row in ROWS])
        )

        def __len__(self):
            return len(chosen)

        def __getitem__(self, i):
            return chosen[i][1], self.y_array[i], self.metadata_array[i]

    return Subset()


def test_a_subset_of_wilds_gives_the_same_groups(group_dro):
    ours = GroupFolder(group_dro / "cub/data/waterbird_complete95_forest2water2", split="test")
    theirs = from_wilds(wilds_subset("test"))
    assert torch.equal(theirs.groups, ours.groups)
    assert [theirs[i] for i in range(3)] == [(ours.filenames[i], *ours[i][1:]) for i in range(3)]
    assert theirs.group_names[1] == "y=0, background=1"
    with pytest.raises(UsageError, match="attribute: expected one of background"):
        from_wilds(wilds_subset("test"), "species")


class TestGroupAccuracy:
    def test_the_four_averages(self):
        """WILDS' formula: accuracy of each group, weighted by the training set's counts (3498, 184, 56, 1057)."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(2, (2000,), generator=generator)
        groups = 2 * labels + torch.randint(2, (2000,), generator=generator)
        logits = torch.randn(2000, 2, generator=generator) + labels[:, None] * torch.tensor(
            [0.0, 1.0]
        )
        train = torch.tensor([3498, 184, 56, 1057])
        hits = (logits.argmax(1) == labels).double()
        by_group = torch.stack([hits[groups == g].mean() for g in range(4)])
        found = group_accuracy(logits, labels, groups, train)
        assert torch.allclose(found.groups, by_group, rtol=0, atol=1e-12)
        assert found.worst_group == pytest.approx(float(by_group.min()), abs=1e-12)
        assert found.group_mean == pytest.approx(float(by_group.mean()), abs=1e-12)
        assert found.adjusted_average == pytest.approx(
            float((by_group * train / train.sum()).sum()), abs=1e-12
        )
        assert found.average == pytest.approx(float(hits.mean()), abs=1e-12)
        assert (
            len(
                {
                    round(x, 6)
                    for x in (
                        found.worst_group,
                        found.group_mean,
                        found.adjusted_average,
                        found.average,
                    )
                }
            )
            == 4
        )

    def test_groups_without_images(self):
        predictions, labels, groups = torch.tensor([[1, 1, 0], [1, 0, 0], [3, 0, 0]])
        found = group_accuracy(predictions, labels, groups, torch.tensor([4, 1, 1, 2]))
        assert found.counts.tolist() == [2, 0, 0, 1]
        assert found.groups[[0, 3]].tolist() == [0.5, 1.0]
        assert found.groups[[1, 2]].isnan().all()
        assert found.worst_group == 0.5
        assert found.group_mean == 0.75
        assert found.adjusted_average == pytest.approx((4 * 0.5 + 2) / 6)
        assert (
            group_accuracy(torch.tensor([1]), torch.tensor([1]), torch.tensor([0])).adjusted_average
            is None
        )

    @pytest.mark.parametrize(
        ("lengths", "train", "said"),
        [
            ((3, 2, 3), None, "one of each per image"),
            ((0, 0, 0), None, "at least one"),
            ((2, 2, 2), [1], "2 groups"),
        ],
    )
    def test_mistakes(self, lengths, train, said):
        predictions, labels, groups = (torch.arange(n) for n in lengths)
        with pytest.raises(UsageError, match=said):
            group_accuracy(
                predictions, labels, groups, None if train is None else torch.tensor(train)
            )
