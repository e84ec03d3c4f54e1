"""Data with one robust and one spurious feature, in and out of distribution.

Every data set here stacks a digit (simple, spurious) above a photograph (the label):

* ``DigitsPhotos``: scikit-learn's digits and sample photographs; needs no network and no file.
* ``MNISTCIFAR``: the paper's benchmark, from a prepared ``.npz`` or a torchvision folder.

``load_splits`` builds all five ``SPLITS`` of one of them, ``batches`` walks one split.
"""

from .digits_photos import DigitsPhotos
from .dominoes import SPLITS, batches
from .load import load_splits
from .mnist_cifar import MNISTCIFAR, prepare_mnist_cifar

__all__ = [
    "MNISTCIFAR",
    "SPLITS",
    "DigitsPhotos",
    "batches",
    "load_splits",
    "prepare_mnist_cifar",
]
