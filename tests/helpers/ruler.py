"""Helpers of the evaluation's tests: coloured pictures, a random Inception with sane activations, the CIFAR-10 copy."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from places import ROOT
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from alphaflow_cli.evaluate.features import Extractor

CIFAR = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def pictures(count: int, *, size: int = 32, seed: int = 0, contrast: float = 1.0) -> Tensor:
    """Smooth coloured noise, uint8 (count, 3, size, size)."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=draw)
    fine = torch.randn(count, 3, size, size, generator=draw) * 0.2
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return ((smooth + fine) * 45 * contrast + 128).clamp(0, 255).to(torch.uint8)


def write_pictures(folder: Path, images: Tensor) -> Path:
    """As PNG files, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


class Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The network before any weights are loaded."""

    def load_state_dict(self, *args: object, **options: object) -> None:
        """Nothing to load."""


def random_inception(path: Path) -> Path:
    """Random weights whose batch norms are calibrated on pictures, so that activations neither vanish nor explode."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    net = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    net.train()
    with torch.no_grad():
        net(pictures(4, seed=9))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return path


def cifar(count: int, *, split: str, skip: int = 0) -> Tensor:
    """Pictures of the JPEG copy of CIFAR-10, classes in turn; uint8 (count, 3, 32, 32)."""
    import tarfile

    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            parts = member.name.split("/")
            if not member.isfile() or parts[0] != split:
                continue
            held = found.setdefault(parts[1], [])
            if len(held) < -(-(count + skip) // 10):
                file = archive.extractfile(member)
                assert file is not None
                held.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
    rows = [picture for each in zip(*found.values(), strict=True) for picture in each]
    return torch.from_numpy(np.stack(rows[skip : skip + count])).permute(0, 3, 1, 2).contiguous()


class Small(Extractor):
    """A real network in Inception's place, which takes seconds for few pictures; torch-fidelity's is TheirSmall."""

    id, dim, weights_sha256, preprocessing, known = "small", 8, "", "", True

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.fc = torch.nn.Parameter(3 * torch.randn(5, 8, generator=draw))
        self.mean = torch.nn.Parameter(torch.tensor([2.8, 2.9, 0.05, 0.0, 1.9, 0.0, 0.0, 0.85]))  # of pictures()
        self.kernel = torch.nn.Parameter(torch.randn(8, 3, 4, 4, generator=draw) / 255)

    def features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(images.float(), self.kernel).relu().mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        return (features.to(self.fc.device) - self.mean) @ self.fc.T


class TheirSmall(FeatureExtractorBase):  # type: ignore[misc]
    """The same network as one of torch-fidelity's."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.net = Small(None)

    @staticmethod
    def get_provided_features_list() -> tuple[str, str]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.net.features(images)
        layers = {"features": features, "logits": self.net.logits(features)}
        return tuple(layers[name] for name in self.features_list)
