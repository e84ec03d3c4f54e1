"""Small models of the real libraries, random weights, float64: for tests of attaching to them."""

from collections.abc import Callable
from typing import NamedTuple

import timm
from torch import Tensor, nn

_VIT = "vit_tiny_patch16_224"


class Entry(NamedTuple):
    """One model, and what it allows: uses of its last attention layer that are refused."""

    make: Callable[[], nn.Module]
    library: str
    side: int = 16
    refused: tuple[str, ...] = ()
    layers: object = "last"
    logits: Callable[[object], Tensor] = lambda output: output


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        sizes = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3}
        sizes |= {"depth": 2}
        sizes |= options
        return timm.create_model(name, **{k: v for k, v in sizes.items() if v is not None})

    return make


def _small_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 12}
    return SwinTransformer(**sizes, depths=(2, 2), num_heads=(2, 3), num_classes=5)


def _cait() -> nn.Module:
    from timm.models.cait import Cait

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return Cait(**sizes, num_classes=5, init_values=0.5)


def _parallel(block: str) -> Callable[[], nn.Module]:
    from timm.models import vision_transformer

    return _timm(_VIT, block_fn=getattr(vision_transformer, block))


def _own_attention(**options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = _timm(_VIT)()
        from timm.layers import Attention

        for block in model.blocks:
            block.attn = Attention(24, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
        return model

    return make


def _grouped_heads() -> nn.Module:
    from timm.layers.attention import AttentionRope

    model = _timm(_VIT, num_heads=4)()
    for block in model.blocks:
        block.attn = AttentionRope(24, 4, num_kv_heads=2, qkv_fused=False)
    return model


def _xcit() -> nn.Module:
    from timm.models.xcit import Xcit

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return Xcit(**sizes, cls_attn_layers=1, num_classes=5, eta=0.5)


def _twins() -> nn.Module:
    from timm.models.twins import Twins

    sizes = {"img_size": 32, "patch_size": 4, "embed_dims": (24,), "num_heads": (3,)}
    return Twins(**sizes, mlp_ratios=(2,), depths=(2,), sr_ratios=(2,), wss=(4,), num_classes=5)


def _hugging_face(kind: str, suffix: str = "ForImageClassification", **options):
    def make() -> nn.Module:
        import transformers

        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
        sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4, "num_labels": 5}
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
        return getattr(transformers, f"{kind}{suffix}")(config)

    return make


class Headed(nn.Module):
    """A vision tower of transformers with a linear head on what it pools."""

    def __init__(self, tower: Callable[[], nn.Module], read: Callable[[object], Tensor]):
        super().__init__()
        self.tower, self.read = tower(), read
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(self.tower(images)))


def _pooled(output) -> Tensor:
    return output.pooler_output


def _class_token(output) -> Tensor:
    return output.last_hidden_state[:, 0]


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 4, 2, 3, 24, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.3)  # zeros by default: no gradient below
    return model


def _open_clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 4, 24, 2, 3, 2.0, output_dim=5)


def _open_clip_pooled() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        16,
        4,
        24,
        2,
        3,
        2.0,
        output_dim=8,
        attentional_pool=True,
        attn_pooler_queries=1,
        attn_pooler_heads=4,
    )


class Encoder(nn.Module):
    """torch's own encoder layers, batch second."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 4, 4)
        layer = nn.TransformerEncoderLayer(24, 3, 32, 0.0, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        return self.head(self.layers(self.embed(images).flatten(2).permute(2, 0, 1)).mean(0))


def _logits(output) -> Tensor:
    return output.logits


_ALL = ("wrt='input'", "wrt='output'", "mask", "prune")
_NOT_PRUNED = ("prune",)

ZOO = {
    "timm ViT": Entry(_timm(_VIT), "timm"),
    "timm ViT, qk-norm": Entry(_timm(_VIT, qk_norm=True), "timm"),
    "timm ViT, layer scale": Entry(_timm(_VIT, init_values=0.3), "timm"),
    "timm DeiT III": Entry(_timm("deit3_small_patch16_224"), "timm"),
    "timm EVA-02": Entry(_timm("eva02_tiny_patch14_224"), "timm", refused=_NOT_PRUNED),
    "timm DINOv3": Entry(_timm("vit_small_patch16_dinov3"), "timm", refused=_NOT_PRUNED),
    "timm PE, RoPE": Entry(_timm("vit_pe_core_tiny_patch16_384"), "timm", layers=[-2]),
    "timm BEiT": Entry(_timm("beit_base_patch16_224"), "timm", refused=_NOT_PRUNED),
    "timm BEiT v2": Entry(_timm("beitv2_base_patch16_224"), "timm", refused=_NOT_PRUNED),
    "timm Swin": Entry(_small_swin, "timm", refused=_NOT_PRUNED),
    "timm CaiT": Entry(_cait, "timm", refused=_NOT_PRUNED),
    "timm SigLIP": Entry(_timm("vit_base_patch16_siglip_224"), "timm", refused=_NOT_PRUNED),
    "timm SigLIP, encoder": Entry(_timm("vit_base_patch16_siglip_224"), "timm", layers=[-2]),
    "timm relpos": Entry(_timm("vit_relpos_small_patch16_224"), "timm", refused=_NOT_PRUNED),
    "timm parallel scaling": Entry(_parallel("ParallelScalingBlock"), "timm", refused=_NOT_PRUNED),
    "timm parallel things": Entry(_parallel("ParallelThingsBlock"), "timm"),
    "timm gated": Entry(_own_attention(gated=True), "timm", refused=_NOT_PRUNED),
    "timm scale norm": Entry(_own_attention(scale_norm=True), "timm", refused=_NOT_PRUNED),
    "timm CaiT, talking heads": Entry(_cait, "timm", layers=[0], refused=_ALL),
    "timm XCiT, class attention": Entry(_xcit, "timm", refused=_NOT_PRUNED),
    "timm XCiT, channels": Entry(_xcit, "timm", layers=[0], refused=("wrt='output'", "prune")),
    "timm Twins, pooled keys": Entry(_twins, "timm", side=32, refused=("wrt='input'", "prune")),
    "timm grouped heads": Entry(_grouped_heads, "timm", refused=("wrt='input'", "prune")),
    "HF ViT": Entry(_hugging_face("ViT"), "transformers", logits=_logits),
    "HF DeiT": Entry(_hugging_face("DeiT"), "transformers", logits=_logits),
    "HF DINOv2": Entry(_hugging_face("Dinov2"), "transformers", logits=_logits),
    "HF DINOv2, registers": Entry(
        _hugging_face("Dinov2WithRegisters"), "transformers", logits=_logits
    ),
    "HF DINOv3": Entry(
        lambda: Headed(_hugging_face("DINOv3ViT", "Model", head_dim=8), _pooled), "transformers"
    ),
    "HF CLIP vision": Entry(
        lambda: Headed(_hugging_face("CLIPVision", "Model"), _pooled), "transformers"
    ),
    "HF SigLIP": Entry(
        lambda: Headed(_hugging_face("SiglipVision", "Model"), _pooled),
        "transformers",
        refused=_NOT_PRUNED,
    ),
    "HF SigLIP, encoder": Entry(
        lambda: Headed(_hugging_face("SiglipVision", "Model"), _pooled), "transformers", layers=[-2]
    ),
    "HF BEiT": Entry(
        _hugging_face("Beit", use_relative_position_bias=True),
        "transformers",
        logits=_logits,
        refused=_NOT_PRUNED,
    ),
    "HF Data2Vec vision": Entry(
        _hugging_face("Data2VecVision"), "transformers", logits=_logits, refused=_NOT_PRUNED
    ),
    "HF ViT-MAE": Entry(
        lambda: Headed(
            _hugging_face("ViTMAE", "Model", mask_ratio=0.0),
            _class_token,
        ),
        "transformers",
    ),
    "HF I-JEPA": Entry(_hugging_face("IJepa"), "transformers", logits=_logits),
    "torchvision ViT": Entry(_torchvision, "torchvision", refused=_NOT_PRUNED),
    "open_clip ViT": Entry(_open_clip, "open_clip", refused=_NOT_PRUNED),
    "open_clip, attention pooling": Entry(_open_clip_pooled, "open_clip", refused=_NOT_PRUNED),
    "torch TransformerEncoder": Entry(Encoder, "torch", refused=_NOT_PRUNED),
}
