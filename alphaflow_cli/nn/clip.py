"""CLIP ViT-L/14's image embedding, for FCD.

Which CLIP and which resize the published FCD figures used is not stated anywhere; this is the largest 224 px
model of the paper (arXiv:2103.00020) with its own mean and deviation and the antialiased bicubic of FDD.
So FCD compares runs measured here.
Reads OpenAI's TorchScript file (or its state dict) and timm's safetensors.
"""

from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.features import Extractor, normalise, resize_bicubic
from alphaflow_cli.nn.weights import CLIP, find_weights, fit_weights, load_weights, sha256_of

SIDE = 224
CLIP_HEAD = 64  # channels of an attention head
LARGE = "clip-vit-l-14/embedding"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


class Clip(Extractor):
    """The projected class token."""

    preprocessing = "torch bicubic with antialias to 224 px, not clamped; /255; CLIP mean and deviation"
    known = True  # timm's copy has another hash and the same values

    def __init__(self, state: dict[str, Tensor], *, sha256: str, source: Path) -> None:
        super().__init__()
        state = clip_to_timm(state, source)
        width = state["cls_token"].shape[-1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        patch = state["patch_embed.proj.weight"].shape[-1]
        self.dim = state["head.weight"].shape[0]
        self.net = VisionTransformer(
            img_size=SIDE,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=width // CLIP_HEAD,
            num_classes=self.dim,
            pre_norm=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            act_layer="quick_gelu",  # as trained; timm's plain variant of these weights uses GELU
        )
        fit_weights(self.net, state, source)
        self.weights_sha256 = sha256
        large = (width, depth, patch) == (1024, 24, 14)
        self.id = LARGE if large else f"clip-vit-{width}x{depth}-{patch}/embedding"

    @classmethod
    def load(cls, weights: Path | None) -> "Clip":
        """From its usual places, or the file given."""
        path = find_weights(CLIP, weights)
        extractor = cls(load_weights(path), sha256=sha256_of(path), source=path)
        if extractor.id != LARGE:
            raise AlphaflowError(f"{path}: holds {extractor.id}; FCD is measured with ViT-L/14 at 224 px")
        return extractor

    def features(self, images: Tensor) -> Tensor:
        """Image embedding, not normalised."""
        embedding: Tensor = self.net(normalise(resize_bicubic(images, SIDE), MEAN, STD))
        return embedding


CLIP_RENAMED = (
    ("conv1", "patch_embed.proj"),
    ("positional_embedding", "pos_embed"),
    ("class_embedding", "cls_token"),
    ("transformer.resblocks.", "blocks."),
    ("ln_pre", "norm_pre"),
    ("ln_post", "norm"),
    ("ln_", "norm"),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj", "attn.proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def clip_to_timm(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """OpenAI's or timm's names, to timm's, in float32 (OpenAI's file is half precision)."""
    if "visual.class_embedding" in state:
        state = _from_openai({key[7:]: value for key, value in state.items() if key.startswith("visual.")})
    if "cls_token" not in state or "norm_pre.weight" not in state or "head.weight" not in state:
        raise AlphaflowError(f"{source}: neither OpenAI's nor timm's CLIP image network")
    state = {key: value.float() for key, value in state.items()}
    state.setdefault("head.bias", torch.zeros(state["head.weight"].shape[0]))
    return state


def _from_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for old, new in CLIP_RENAMED:
            key = key.replace(old, new)
        renamed[key] = value
    renamed["cls_token"] = renamed["cls_token"][None, None]
    renamed["pos_embed"] = renamed["pos_embed"][None]
    renamed["head.weight"] = renamed.pop("proj").T
    return renamed
