"""Inception-v3 as every FID since 2017 means it: the network of 2015-12-05 with TensorFlow 1's resize.

The network is torch-fidelity's. Logits come from the same pass: pool features times the last layer's weights, without
its bias, as the Inception Score uses them.
"""

import io
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.features import Extractor
from alphaflow_cli.nn.weights import INCEPTION, check_real, find_weights, load_weights, sha256_of

TENSORS = 566  # entries of the published file


class Inception(Extractor):
    """Pool features, 2048 of them."""

    dim = 2048
    preprocessing = "TensorFlow 1 bilinear to 299 px (no half-pixel shift, no antialias); (x − 128)/128"

    def __init__(self, state: dict[str, Tensor], *, sha256: str) -> None:
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
        """From its usual places, or the file given."""
        path = find_weights(INCEPTION, weights)
        state = load_weights(path)
        check_real({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
        try:
            return cls(state, sha256=sha256_of(path))
        except RuntimeError as error:
            raise AlphaflowError(
                f"{path}: {len(state)} tensors that are not the Inception-v3 of 2015-12-05 ({TENSORS} tensors); "
                "torchvision's weights are another network"
            ) from error

    def features(self, images: Tensor) -> Tensor:
        """Output of the global average pool."""
        pooled: Tensor = self.net(images)[0]
        return pooled

    def logits(self, features: Tensor) -> Tensor:
        """1008 logits without bias."""
        last: Tensor = self.net.fc.weight
        return features.to(last.device) @ last.T
