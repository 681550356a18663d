"""What a feature network is: uint8 pictures in, float32 features out, with everything a protocol must name.

    name       metric               network                                        dim
    inception  FID, KID, IS, P/R    Inception-v3 of 2015 (TensorFlow's resize)     2048
    dinov2     FDD                  DINOv2 ViT-L/14 at 224 px, class token         1024
    clip       FCD                  CLIP ViT-L/14 at 224 px, image embedding       768
    tiny       FD-tiny              fixed Haar-band energies, no weights           192

tiny.py holds the last, networks.py the others and what makes one by its name. Features are always computed in true
float32: on recent GPUs the default would be TF32 for convolutions.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from alphaflow_cli.data.batches import to_device
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.precision import true_float32


class Extractor(nn.Module, ABC):
    """A frozen network that turns pictures into features. A subclass fills the five names and `features`."""

    id: str  # network and layer, as printed in a protocol
    dim: int
    weights_sha256: str  # empty where there are no weights
    preprocessing: str  # from uint8 to the network's input, in words
    known: bool  # the weights are the published ones, or there is nothing to compare with

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """The float32 features (N, dim) of uint8 pictures (N, 3, H, W)."""

    def logits(self, features: Tensor) -> Tensor:
        """The class logits of features that this network gave, where it has classes."""
        raise AlphaflowError(f"{self.id} has no classes: the Inception Score needs the inception features")

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Refuse what are no pictures, then compute their features in true float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise AlphaflowError(f"{self.id} takes uint8 pictures (N, 3, H, W), not {given}")
        with true_float32():
            features = self.features(images)
        assert features.shape == (len(images), self.dim), features.shape
        return features.clone()


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Resize uint8 pictures by antialiased bicubic; as published, the 0.2 % of pixels that leave 0–255 stay so."""
    pixels = images.float()
    if pixels.shape[-2:] == (side, side):
        return pixels
    return nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bring pixels of 0–255 to (pixels/255 − mean)/std, for each colour its own."""
    shift, scale = (to_device(torch.tensor(each, dtype=pixels.dtype), pixels.device) for each in (mean, std))
    return (pixels / 255 - shift[:, None, None]) / scale[:, None, None]
