"""Dominoes: the pairing, disjoint splits, and damaged sources."""

import copy
import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from diversevit_fast.data import (
    MNISTCIFAR,
    SPLITS,
    DigitsPhotos,
    batches,
    load_splits,
    prepare_mnist_cifar,
)
from diversevit_fast.data.digits_photos import equalize
from diversevit_fast.data.dominoes import pair, part_of, stream
from diversevit_fast.errors import UsageError

REAL = Path(__file__).parents[3] / "shared/data/mnist_cifar_sources.npz"
PER_CLASS = {  # deliberately unequal
    "mnist_train": (700, 760),
    "mnist_test": (520, 500),
    "cifar_train": (650, 640),
    "cifar_test": (505, 515),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def synthetic_arrays() -> dict[str, np.ndarray]:
    """Noise images with classes in random order, in the form of the prepared archive."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, counts in PER_CLASS.items():
        shape = (28, 28) if name.startswith("mnist") else (32, 32, 3)
        arrays[f"{name}_images"] = rng.integers(0, 256, (sum(counts), *shape), dtype=np.uint8)
        arrays[f"{name}_labels"] = rng.permutation(np.repeat([0, 1], counts)).astype(np.uint8)
    return arrays


@pytest.fixture(scope="module")
def arrays():
    return synthetic_arrays()


@pytest.fixture(scope="module")
def archive(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("sources") / "sources.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def digits_photos():
    return load_splits("digits-photos")


@pytest.fixture(scope="module")
def mnist_cifar(archive):
    return load_splits("mnist-cifar", source=archive)


@pytest.fixture(params=["digits-photos", "mnist-cifar"])
def splits(request):
    return request.getfixturevalue(request.param.replace("-", "_"))


def assert_law(dataset, correlation):
    """Labels balanced exactly; the digit agrees with probability ``correlation`` in each class."""
    assert torch.bincount(dataset.labels).tolist() == [len(dataset) // 2] * 2
    assert dataset.groups.equal(2 * dataset.labels + dataset.digits)
    for label in (0, 1):
        agree = (dataset.digits == label)[dataset.labels == label].double()
        sd = (correlation * (1 - correlation) / len(agree)) ** 0.5
        assert abs(agree.mean().item() - correlation) <= 4 * sd


def test_law(splits):
    assert tuple(splits) == SPLITS
    for name, dataset in splits.items():
        assert dataset.split == name
        assert dataset.correlation == (0.5 if name.endswith("ood") else 0.9)
        assert_law(dataset, dataset.correlation)


def digit_for_label(dataset):
    dataset.labels = dataset.digits


def no_flips(dataset):
    dataset.digits = dataset.labels
    dataset.groups = 3 * dataset.labels


def flips_of_the_other_kind(dataset):
    dataset.digits = dataset.labels ^ (torch.rand(len(dataset), generator=seeded()) < 0.5).long()
    dataset.groups = 2 * dataset.labels + dataset.digits


def digit_first_in_group(dataset):
    dataset.groups = 2 * dataset.digits + dataset.labels


def unbalanced(dataset):
    for name in ("images", "labels", "digits", "groups"):
        setattr(dataset, name, getattr(dataset, name)[1:])


@pytest.mark.parametrize(
    "wrong", [digit_for_label, no_flips, flips_of_the_other_kind, digit_first_in_group, unbalanced]
)
def test_law_bites(splits, wrong):
    dataset = copy.copy(splits["train"])
    wrong(dataset)
    with pytest.raises(AssertionError):
        assert_law(dataset, dataset.correlation)


@settings(max_examples=60, deadline=None)
@given(
    correlation=st.floats(0, 1),
    per_class=st.integers(200, 500),
    photos=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    seed=st.integers(0, 2**32),
)
def test_pair(correlation, per_class, photos, seed):
    digit_classes = torch.tensor([0, 1]).repeat(per_class)
    photo_classes = torch.cat([torch.zeros(photos[0]), torch.ones(photos[1])]).long()
    pairs = pair(digit_classes, photo_classes, correlation, seeded(seed))
    labels, digits = photo_classes[pairs.photo], digit_classes[pairs.digit]
    n = len(labels)
    assert 0 < n <= 2 * min(photos)
    assert torch.bincount(labels, minlength=2).tolist() == [n // 2, n // 2]
    assert len(pairs.digit.unique()) == len(pairs.photo.unique()) == n
    agreement = (labels == digits).double().mean().item()
    if correlation in (0, 1):
        assert agreement == correlation
    assert abs(agreement - correlation) <= 4 / n**0.5  # Hoeffding: missed once in 10^13


def test_piles_are_truncated_to_the_smallest():
    digit_classes = torch.tensor([0, 1]).repeat(50)
    photo_classes = torch.tensor([0] * 7 + [1] * 30)
    assert len(pair(digit_classes, photo_classes, 1.0, seeded()).photo) == 14
    assert len(pair(digit_classes[:10], photo_classes, 1.0, seeded()).photo) == 10
    assert len(pair(digit_classes, photo_classes, 1.0, seeded(), samples=4).photo) == 4


def test_parts_are_balanced_and_complementary():
    classes = torch.tensor([0] * 50 + [1] * 80)
    val, test = (part_of(classes, share, seeded()) for share in ((0, 0.2), (0.2, 1)))
    assert (len(val), len(test)) == (20, 80)
    assert classes[val].sum() == 10
    assert classes[test].sum() == 40
    assert not set(val.tolist()) & set(test.tolist())


def same_bits(a, b):
    fields = ("images", "labels", "digits", "groups", "digit_index", "photo_index")
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in fields)


@pytest.mark.parametrize("kind", ["digits-photos", "mnist-cifar"])
def test_a_split_depends_on_the_seed_alone(kind, archive):
    def make(split, generator):
        if kind == "digits-photos":
            return DigitsPhotos(split, samples=60, generator=generator)
        return MNISTCIFAR(archive, split, samples=60, generator=generator)

    before = torch.get_rng_state()
    alone = {split: make(split, seeded(3)) for split in SPLITS}
    shared = seeded(3)
    torch.rand(5, generator=shared)  # the state does not matter, the seed does
    for split in reversed(SPLITS):
        assert same_bits(alone[split], make(split, shared))
    assert not same_bits(alone["train"], make("train", seeded(4)))
    assert same_bits(make("train", None), make("train", seeded(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_streams_are_seeded_as_documented():
    digest = hashlib.sha256(b"7/val_ood").digest()
    assert stream(seeded(7), "val_ood").initial_seed() == int.from_bytes(digest[:4], "little")


def overlap(a, b, field):
    return set(getattr(a, field).tolist()) & set(getattr(b, field).tolist())


@pytest.mark.parametrize("field", ["digit_index", "photo_index"])
def test_val_and_test_are_disjoint(splits, field):
    for val in ("val_id", "val_ood"):
        for test in ("test_id", "test_ood"):
            assert not overlap(splits[val], splits[test], field)


def test_digits_photos_train_is_disjoint_too(digits_photos):
    for other in SPLITS[1:]:
        assert not overlap(digits_photos["train"], digits_photos[other], "digit_index")


def pixels(corners):
    """How often each pixel of the two photographs [2, 427, 640] lies in a tile with one of the corners."""
    step = torch.arange(16)
    window = corners[:, None, None] + step[:, None] * 640 + step
    return torch.bincount(window.flatten(), minlength=2 * 427 * 640).view(2, 427, 640)


@pytest.mark.parametrize("seed", [0, 1])
def test_digits_photos_shares_no_pixel(seed):
    splits = load_splits("digits-photos", seed=seed)
    train, val, test = (
        pixels(torch.cat([d.photo_index for n, d in splits.items() if n.startswith(role)]).unique())
        for role in ("train", "val", "test")
    )
    for seen in (train, val, test):  # both photographs, top to bottom
        assert seen[:, :140].any(-1).any(-1).all()
        assert seen[:, 285:].any(-1).any(-1).all()
    assert not ((train > 0) & (val > 0)).any()
    assert not ((train > 0) & (test > 0)).any()
    assert not ((val > 0) & (test > 0)).any()
    assert max(val.max(), test.max()) == 1 < train.max()  # only training tiles overlap
    off_the_grid = pixels(splits["test_id"].photo_index + 32)
    assert ((train > 0) & (off_the_grid > 0)).any()


def test_val_and_test_of_digits_photos_show_the_same_kind_of_places():
    """Over seeds, a place is as likely to be in val as its share says: no part of the scene is reserved."""
    seen = []
    for seed in range(12):
        split = DigitsPhotos("val_ood", samples=160, generator=seeded(seed))
        seen.append(pixels(split.photo_index)[:, :416] > 0)
    often = torch.stack(seen).float().mean(0)
    assert often.max() < 0.85
    textured = often[1].view(13, 32, 20, 32).amax((1, 3)) > 0  # cells of one photograph
    elsewhere = torch.stack(seen[:6]).any(0)[1].view(13, 32, 20, 32).amax((1, 3))
    assert (textured & ~elsewhere).any()  # seeds differ
    by_quarter = often.view(2, 2, 208, 640).sum((2, 3))
    assert (by_quarter > 0.1 * by_quarter.sum(1, keepdim=True)).all()


def test_independent_images_are_counted(splits):
    for name, dataset in splits.items():
        digits, photographs = dataset.digit_index.unique(), dataset.photo_index.unique()
        assert dataset.independent["digits"] == len(digits)
        if isinstance(dataset, DigitsPhotos) and name == "train":
            index = photographs
            photo, top, left = index // (427 * 640), index // 640 % 427, index % 640
            cells = torch.stack([photo, top // 32, left // 32]).unique(dim=1)
            assert dataset.independent["photographs"] == 4 * cells.shape[1]
        else:
            assert dataset.independent["photographs"] == len(photographs) <= len(dataset)


def test_the_page_counts_what_the_splits_show(digits_photos):
    page = (Path(__file__).parents[2] / "docs/data.md").read_text("utf-8")
    for name, dataset in digits_photos.items():
        row = next(line for line in page.splitlines() if f"`{name}`" in line and "| " in line[-8:])
        shown = dataset.independent
        numbers = [len(dataset), shown["photographs"], shown["digits"]]
        assert [int(cell) for cell in row.split("|")[2:5]] == numbers


def test_tiles_return_with_new_grain():
    dataset = DigitsPhotos("test_ood", samples=1200)
    assert len(dataset) == 1200
    assert 300 <= dataset.independent["photographs"] <= 600
    _, twin, count = dataset.photo_index.unique(return_inverse=True, return_counts=True)
    assert 2 <= count.min() <= count.max() <= 4
    alike = []
    for tile in range(100):
        one, other = dataset.images[twin == tile][:2, 0, 32:].float()
        assert not one.equal(other)
        alike.append(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
    others = dataset.images[:200, 0, 32:].flatten(1).float()
    assert torch.stack(alike).median() > 0.8 > torch.corrcoef(others).abs().median()


@pytest.mark.parametrize("split", ["train", "val_ood", "test_id"])
def test_a_tile_returns_so_often_and_no_more(split):
    refused(lambda: DigitsPhotos(split, samples=10**5), "samples: expected at most ")


def test_id_and_ood_are_the_same_sources_flipped_anew(splits, arrays):
    for role in ("val", "test"):
        there, elsewhere = splits[f"{role}_id"], splits[f"{role}_ood"]
        if isinstance(there, DigitsPhotos):
            assert there.photo_index.sort().values.equal(elsewhere.photo_index.sort().values)
            pool = {"val": 2 * 36, "test": 2 * 71}[role]
        else:
            share = {"val": 0.2, "test": 0.8}[role]
            photos = set(there.photo_index.tolist()) | set(elsewhere.photo_index.tolist())
            assert len(photos) <= 2 * round(share * min(PER_CLASS["cifar_test"]))
            pool = 2 * round(share * min(PER_CLASS["mnist_test"]))
        digits = set(there.digit_index.tolist()) | set(elsewhere.digit_index.tolist())
        assert len(digits) <= pool
        assert len(overlap(there, elsewhere, "digit_index")) > 0.8 * pool


def test_layout_of_mnist_cifar(mnist_cifar, arrays):
    for name, dataset in mnist_cifar.items():
        part = "train" if name == "train" else "test"
        digits, photos = dataset.images[:, :, :32], dataset.images[:, :, 32:].permute(0, 2, 3, 1)
        rows = dataset.digit_index.numpy()
        for channel in range(3):
            drawn = digits[:, channel, 2:30, 2:30].numpy()
            assert (drawn == arrays[f"mnist_{part}_images"][rows]).all()
        assert digits.sum() == digits[:, :, 2:30, 2:30].sum()  # the padding is black
        assert (dataset.digits.numpy() == arrays[f"mnist_{part}_labels"][rows]).all()
        rows = dataset.photo_index.numpy()
        assert (photos.numpy() == arrays[f"cifar_{part}_images"][rows]).all()
        assert (dataset.labels.numpy() == arrays[f"cifar_{part}_labels"][rows]).all()


def test_layout_of_digits_photos(digits_photos):
    from sklearn.datasets import load_digits

    small, classes = load_digits(n_class=2, return_X_y=True)
    dataset = digits_photos["val_id"]
    rows = dataset.digit_index.numpy()
    large = np.kron(np.round(small[rows].reshape(-1, 8, 8) * 255 / 16), np.ones((4, 4)))
    assert (dataset.images[:, 0, :32].numpy() == large).all()
    assert (dataset.digits.numpy() == classes[rows]).all()
    assert dataset.labels.equal(dataset.photo_index // (427 * 640))
    assert (dataset.images == dataset.images[:, :1]).all()  # grey


@pytest.mark.parametrize("source", ["synthetic", *(["real"] if REAL.exists() else [])])
def test_sizes_names_and_items(source, archive):
    dataset = MNISTCIFAR(archive if source == "synthetic" else REAL, "test_ood", samples=600)
    image, label, group = dataset[5]
    assert (image.dtype, image.shape) == (torch.float32, (3, 64, 32))
    assert (type(label), type(group)) == (int, int)
    assert torch.equal((image * 255).round().byte(), dataset.images[5])
    assert (label, group) == (dataset.labels[5], dataset.groups[5])
    assert (len(dataset), dataset.image_size, dataset.num_classes) == (600, (64, 32), 2)
    assert dataset.group_names == ("automobile + 0", "automobile + 1", "truck + 0", "truck + 1")
    with pytest.raises(IndexError):
        dataset[600]


def test_default_sizes(digits_photos, mnist_cifar):
    assert [len(d) for d in digits_photos.values()] == [3000, 160, 160, 320, 320]
    for name, dataset in digits_photos.items():
        assert name == "train" or dataset.independent["photographs"] == len(dataset)
    assert 1200 <= len(mnist_cifar["train"]) <= 2 * 640  # the smallest pile of photographs


def photograph(dataset):
    return dataset.images[:, 0, 32:]


def test_every_patch_has_the_same_histogram(digits_photos):
    for dataset in digits_photos.values():
        values = photograph(dataset).flatten(1).sort(dim=1).values
        assert (values == torch.arange(1024) // 4).all()


def test_equalize_keeps_the_order_of_strong_contrasts():
    ramp = torch.arange(1024, dtype=torch.float64).view(1, 32, 32) * 0.01 + 5
    patch = equalize(ramp, seeded()).double()
    assert patch[0, 24:].mean() > patch[0, :8].mean() + 100


def accuracy(features, target, digits_photos):
    """The accuracy on ``test_ood`` of a logistic regression trained on ``train``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    train, test = digits_photos["train"], digits_photos["test_ood"]
    model.fit(features(train)[:1500], getattr(train, target)[:1500])
    return model.score(features(test), getattr(test, target))


def moments(dataset):
    grey = photograph(dataset).double()
    return torch.stack([grey.mean((1, 2)), grey.std((1, 2))], dim=1).numpy()


def roughness(dataset):
    grey = photograph(dataset).double()
    return torch.stack([grey.diff(dim=d).abs().mean((1, 2)) for d in (1, 2)], dim=1).numpy()


@pytest.mark.parametrize(
    ("features", "target", "low", "high"),
    [
        (lambda d: d.images[:, 0, :32].flatten(1).numpy(), "digits", 0.98, 1),
        (moments, "labels", 0.4, 0.6),
        (lambda d: photograph(d).flatten(1).numpy(), "labels", 0.4, 0.6),
        (roughness, "labels", 0.7, 0.85),
    ],
    ids=["digit-pixels", "photograph-moments", "photograph-pixels", "photograph-roughness"],
)
def test_the_digit_is_easier_than_the_photograph(features, target, low, high, digits_photos):
    """Linear in the pixels: the digit only. Two roughness numbers carry over to unseen regions."""
    assert low <= accuracy(features, target, digits_photos) <= high


def test_data_loader_and_batches_agree(splits):
    dataset = splits["val_ood"]
    ours = list(batches(dataset, 56))
    theirs = list(DataLoader(dataset, batch_size=56))
    assert [len(labels) for _, labels, _ in ours][-1] == len(dataset) % 56 > 0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_batches_shuffle_if_and_only_if_a_generator_is_given(mnist_cifar):
    dataset = mnist_cifar["test_id"]
    generator = seeded(1)

    def epoch(generator):
        return torch.cat([images for images, _, _ in batches(dataset, 100, generator=generator)])

    plain, first, second = epoch(None), epoch(generator), epoch(generator)
    assert torch.equal(plain, dataset.images.float() / 255)
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch(seeded(1)))
    assert torch.equal(first.sum((1, 2, 3)).sort().values, plain.sum((1, 2, 3)).sort().values)


def test_load_splits_options(archive):
    splits = load_splits("mnist-cifar", source=archive, seed=5, correlation=1, samples=40)
    assert {name: len(d) for name, d in splits.items()} == dict.fromkeys(SPLITS, 40)
    assert [d.correlation for d in splits.values()] == [1.0, 1.0, 0.5, 1.0, 0.5]
    assert splits["train"].labels.equal(splits["train"].digits)
    assert same_bits(
        splits["val_ood"], MNISTCIFAR(archive, "val_ood", samples=40, generator=seeded(5))
    )
    sizes = load_splits("digits-photos", samples={"train": 20, "test_id": 6})
    assert [len(d) for d in sizes.values()] == [20, 160, 160, 6, 320]


@pytest.fixture
def torchvision_root(tmp_path, monkeypatch):
    """A folder as torchvision keeps it, with all ten classes; only the checksums are of our own."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(1)
    raw, batches_py = tmp_path / "MNIST/raw", tmp_path / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    batches_py.mkdir()

    def idx(path, array):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        path.write_bytes(header + array.tobytes())

    for prefix, count in (("train", 200), ("t10k", 160)):
        idx(
            raw / f"{prefix}-images-idx3-ubyte",
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        )
        idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))

    def batch(name, content):
        data = pickle.dumps(content)
        (batches_py / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def images(count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, "labels": rng.permutation(np.arange(count) % 10).tolist()}

    train = [batch(f"data_batch_{i}", images(60)) for i in range(1, 6)]
    test = [batch("test_batch", images(150))]
    name, md5 = batch("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


def test_prepare_round_trip(torchvision_root, tmp_path):
    out = prepare_mnist_cifar(torchvision_root, tmp_path / "new folder" / "sources.npz")
    assert [p.name for p in out.parent.iterdir()] == ["sources.npz"]
    with np.load(out, allow_pickle=False) as stored:
        assert set(stored) == set(synthetic_arrays())
        assert {k: len(v) for k, v in stored.items() if k.endswith("labels")} == {
            "mnist_train_labels": 40,
            "mnist_test_labels": 32,
            "cifar_train_labels": 60,
            "cifar_test_labels": 30,
        }
        first = pickle.loads((torchvision_root / "cifar-10-batches-py/test_batch").read_bytes())
        trucks = np.array(first["labels"]) == 9
        expected = first["data"][trucks].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        kept = stored["cifar_test_images"][stored["cifar_test_labels"] == 1]
        assert (kept == expected).all()
    for split in ("train", "test_id"):
        assert same_bits(MNISTCIFAR(out, split), MNISTCIFAR(torchvision_root, split))
    bits = out.read_bytes()
    assert prepare_mnist_cifar(torchvision_root, out).read_bytes() == bits


def test_prepare_writes_whole_or_nothing(torchvision_root, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.npz").write_bytes(b"precious")

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(UsageError, match=r"^out: expected a writable path, got .*No space left"):
        prepare_mnist_cifar(torchvision_root, folder / "old.npz")
    assert [p.read_bytes() for p in folder.iterdir()] == [b"precious"]


def test_prepare_refuses(torchvision_root, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"^root: expected a folder with torchvision's MNIST"):
        prepare_mnist_cifar(tmp_path / "nowhere", tmp_path / "a.npz")
    with pytest.raises(UsageError, match=r"^out: expected a writable path"):
        prepare_mnist_cifar(torchvision_root, tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.datasets")
    with pytest.raises(UsageError, match=r"^torchvision: expected an installed package.*\[train\]"):
        prepare_mnist_cifar(torchvision_root, tmp_path / "a.npz")
    assert not list(tmp_path.glob("*.npz*"))


def refused(call, start):
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(start), message
    assert ", got " in message
    assert "; " in message


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"split": "test"}, "split: expected one of train, val_id"),
        ({"correlation": 1.5}, "correlation: expected a number in [0, 1]"),
        ({"correlation": float("nan")}, "correlation: expected a number in [0, 1]"),
        ({"correlation": "high"}, "correlation: expected a number in [0, 1]"),
        ({"samples": 3}, "samples: expected a positive even number"),
        ({"samples": 0}, "samples: expected a positive even number"),
        ({"samples": 10.0}, "samples: expected a positive even number"),
        ({"samples": 10**6}, "samples: expected at most "),
        ({"generator": 0}, "generator: expected a torch.Generator or None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [DigitsPhotos, MNISTCIFAR])
def test_bad_options(kind, options, start, archive):
    source = {} if kind is DigitsPhotos else {"source": archive}
    refused(lambda: kind(**source, **options), start)


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ({"name": "imagenet"}, "name: expected one of digits-photos, mnist-cifar"),
        ({"name": "mnist-cifar"}, "source: expected an .npz file or a torchvision folder"),
        ({"name": "digits-photos", "source": "a.npz"}, "source: expected nothing for"),
        ({"name": "digits-photos", "seed": -1}, "seed: expected an integer from 0"),
        ({"name": "digits-photos", "seed": "a"}, "seed: expected an integer from 0"),
        ({"name": "digits-photos", "samples": {"valid": 10}}, "split: expected one of"),
        ({"name": "digits-photos", "correlation": -1}, "correlation: expected a number"),
    ],
    ids=str,
)
def test_load_splits_refuses(arguments, start):
    refused(lambda: load_splits(**arguments), start)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_bad_batch_size(batch_size, digits_photos):
    start = "batch_size: expected a positive integer"
    refused(lambda: batches(digits_photos["train"], batch_size), start)


def without(key):
    return lambda arrays: arrays.pop(key)


def replaced(key, change):
    return lambda arrays: arrays.update({key: change(arrays[key])})


BAD_ARRAYS = {
    "missing": (without("cifar_test_labels"), "source: expected arrays mnist_train_images"),
    "shape": (
        replaced("mnist_train_images", lambda a: a[:, :27]),
        "source: expected mnist_train_images as uint8 [n, 28, 28], got uint8 [1460, 27, 28]",
    ),
    "dimensions": (
        replaced("cifar_train_labels", lambda a: a[:, None]),
        "source: expected cifar_train_labels as uint8 [n], got uint8 [1290, 1]",
    ),
    "dtype": (
        replaced("cifar_train_images", lambda a: a.astype(np.float32)),
        "source: expected cifar_train_images as uint8 [n, 32, 32, 3], got float32",
    ),
    "pickled": (
        replaced("mnist_train_labels", lambda a: a.astype(object)),
        "source: expected a readable .npz archive",
    ),
    "label": (
        replaced("mnist_train_labels", lambda a: np.where(a == 1, 7, a).astype(np.uint8)),
        "source: expected mnist_train_labels of 0 or 1, got values up to 7",
    ),
    "length": (
        replaced("mnist_train_labels", lambda a: a[1:]),
        "source: expected as many mnist_train_images as mnist_train_labels, got 1460 images",
    ),
    "empty class": (
        replaced("cifar_train_labels", np.zeros_like),
        "source: expected cifar_train images of both classes, got 1290 and 0",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, arrays, tmp_path):
    spoil, start = BAD_ARRAYS[case]
    changed = dict(arrays)
    spoil(changed)
    np.savez(tmp_path / "a.npz", **changed)
    refused(lambda: MNISTCIFAR(tmp_path / "a.npz"), start)


def test_a_missing_array_is_named(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in arrays.items() if k != "cifar_test_labels"})
    with pytest.raises(UsageError, match="got no cifar_test_labels; "):
        MNISTCIFAR(tmp_path / "a.npz")


def flip_a_byte(data):
    middle = len(data) // 20  # in the first array's images
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def break_the_header(data):
    at = data.index(b"{'descr'")
    return data[:at] + b"(" + data[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "start"),
    [
        (lambda data: data[: len(data) // 2], "source: expected an .npz archive"),
        (lambda data: b"", "source: expected an .npz archive"),
        (lambda data: b"not a zip archive", "source: expected an .npz archive"),
        (flip_a_byte, "source: expected a readable .npz archive"),
        (break_the_header, "source: expected a readable .npz archive"),
    ],
    ids=["truncated", "empty", "text", "flipped byte", "broken header"],
)
def test_damaged_archive(spoil, start, archive, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(spoil(archive.read_bytes()))
    refused(lambda: MNISTCIFAR(path), start)


def test_too_small_a_source(arrays, tmp_path):
    one_each = {}
    for name in PER_CLASS:
        rows = [int(np.argmax(arrays[f"{name}_labels"] == label)) for label in (0, 1)]
        one_each |= {f"{name}_{w}": arrays[f"{name}_{w}"][rows] for w in ("images", "labels")}
    np.savez(tmp_path / "a.npz", **one_each)
    assert len(MNISTCIFAR(tmp_path / "a.npz", correlation=1)) == 2
    start = "source: expected digits and photographs for both labels, got piles of [0, 0, 0, 0]"
    refused(lambda: MNISTCIFAR(tmp_path / "a.npz", "val_id"), start)


def test_missing_sources(tmp_path):
    refused(
        lambda: MNISTCIFAR(tmp_path / "none.npz", download=True),
        "source: expected an .npz file or a torchvision folder, got",
    )
    refused(
        lambda: MNISTCIFAR(os.fspath(tmp_path)),
        "source: expected a folder with torchvision's MNIST and CIFAR-10, got",
    )


def test_damaged_torchvision_folder(torchvision_root):
    labels = torchvision_root / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-5])
    refused(lambda: MNISTCIFAR(torchvision_root), "source: expected a folder with torchvision's")
