"""Models: the paper's vision transformer, made of ``diversevit_fast.nn``, and timm's as classifiers."""

from .diverse_vit import Block, DiverseViT
from .published import to_published_state_dict
from .timm_classifier import TimmClassifier

__all__ = ["Block", "DiverseViT", "TimmClassifier", "to_published_state_dict"]
