"""Cut-outs over backgrounds: every pixel, every count, disjoint sources, whole sets or none."""

import csv
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diversevit_fast.data import GroupFolder, compose, compose_folder, load_splits, waterbirds
from diversevit_fast.errors import UsageError

Image = pytest.importorskip("PIL.Image")

SPLIT_NAMES = ("train", "val", "test")
BIRDS = {"land": (200, 0), "water": (0, 200)}  # red and green of every cut-out of a class
PLACES = {"a_meadow": 50, "b_sea": 150}  # green of every photograph of a place


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of six species (one of two images) and seven photographs each; blue says which."""
    root = tmp_path_factory.mktemp("sources")
    for kind, (red, green) in BIRDS.items():
        (root / "birds" / kind / "twice").mkdir(parents=True)
        names = [f"one{i}.png" for i in range(5)] + ["twice/left.png", "twice/right.png"]
        for i, name in enumerate(names):
            image = Image.new("RGBA", (12, 9), (red, green, 30 * i, 0))
            image.paste((red, green, 30 * i, 255), (3, 2, 9, 8))
            image.save(root / "birds" / kind / name)
    for kind, green in PLACES.items():
        (root / "places" / kind).mkdir(parents=True)
        for i in range(7):
            colour = (0, green, 20 * i)
            Image.new("RGB", (40, 30), colour).save(root / "places" / kind / f"photo{i}.png")
    return root / "birds", root / "places"


SMALL = {"images": {"train": 80, "val": 24, "test": 40}, "img_size": 16}


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("sets") / "mini"
    return out, compose_folder(*sources, out, correlation=0.9, **SMALL)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> torch.Tensor:
    image = Image.open(path)
    assert image.mode == "RGB"
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).long()


class TestCompose:
    @given(
        st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.sampled_from([(), (2,)])
    )
    def test_rounds_the_weighted_mean(self, fore, opacity, back, batch):
        def full(value, channels):
            return torch.full((*batch, channels, 2, 3), value, dtype=torch.uint8)

        laid = compose(full(fore, 3), full(opacity, 1), full(back, 3))
        assert laid.shape == (*batch, 3, 2, 3)
        exact = (opacity * fore + (255 - opacity) * back) / 255
        assert (laid.double() - exact).abs().max() <= 0.5

    def test_each_pixel_has_its_own_opacity(self):
        generator = torch.Generator().manual_seed(0)
        fore, back = torch.randint(256, (2, 3, 4, 5), generator=generator, dtype=torch.uint8)
        mask = torch.zeros(1, 4, 5, dtype=torch.uint8)
        mask[0, 1, 2:] = 255
        laid = compose(fore, mask, back)
        assert torch.equal(laid[:, 1, 2:], fore[:, 1, 2:])
        rest = mask.expand(3, -1, -1) == 0
        assert torch.equal(laid[rest], back[rest])

    @pytest.mark.parametrize(
        ("shapes", "said"),
        [
            (((3, 4, 4), (1, 4, 4), (3, 4, 5)), "foreground, mask, background: expected"),
            (((3, 4, 4), (3, 4, 4), (3, 4, 4)), "foreground, mask, background: expected"),
            (((2, 3, 4, 4), (1, 4, 4), (2, 3, 4, 4)), "foreground, mask, background: expected"),
        ],
    )
    def test_shapes_that_do_not_fit(self, shapes, said):
        with pytest.raises(UsageError, match=said):
            compose(*(torch.zeros(shape, dtype=torch.uint8) for shape in shapes))

    def test_dtypes(self):
        images = torch.zeros(3, 4, 4, dtype=torch.uint8)
        with pytest.raises(UsageError, match="mask: expected a tensor of dtype uint8"):
            compose(images, torch.ones(1, 4, 4), images)


class TestComposeFolder:
    def test_counts_of_groups(self, made):
        """In training 36 of the 40 images of a class are over its place; elsewhere half of them."""
        out, record = made
        names = [f"{bird} + {place}" for bird in BIRDS for place in PLACES]
        wanted = {"train": (36, 4, 4, 36), "val": (6, 6, 6, 6), "test": (10, 10, 10, 10)}
        rows = table(out)
        for number, split in enumerate(SPLIT_NAMES):
            here = [(int(r["y"]), int(r["place"])) for r in rows if int(r["split"]) == number]
            counts = tuple(here.count((y, p)) for y in (0, 1) for p in (0, 1))
            assert counts == wanted[split]
            assert record["splits"][split]["images"] == dict(zip(names, counts, strict=True))

    def test_every_image_shows_its_label_and_place(self, made):
        """The corner is the place's photograph, and the only other colour is the cut-out's."""
        out, _ = made
        for row in table(out):
            image = pixels(out / row["img_filename"])
            assert image.shape == (16, 16, 3)
            blue = 20 * int(row["place_filename"].removesuffix(".png")[-1])
            behind = torch.tensor((0, list(PLACES.values())[int(row["place"])], blue))
            is_behind = (image == behind).all(-1)
            bird = torch.tensor(list(BIRDS.values())[int(row["y"])])
            is_bird = (image[..., :2] == bird).all(-1)
            assert is_behind.sum() >= 16 * 16 * 0.2
            assert 7 * 7 <= is_bird.sum() <= 15 * 15  # half to .85 of the side
            rows, columns = is_bird.any(1).nonzero(), is_bird.any(0).nonzero()
            height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
            assert height * width == is_bird.sum()  # a whole rectangle

    def test_sources_are_in_one_split_alone(self, made):
        out, record = made
        for what, kinds in (("species", BIRDS), ("photographs", PLACES)):
            for kind in kinds:
                said = [record["splits"][split][what][kind] for split in SPLIT_NAMES]
                names = [name for of in said for name in of["names"]]
                assert len(set(names)) == len(names) == (6 if what == "species" else 7)
                assert [of["count"] for of in said] == [3, 1, 2 if what == "species" else 3]
        used = {}
        for row in table(out):
            used.setdefault((row["place"], row["place_filename"]), set()).add(row["split"])
        assert len(used) == 14  # all
        assert all(len(splits) == 1 for splits in used.values())
        said = json.loads((out / "composition.json").read_text())
        assert said == json.loads(json.dumps(record))

    def test_species_stay_together_and_all_are_used(self, made):
        out, _ = made
        seen = {}
        for row in table(out):
            image = pixels(out / row["img_filename"])
            bird = torch.tensor(list(BIRDS.values())[int(row["y"])])
            blues = image[(image[..., :2] == bird).all(-1)][:, 2]
            seen.setdefault((row["y"], min(5, int(blues.median()) // 30)), set()).add(row["split"])
        assert len(seen) == 12
        assert all(len(splits) == 1 for splits in seen.values())

    def test_sizes_and_places_vary(self, made):
        out, _ = made
        corners = set()
        for row in table(out)[:40]:
            image = pixels(out / row["img_filename"])
            bird = torch.tensor(list(BIRDS.values())[int(row["y"])])
            found = (image[..., :2] == bird).all(-1).nonzero()
            corners.add((*found.min(0).values.tolist(), *found.max(0).values.tolist()))
        assert len(corners) > 20

    def test_the_seed_decides(self, sources, made, tmp_path):
        out, _ = made
        compose_folder(*sources, tmp_path / "same", correlation=0.9, **SMALL)
        files = [path for path in out.rglob("*") if path.is_file()]
        assert len(files) == 80 + 24 + 40 + 2
        for path in files:
            assert path.read_bytes() == (tmp_path / "same" / path.relative_to(out)).read_bytes()
        compose_folder(*sources, tmp_path / "other", correlation=0.9, seed=1, **SMALL)
        assert (tmp_path / "other/metadata.csv").read_text() != (out / "metadata.csv").read_text()

    def test_read_back(self, made):
        out, _ = made
        splits = waterbirds(out)
        assert splits["val_ood"].counts.tolist() == [6, 6, 6, 6]
        assert splits["val_id"].counts.tolist() == [4, 0, 0, 4]
        assert splits["test_id"].counts.tolist() == [10, 1, 1, 10]
        tensors = load_splits("folder", source=out)["test_ood"]
        file = GroupFolder(out, split="test").filenames[3]
        assert torch.equal(tensors.images[3].permute(1, 2, 0).long(), pixels(out / file))

    def test_three_classes(self, sources, tmp_path):
        birds, places = sources
        for new, old in (("birds", birds / "land"), ("places", places / "b_sea")):
            (tmp_path / new).mkdir()
            for kind in (birds if new == "birds" else places).iterdir():
                os.symlink(kind, tmp_path / new / kind.name)
            os.symlink(old, tmp_path / new / "z_third")
        record = compose_folder(
            *(tmp_path / "birds", tmp_path / "places", tmp_path / "out"), correlation=0.8, **SMALL
        )
        assert list(record["splits"]["train"]["images"].values()) == [
            *(22, 3, 2),  # of 27, of which 21.6 are to agree
            *(3, 22, 2),
            *(3, 2, 21),  # of 26
        ]
        assert list(record["splits"]["val"]["images"].values())[:3] == [3, 3, 2]


class TestWholeOrNothing:
    def refused(self, sources, tmp_path, said, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError) as caught:
            compose_folder(*sources, tmp_path / "out", **{**SMALL, **options})
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("after", [0, 1, 30])
    @pytest.mark.parametrize("where", ["composing", "flushing"])
    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt])
    def test_stopped_in_between(self, after, where, failure, sources, tmp_path, monkeypatch):
        calls = []

        def failing(function):
            def call(*arguments):
                calls.append(arguments)
                if len(calls) > after:
                    raise failure
                return function(*arguments)

            return call

        module = sys.modules["diversevit_fast.data.compose_folder"]
        if where == "composing":
            monkeypatch.setattr(module, "_png", failing(module._png))
        else:
            monkeypatch.setattr(os, "fsync", failing(os.fsync))
        wanted = KeyboardInterrupt if failure is KeyboardInterrupt else UsageError
        with pytest.raises(wanted) as caught:
            compose_folder(*sources, tmp_path / "out", **SMALL)
        assert len(calls) == after + 1
        assert not list(tmp_path.iterdir())
        assert failure is KeyboardInterrupt or "No space left" in str(caught.value)

    def test_an_existing_folder_is_kept(self, sources, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        self.refused(sources, tmp_path, "out: expected a new folder")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"correlation": 1.5}, "correlation: expected a number in [0, 1]"),
            ({"correlation": True}, "correlation: expected a number in [0, 1]"),
            ({"images": {"train": 3}}, "train: expected a whole number from 4"),
            ({"images": {"trane": 8}}, "images: expected splits among train, val, test"),
            ({"img_size": 4}, "img_size: expected a whole number from 8"),
            ({"seed": -1}, "seed: expected a whole number from 0"),
        ],
    )
    def test_wrong_arguments(self, options, said, sources, tmp_path):
        self.refused(sources, tmp_path, said, **options)

    def test_wrong_folders(self, sources, tmp_path):
        birds, places = sources
        self.refused((tmp_path / "no", places), tmp_path, "foregrounds: expected a folder")
        self.refused((birds, birds / "land"), tmp_path, "at least 3 photographs in")
        (tmp_path / "empty").mkdir()
        self.refused((birds, tmp_path / "empty"), tmp_path, "backgrounds: expected at least two")
        for kind in ("a", "b", "c"):
            os.symlink(places / "b_sea", tmp_path / "empty" / kind)
        self.refused((birds, tmp_path / "empty"), tmp_path, "as many places as classes")

    def test_wrong_images(self, sources, tmp_path):
        birds, places = sources
        self.refused((places, places), tmp_path, "foregrounds: expected images with an alpha")
        (tmp_path / "birds/b").mkdir(parents=True)
        os.symlink(birds / "land", tmp_path / "birds/a")
        for i in range(3):
            Image.new("RGBA", (5, 5)).save(tmp_path / f"birds/b/{i}.png")
        self.refused((tmp_path / "birds", places), tmp_path, "foregrounds: expected an opaque pix")
        for i in range(3):
            (tmp_path / f"birds/b/{i}.png").write_bytes(b"\x89PNG\r\n")
        self.refused((tmp_path / "birds", places), tmp_path, "images that can be decoded")


def test_the_command(sources, tmp_path, capsys):
    pytest.importorskip("typer")
    from diversevit_fast.experiment.cli import main

    birds, places = sources
    arguments = [
        *("data", "compose", "--foregrounds", str(birds), "--backgrounds", str(places)),
        *("--out", str(tmp_path / "out"), "--correlation", "0.75", "--img-size", "8"),
        *("--train", "16", "--val", "8", "--test", "8"),
    ]
    for code in (0, 2):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == code
        said = capsys.readouterr()
        if code == 0:
            assert "train: species: land 3, water 3" in said.out
            assert "test: photographs: a_meadow 3, b_sea 3" in said.out
            groups = "land + a_meadow 6, land + b_sea 2, water + a_meadow 2, water + b_sea 6"
            assert f"train: images: {groups}" in said.out
    assert said.err.startswith("error: out: expected a new file")
    assert GroupFolder(tmp_path / "out", split="train").counts.tolist() == [6, 2, 2, 6]


MINI_BIRDS = os.environ.get("DIVERSEVIT_MINI_BIRDS", "")


@pytest.mark.skipif(not MINI_BIRDS, reason="DIVERSEVIT_MINI_BIRDS does not name the folder")
def test_mini_birds():
    """The recipe of docs/data.md: 9 kinds of water birds, 19 of land birds, 3 and 4 photographs."""
    root = Path(MINI_BIRDS)
    record = json.loads((root / "composition.json").read_text())
    for what, wanted in (
        ("species", {"landbird": 19, "waterbird": 9}),
        ("photographs", {"land": 4, "water": 3}),
    ):
        for kind, count in wanted.items():
            names = [n for s in record["splits"].values() for n in s[what][kind]["names"]]
            assert len(names) == len(set(names)) == count
    for name, split in load_splits("folder", source=root, img_size=32).items():
        assert split.images.float().std() > 20, name
        assert split.num_classes == 2
