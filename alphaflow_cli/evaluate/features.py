"""Feature networks behind one interface: uint8 pictures in, float32 features out, with everything a protocol must name.

    name       metric               network                                        dim
    inception  FID, KID, IS, P/R    Inception-v3 of 2015 (TensorFlow's resize)     2048
    dinov2     FDD                  DINOv2 ViT-L/14 at 224 px, class token         1024
    clip       FCD                  CLIP ViT-L/14 at 224 px, image embedding       768
    tiny       FD-tiny              fixed Haar-band energies, no weights           192

Features are always computed in true float32: on recent GPUs the default would be TF32 for convolutions.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.precision import true_float32


class Extractor(nn.Module):
    """A frozen network; subclasses fill the four names and `features`."""

    id: str  # network and layer, as printed in a protocol
    dim: int
    weights_sha256: str  # empty where there are no weights
    preprocessing: str  # from uint8 to the network's input, in words
    known: bool  # the weights are the published ones, or there is nothing to compare with

    def features(self, images: Tensor) -> Tensor:
        """Float32 features (N, dim) of uint8 pictures (N, 3, H, W)."""
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        """Class logits from features, where the network has classes."""
        raise AlphaflowError(f"{self.id} has no classes: the Inception Score needs the inception features")

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Checks the pictures, then `features` in true float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise AlphaflowError(f"{self.id} takes uint8 pictures (N, 3, H, W), not {found}")
        with true_float32():
            features = self.features(images)
        assert features.shape == (len(images), self.dim), features.shape
        return features.clone()


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Float in 0–255 from uint8: antialiased bicubic, not clamped (0.2 % of pixels leave the range, as published)."""
    pixels = images.float()
    if pixels.shape[-2:] == (side, side):
        return pixels
    return nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels/255 − mean)/std per colour."""
    shift = pixels.new_tensor(mean)[:, None, None]
    return (pixels / 255 - shift) / pixels.new_tensor(std)[:, None, None]


def build_extractor(name: str, *, device: torch.device, weights: Path | None) -> Extractor:
    """The extractor of that name with its weights, frozen, on the device."""
    if name not in BUILDERS:
        raise AlphaflowError(f"no feature network called {name!r}; there are {', '.join(BUILDERS)}")
    extractor = BUILDERS[name](weights).requires_grad_(False).eval().to(device)
    if device.type == "cpu":  # convolutions are 1.3 times as fast; features move by 1e-4 of their size
        extractor = extractor.to(memory_format=torch.channels_last)
    return extractor


def _inception(weights: Path | None) -> Extractor:
    from alphaflow_cli.evaluate.networks import (
        Inception,  # each network's library is imported only when it is asked for
    )

    return Inception.load(weights)


def _dinov2(weights: Path | None) -> Extractor:
    from alphaflow_cli.evaluate.networks import DinoV2

    return DinoV2.load(weights)


def _clip(weights: Path | None) -> Extractor:
    from alphaflow_cli.evaluate.networks import Clip

    return Clip.load(weights)


def _tiny(weights: Path | None) -> Extractor:
    from alphaflow_cli.evaluate.tiny import Tiny

    if weights is not None:
        raise AlphaflowError("the tiny features have no weights; leave out --weights tiny=…")
    return Tiny()


BUILDERS: dict[str, Callable[[Path | None], Extractor]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "tiny": _tiny,
}
