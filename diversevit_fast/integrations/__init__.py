"""This library's operators at the extension points of others; each module is imported by itself.

Importing the package imports none of these libraries: what it registers of timm waits for a model.
"""

from ..attachment.class_token import register_class_token_library


def _register_timm() -> None:
    from . import timm_class_token  # noqa: F401 (registers itself)


register_class_token_library("timm.models.vision_transformer", _register_timm)
