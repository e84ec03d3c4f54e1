"""GarmentsPlaces: pairing, what lies over what, where the images come from, wrong files."""

import gzip
import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from diversevit_fast.data import SPLITS, GarmentsPlaces, load_splits, prepare_garments_places
from diversevit_fast.data.garments_places import cut_out
from diversevit_fast.errors import UsageError

COUNTS = {"train": 120, "test": 100}  # of each class and kind


def made_up(rng, kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with black borders (garments), or of one blue (places): brightness says the class and number."""
    labels = rng.permutation(np.repeat([0, 1], count)).astype(np.uint8)
    numbers = np.arange(2 * count, dtype=np.uint8)
    if kind == "places":
        images = np.zeros((2 * count, 32, 32, 3), np.uint8)
        images[..., 2] = (200 + labels)[:, None, None]
        images[..., 1] = numbers[:, None, None]
    else:
        images = np.zeros((2 * count, 28, 28), np.uint8)
        images[:, 4:24, 6:22] = (100 + labels)[:, None, None]
        images[:, 10, 10] = 0  # a hole
        images[:, 4, 6] = 16 + numbers % 200
    return images, labels


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    found = {}
    for kind in ("garments", "places"):
        for part, count in COUNTS.items():
            images, labels = made_up(rng, kind, count)
            found |= {f"{kind}_{part}_images": images, f"{kind}_{part}_labels": labels}
    return found


@pytest.fixture(scope="module")
def archive(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "sources.npz"
    np.savez(path, **arrays)
    return path


def test_the_five_splits(archive):
    splits = load_splits("garments-places", source=archive)
    assert tuple(splits) == SPLITS
    for name, split in splits.items():
        assert split.image_size == (32, 32) == tuple(split.images.shape[2:])
        assert torch.equal(split.groups, 2 * split.labels + split.places)
        assert split.group_names == (
            *("pullover + deer", "pullover + ship"),
            *("coat + deer", "coat + ship"),
        )
        agreement = (split.labels == split.places).double().mean()
        assert agreement == pytest.approx(0.5 if name.endswith("ood") else 0.9, abs=0.17)
        assert split.labels.double().mean() == 0.5
    assert len(splits["train"]) > 180
    assert load_splits("garments-places", source=archive, img_size=64)["val_id"].image_size[0] == 64


def test_every_pixel_is_the_garments_or_the_places(archive, arrays):
    for split in load_splits("garments-places", source=archive).values():
        part = "train" if split.split == "train" else "test"
        for i in range(len(split)):
            garment, place = int(split.garment_index[i]), int(split.place_index[i])
            assert arrays[f"garments_{part}_labels"][garment] == split.labels[i]
            assert arrays[f"places_{part}_labels"][place] == split.places[i]
            wanted = arrays[f"places_{part}_images"][place].copy()
            over = arrays[f"garments_{part}_images"][garment]
            wanted[6:26, 8:24] = over[4:24, 6:22, None]  # the hole as well
            assert (split.images[i].permute(1, 2, 0).numpy() == wanted).all()


def test_different_garments_and_places_are_counted(archive):
    for split in load_splits("garments-places", source=archive).values():
        counted = len(split.place_index.unique()), len(split.garment_index.unique())
        assert tuple(split.independent.values()) == counted
        assert list(split.independent) == ["places", "garments"]


def test_nothing_is_in_two_of_train_val_and_test(archive):
    splits = load_splits("garments-places", source=archive)
    for index in ("garment_index", "place_index"):
        val, test = (
            {i for kind in ("id", "ood") for i in getattr(splits[f"{role}_{kind}"], index).tolist()}
            for role in ("val", "test")
        )
        assert val
        assert not val & test


def test_the_seed_decides(archive):
    first, same, other = (
        GarmentsPlaces(archive, "val_id", generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.images, same.images)
    assert not torch.equal(first.garment_index, other.garment_index)


def test_holes_are_filled_within_an_image_alone():
    """A ring is filled; three stacked images of walls do not enclose what lies between them."""
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    images[0, 5:15, 5:15] = 90
    images[0, 8:12, 8:12] = 3
    images[1], images[3] = 50, 50  # everywhere
    images[2, 3] = 50
    mask = cut_out(images)[:, 1, 2:30, 2:30] == 255
    assert mask[0].sum() == 100
    assert mask[1].all()
    assert mask[2].sum() == 28
    assert not cut_out(images)[:, :, :2].any()


@pytest.fixture
def torchvision_root(tmp_path, monkeypatch):
    """Ten classes of both as torchvision keeps them; only the checksums are of our own."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(1)
    root = tmp_path / "torchvision"
    raw, batches = root / "FashionMNIST/raw", root / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    batches.mkdir()
    for prefix, count in (("train", 60), ("t10k", 40)):
        for what, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{prefix}-{what}-ubyte").write_bytes(header + array.tobytes())

    def batch(name, content):
        data = pickle.dumps(content)
        (batches / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def images(count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, "labels": rng.permutation(np.arange(count) % 10).tolist()}

    name, md5 = batch("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1", images(70))])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", images(50))])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


@pytest.fixture
def debian(torchvision_root, tmp_path):
    """The same garments as Debian's package has them, and no longer where torchvision does."""
    packed = tmp_path / "fashion-mnist"
    packed.mkdir()
    for path in (torchvision_root / "FashionMNIST/raw").iterdir():
        with gzip.open(packed / f"{path.name}.gz", "wb") as file:
            file.write(path.read_bytes())
    return packed


class TestPrepare:
    def test_the_right_classes(self, torchvision_root, debian, tmp_path):
        out = prepare_garments_places(torchvision_root, tmp_path / "a.npz")
        with np.load(out) as stored:
            raw = torchvision_root / "FashionMNIST/raw/t10k-images-idx3-ubyte"
            images = np.frombuffer(raw.read_bytes()[16:], np.uint8).reshape(-1, 28, 28)
            coats = stored["garments_test_images"][stored["garments_test_labels"] == 1]
            assert (coats == images[4::10]).all()
            pullovers = stored["garments_test_images"][stored["garments_test_labels"] == 0]
            assert (pullovers == images[2::10]).all()
            batch = torchvision_root / "cifar-10-batches-py/test_batch"
            first = pickle.loads(batch.read_bytes())
            ships = first["data"][np.array(first["labels"]) == 8]
            kept = stored["places_test_images"][stored["places_test_labels"] == 1]
            assert (kept == ships.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).all()
            assert (stored["places_train_labels"] == 0).sum() == 7
        direct = GarmentsPlaces(torchvision_root, "train")
        assert torch.equal(direct.images, GarmentsPlaces(out, "train").images)
        shutil.rmtree(torchvision_root / "FashionMNIST")
        again = prepare_garments_places(torchvision_root, tmp_path / "b.npz", garments=debian)
        assert again.read_bytes() == out.read_bytes()

    def test_the_command(self, torchvision_root, debian, tmp_path, capsys):
        pytest.importorskip("typer")
        from diversevit_fast.experiment.cli import main

        arguments = [
            *("data", "prepare", "--data", "garments-places", "--root", str(torchvision_root)),
            *("--garments", str(debian), "--out", str(tmp_path / "new.npz")),
        ]
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert len(GarmentsPlaces(tmp_path / "new.npz", "train")) > 0
        for change, said in (
            ({"garments-places": "mnist-cifar"}, "garments: expected nothing for mnist-cifar"),
            ({"garments-places": "imagenet"}, "data: expected one of mnist-cifar, garments"),
        ):
            with pytest.raises(SystemExit) as exit_:
                main([change.get(word, word).replace("new.npz", "x.npz") for word in arguments])
            assert exit_.value.code == 2
            assert f"error: {said}" in capsys.readouterr().err
        assert not (tmp_path / "x.npz").exists()

    def test_wrong_sources(self, torchvision_root, debian, archive, arrays, tmp_path):
        def refused(call, said):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(UsageError) as caught:
                call()
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
            assert sorted(tmp_path.rglob("*")) == before

        new = tmp_path / "new.npz"
        refused(
            lambda: prepare_garments_places(tmp_path / "nowhere", new),
            "root: expected a folder with torchvision's FashionMNIST",
        )
        path = debian / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-9])
        refused(
            lambda: prepare_garments_places(torchvision_root, new, garments=debian),
            "garments: expected whole files",
        )
        path.unlink()
        refused(
            lambda: prepare_garments_places(torchvision_root, new, garments=debian),
            "t10k-labels-idx1-ubyte.gz: expected a file that can be read",
        )
        refused(lambda: GarmentsPlaces(tmp_path / "none.npz"), "which does not exist")
        refused(
            lambda: load_splits("garments-places"), "source: expected an .npz file or a torchvision"
        )
        for key, value, said in (
            ("places_train_images", arrays["places_train_images"][:, :28], "uint8 [n, 32, 32, 3]"),
            ("garments_train_labels", arrays["garments_train_labels"] + 1, "labels of 0 or 1"),
            ("garments_train_labels", arrays["garments_train_labels"][1:], "as many garments_tr"),
        ):
            np.savez(tmp_path / "bad.npz", **{**arrays, key: value})
            refused(lambda: GarmentsPlaces(tmp_path / "bad.npz"), said)
