"""A checkpoint as pictures to be measured: picture i has seed i, the same whoever asks and in whatever order."""

import hashlib
import json
import time
from typing import Any

from torch import Tensor

from alphaflow_cli.engine.generate import Generator
from alphaflow_cli.engine.walk import Walk, draw_labels

FIRST_SEED = 0  # published evaluations use seeds 0 … 49,999


class GeneratedImages:
    """One checkpoint, one walk: an ImageSource."""

    def __init__(self, generator: Generator, walk: Walk, *, count: int, draw: str, digest: str) -> None:
        self._generator, self._walk, self._draw, self._digest = generator, walk, draw, digest
        self.count, self.seconds = count, {"network": 0.0, "decoder": 0.0}
        side = generator.recipe.data.image_size
        self.size = (side, side)

    @property
    def label(self) -> str:
        """`quickstart, 1 NFE, trajectory on 1, 0`."""
        return f"{self._generator.recipe.name or 'checkpoint'}, {self._walk.nfe} NFE, {self._walk}"

    def images(self, start: int, stop: int) -> Tensor:
        """uint8 on the generator's device, clocked by part."""
        seeds = range(FIRST_SEED + start, FIRST_SEED + stop)
        labels = draw_labels(seeds, self._generator.recipe.data.classes, self._draw)
        began = time.perf_counter()
        latents = self._generator.latents(list(seeds), labels, self._walk)
        self._generator.synchronise()
        between = time.perf_counter()
        images = self._generator.decode(latents)
        self._generator.synchronise()
        self.seconds["network"] += between - began
        self.seconds["decoder"] += time.perf_counter() - between
        return images

    def close(self) -> None:
        """Nothing is open."""

    def describe(self) -> dict[str, Any]:
        """The generator's half of the protocol."""
        origin, recipe = self._generator.origin, self._generator.recipe
        channels = self._walk.guidance_channels  # told where it is not all: numbers of before keep their fingerprint
        partly = {} if channels is None else {"guidance_channels": channels}
        return partly | {
            "kind": "checkpoint",
            "name": recipe.name,
            "count": self.count,
            "checkpoint_sha256": self._digest,
            "step": origin.get("step"),
            "weights": origin.get("weights"),
            "half_life": origin.get("half_life"),
            "sampler": self._walk.sampler,
            "times": list(self._walk.grid),
            "nfe": self._walk.nfe,
            "guidance_at_sampling": self._walk.guidance,
            "guidance_in_training": {"omega": recipe.guidance.omega, "kappa": recipe.guidance.kappa},
            "labels": self._draw if recipe.data.classes else "none",
            "seeds": [FIRST_SEED, FIRST_SEED + self.count - 1],
            "noise": "torch.Generator on the CPU, one per seed",
            "pixels": recipe.data.pixels,
            "precision": self._generator.precision,
            "autoencoder": (origin.get("autoencoder") or {}).get("id"),
        }

    def fingerprint(self) -> str:
        """Of everything the pictures depend on."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()
