"""The feature networks with weights, and `build_extractor`, which makes any feature network by its name.

Inception-v3 as every FID since 2017 means it: the network of 2015-12-05 with TensorFlow 1's resize. The network is
torch-fidelity's. Logits come from the same pass: pool features times the last layer's weights, without its bias, as
the Inception Score uses them.

DINOv2 ViT-L/14 as FDD means it: 224 px by antialiased bicubic, the class token after the last norm. The network is
timm's, with one line of care: the table of 37×37 positions is brought to 16×16 by the rule of the official code
(bicubic, no antialias, scale (16 + 0.1)/37). timm's and transformers' own resampling moves the features by 4e-4 to
1e-3 of their size. The official .pth, timm's safetensors and transformers' safetensors are read.

CLIP ViT-L/14's image embedding, for FCD. Which CLIP and which resize the published FCD figures used is not stated
anywhere; this is the largest 224 px model of the paper (arXiv:2103.00020) with its own mean and deviation and the
antialiased bicubic of FDD. So FCD compares runs measured here. OpenAI's TorchScript file (or its state dict) and timm's
safetensors are read.

torch_fidelity and timm are imported when a network of theirs is made: FD-tiny needs neither.
"""

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor, normalise, resize_bicubic
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.files import sha256_of
from alphaflow_cli.nn.weights import (
    CLIP,
    DINOV2,
    INCEPTION,
    WeightFile,
    check_real,
    find_weights,
    fit_weights,
    load_weights,
)

INCEPTION_TENSORS = 566  # entries of the published file
HEAD = 64  # channels of an attention head of CLIP and of DINOv2, in all sizes
PATCH, GRID = 14, 16  # DINOv2's patch in pixels, and its patches along the side
VIT_SIDE = PATCH * GRID  # pixels that DINOv2 and CLIP look at
OFFSET = 0.1  # added to the grid by DINOv2's official resampling
LARGE = (1024, 24, PATCH)  # width, depth and patch of ViT-L/14
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # its own
CLIP_RENAMED = (
    ("conv1", "patch_embed.proj"),
    ("positional_embedding", "pos_embed"),
    ("class_embedding", "cls_token"),
    (r"transformer\.resblocks\.", "blocks."),
    ("ln_pre", "norm_pre"),
    ("ln_post", "norm"),
    ("ln_", "norm"),
    (r"attn\.in_proj_", "attn.qkv."),
    (r"attn\.out_proj", "attn.proj"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)
DINOV2_RENAMED = (
    (r"^dinov2\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


class Inception(Extractor):
    """Inception-v3 of 2015: the 2048 values of its global average pool."""

    dim = 2048
    preprocessing = "TensorFlow 1 bilinear to 299 px (no half-pixel shift, no antialias); (x − 128)/128"

    def __init__(self, state: dict[str, Tensor], *, sha256: str) -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        super().__init__()
        clean = io.BytesIO()  # the constructor unpickles whatever it is given, so it is given tensors only
        torch.save(state, clean)
        clean.seek(0)
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=clean)
        self.weights_sha256 = sha256
        self.known = sha256.startswith(INCEPTION.sha256)
        self.id = "inception-v3-2015-12-05/pool" if self.known else f"inception-v3-with-weights-{sha256[:8]}/pool"

    @classmethod
    def load(cls, weights: Path | None) -> "Inception":
        """Read the weights from the file given, else from the usual places."""
        path = find_weights(INCEPTION, weights)
        state = load_weights(path)
        check_real({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
        try:
            return cls(state, sha256=sha256_of(path))
        except RuntimeError as error:
            raise AlphaflowError(
                f"{path}: {len(state)} tensors that are not the Inception-v3 of 2015-12-05 ({INCEPTION_TENSORS} "
                "tensors); torchvision's weights are another network"
            ) from error

    def features(self, images: Tensor) -> Tensor:
        """The output of the global average pool, (N, 2048)."""
        pooled: Tensor = self.net(images)[0]
        return pooled

    def logits(self, features: Tensor) -> Tensor:
        """The 1008 class logits, without the last layer's bias."""
        last: Tensor = self.net.fc.weight
        return features.to(last.device) @ last.T


def fuse_convolutions(net: nn.Module) -> None:
    """Make each convolution, its batch norm and its ReLU one call of cuDNN, in place: 1.15 times as fast on an H100.

    The norm's scale is folded into the weights in float64. Features stay as far from those of float64 as they were.
    """
    for block in [part for part in net.modules() if type(part).__name__ == "BasicConv2d"]:
        convolution: Any = block.conv
        norm: Any = block.bn
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = (convolution.weight.double() * scale[:, None, None, None]).float()
        bias = (norm.bias.double() - norm.running_mean.double() * scale).float()
        form = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        block.forward = partial(_convolve, weight, bias, form)


def _convolve(weight: Tensor, bias: Tensor, form: tuple[Any, ...], x: Tensor) -> Tensor:
    """Compute relu(x ∗ weight + bias) in one kernel of cuDNN."""
    rows: Tensor = torch.cudnn_convolution_relu(x, weight, bias, *form)
    return rows


def build_vit(state: dict[str, Tensor], source: Path, **form: Any) -> tuple[Any, tuple[int, int, int]]:
    """timm's vision transformer with these weights, and its size: width, depth, patch."""
    from timm.models.vision_transformer import VisionTransformer

    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    size = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // HEAD}
    net = VisionTransformer(img_size=VIT_SIDE, **size, **form)
    fit_weights(net, state, source)
    return net, (width, depth, patch)


def load_vit(kind: "type[DinoV2 | Clip]", published: WeightFile, weights: Path | None) -> Extractor:
    """Read the weights from the file given, else from the usual places; the metrics are defined for ViT-L/14 only."""
    path = find_weights(published, weights)
    extractor = kind(load_weights(path), sha256=sha256_of(path), source=path)
    if "-vit-l-14/" not in extractor.id:
        metric = published.metrics.upper()
        raise AlphaflowError(f"{path}: holds {extractor.id}; {metric} is measured with ViT-L/14 (24 blocks of 1024)")
    return extractor


class DinoV2(Extractor):
    """DINOv2's network: the class token after the last norm."""

    preprocessing = "torch bicubic with antialias to 224 px, not clamped; /255; ImageNet mean and deviation"
    known = True  # no hash is published for any of the three files

    def __init__(self, state: dict[str, Tensor], *, sha256: str, source: Path) -> None:
        super().__init__()
        state = dinov2_to_timm(state, source)
        state["pos_embed"] = resample_positions(state["pos_embed"])
        self.net, size = build_vit(state, source, init_values=1.0, num_classes=0)
        self.dim, self.weights_sha256 = size[0], sha256
        self.id = f"dinov2-vit-{'l' if size == LARGE else f'{size[0]}x{size[1]}'}-14/cls"

    def features(self, images: Tensor) -> Tensor:
        """The class token after the last norm, (N, dim)."""
        pixels = normalise(resize_bicubic(images, VIT_SIDE), IMAGENET_MEAN, IMAGENET_STD)
        tokens: Tensor = self.net.forward_features(pixels)  # (N, 1 + 256, dim)
        return tokens[:, 0]


def resample_positions(table: Tensor) -> Tensor:
    """Bring the positions (1, 1 + side², dim) to 16×16 by the official rule; the class token's own is kept."""
    side = round((table.shape[1] - 1) ** 0.5)
    if side == GRID:
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, dim, side, side)
    scale = (GRID + OFFSET) / side
    small = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert small.shape[-2:] == (GRID, GRID), small.shape
    return torch.cat([table[:, :1].float(), small.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def dinov2_to_timm(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Turn the official, timm's or transformers' names of the weights into timm's."""
    if "embeddings.cls_token" in state or "dinov2.embeddings.cls_token" in state:
        state = _renamed(state, DINOV2_RENAMED)
        for query in [key for key in state if ".attn.q." in key]:
            parts = [state.pop(query.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
            state[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
        raise AlphaflowError(f"{source}: neither the official, timm's nor transformers' DINOv2 (no class token in it)")
    if "register_tokens" in state or "reg_token" in state:
        raise AlphaflowError(f"{source}: DINOv2 with registers; FDD is measured with the network without them")
    return {key: value.float() for key, value in state.items() if key != "mask_token"}


def _renamed(state: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The tensors under the names that all rules together make of theirs."""
    renamed = {}
    for key, value in state.items():
        for pattern, target in rules:
            key = re.sub(pattern, target, key)
        renamed[key] = value
    return renamed


class Clip(Extractor):
    """CLIP's image network: the class token, projected to the embedding."""

    preprocessing = "torch bicubic with antialias to 224 px, not clamped; /255; CLIP mean and deviation"
    known = True  # timm's copy has another hash and the same values

    def __init__(self, state: dict[str, Tensor], *, sha256: str, source: Path) -> None:
        super().__init__()
        state = clip_to_timm(state, source)
        self.dim, self.weights_sha256 = state["head.weight"].shape[0], sha256
        norm = partial(nn.LayerNorm, eps=1e-5)  # quick_gelu as trained; timm's plain variant of these weights uses GELU
        form = {"num_classes": self.dim, "pre_norm": True, "norm_layer": norm, "act_layer": "quick_gelu"}
        self.net, size = build_vit(state, source, **form)
        self.id = f"clip-vit-{'l' if size == LARGE else f'{size[0]}x{size[1]}'}-{size[2]}/embedding"

    def features(self, images: Tensor) -> Tensor:
        """The image embedding (N, dim), its length as the network gives it."""
        embedding: Tensor = self.net(normalise(resize_bicubic(images, VIT_SIDE), CLIP_MEAN, CLIP_STD))
        return embedding


def clip_to_timm(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Turn OpenAI's or timm's names of the weights into timm's, in float32 (OpenAI's file is half precision)."""
    if "visual.class_embedding" in state:
        visual = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
        state = _renamed(visual, CLIP_RENAMED)
        state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
        state["head.weight"] = state.pop("proj").T
    if not {"cls_token", "patch_embed.proj.weight", "norm_pre.weight", "head.weight"} <= state.keys():
        raise AlphaflowError(f"{source}: neither OpenAI's nor timm's CLIP image network")
    state = {key: value.float() for key, value in state.items()}
    state.setdefault("head.bias", torch.zeros(state["head.weight"].shape[0]))
    return state


def build_extractor(name: str, *, device: torch.device, weights: Path | None) -> Extractor:
    """Make the feature network of that name, frozen, on the device; its weights from the file given or from the
    usual places."""
    extractor = BUILDERS[name](weights).requires_grad_(False).eval().to(device)
    if device.type == "cpu":  # convolutions are 1.3 times as fast; features move by 1e-4 of their size
        extractor = extractor.to(memory_format=torch.channels_last)
    elif isinstance(extractor, Inception) and device.type == "cuda" and torch.version.hip is None:
        fuse_convolutions(extractor.net)
    return extractor


BUILDERS: dict[str, Callable[[Path | None], Extractor]] = {
    "inception": Inception.load,
    "dinov2": partial(load_vit, DinoV2, DINOV2),
    "clip": partial(load_vit, Clip, CLIP),
    "tiny": lambda weights: Tiny(),  # it has none
}
