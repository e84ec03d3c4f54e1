"""This library's operators at the extension points of others; each module is imported by itself.

Importing the package imports none of these libraries: what it registers of timm waits for a model.
"""

from ..attachment.class_token import register_class_token_library
from ..attachment.second_order import register_attention_library
from .entry_points import watch_flash_attn, watch_xformers


def _register_timm() -> None:
    from . import timm_class_token  # noqa: F401 (registers itself)


register_class_token_library("timm.models.vision_transformer", _register_timm)
register_attention_library("xformers.ops.fmha", watch_xformers)
register_attention_library("flash_attn.flash_attn_interface", watch_flash_attn)
register_attention_library("flash_attn_interface", watch_flash_attn)
