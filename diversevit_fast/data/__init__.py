"""Data with one robust and one spurious feature, in and out of distribution.

The data sets that are made here pair a simple, spurious part with one that says the label:

* ``DigitsPhotos``: scikit-learn's digits and sample photographs; needs no network and no file.
* ``MNISTCIFAR``: the paper's benchmark, from a prepared ``.npz`` or a torchvision folder; in both a
  digit stands above a photograph.
* ``GarmentsPlaces``: pullovers and coats (Fashion-MNIST) over deer and ships (CIFAR-10).

Image folders whose groups a CSV file names: ``GroupFolder``, and ``folder_splits`` and ``waterbirds`` in
five splits; ``folder_images`` decodes them into memory. ``from_wilds`` wraps a subset of WILDS.

``compose`` lays cut-outs over backgrounds, ``compose_folder`` writes a data set of such images.

``load_splits`` builds all five ``SPLITS`` of a data set by its name, ``batches`` walks one split,
``group_accuracy`` gives worst group and averages, ``corrupt`` makes common corruptions.
"""

from .compose import compose
from .compose_folder import compose_folder
from .corruptions import CORRUPTIONS, corrupt
from .digits_photos import DigitsPhotos
from .dominoes import SPLITS, batches
from .garments_places import GarmentsPlaces, prepare_garments_places
from .group_accuracy import GroupAccuracy, group_accuracy
from .group_folder import GroupDataset, GroupFolder, from_wilds
from .group_images import GroupImages, folder_images
from .load import load_splits
from .mnist_cifar import MNISTCIFAR, prepare_mnist_cifar
from .transforms import vit_transforms
from .waterbirds import folder_splits, waterbirds

__all__ = [
    "CORRUPTIONS",
    "MNISTCIFAR",
    "SPLITS",
    "DigitsPhotos",
    "GarmentsPlaces",
    "GroupAccuracy",
    "GroupDataset",
    "GroupFolder",
    "GroupImages",
    "batches",
    "compose",
    "compose_folder",
    "corrupt",
    "folder_images",
    "folder_splits",
    "from_wilds",
    "group_accuracy",
    "load_splits",
    "prepare_garments_places",
    "prepare_mnist_cifar",
    "vit_transforms",
    "waterbirds",
]
