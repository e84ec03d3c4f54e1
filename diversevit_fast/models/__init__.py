"""Models built of ``diversevit_fast.nn``: the paper's vision transformer."""

from .diverse_vit import Block, DiverseViT
from .published import to_published_state_dict

__all__ = ["Block", "DiverseViT", "to_published_state_dict"]
