"""For programs: `alphaflow_cli.load("user/repo" | path)` gives a model, `.sample(seeds=…)` gives pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.sample.generator import DecoderChoice, Generator, open_generator, spans_of
from alphaflow_cli.sample.walk import draw_labels, plan_walk

SamplerChoice = Literal["auto", "trajectory", "consistency", "flow", "heun"]


class Model:
    """A checkpoint, ready to sample. The picture of a seed does not depend on the others."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    @property
    def recipe(self) -> Recipe:
        """What it was trained by."""
        return self._generator.recipe

    @property
    def origin(self) -> dict[str, Any]:
        """Step, weights, versions, class names."""
        return dict(self._generator.origin)

    def sample(
        self,
        seeds: Sequence[int],
        classes: Sequence[int] | int | None = None,
        nfe: int = 1,
        *,
        sampler: SamplerChoice = "auto",
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        guidance_channels: int | None = None,
        batch: int = 64,
    ) -> Tensor:
        """uint8 pictures (n, 3, H, W) on the CPU. `classes`: in turn over the seeds; None draws one per seed."""
        seeds = [int(seed) for seed in seeds]
        if not seeds:
            raise AlphaflowError("sample: seeds is empty; give one per picture, such as range(16).")
        if times is not None and nfe != 1:
            raise AlphaflowError("sample: give nfe or times, not both; the times say how many evaluations there are.")
        if batch < 1:
            raise AlphaflowError(f"sample: batch {batch}: at least one picture at a time is needed.")
        if sampler not in get_args(SamplerChoice):
            raise AlphaflowError(f"sample: sampler {sampler!r}: there are {', '.join(get_args(SamplerChoice))}.")
        walk = plan_walk(
            self.recipe, nfe=nfe, kind=sampler, times=times, guidance=guidance, guidance_channels=guidance_channels
        )
        labels = self._labels(seeds, classes)
        stream = self._generator.stream(seeds, labels, walk, spans_of(len(seeds), batch))
        return torch.cat([drawn.images.cpu() for drawn in stream if drawn.images is not None])

    def _labels(self, seeds: Sequence[int], classes: Sequence[int] | int | None) -> list[int]:
        known = self.recipe.data.classes
        if classes is None:
            return draw_labels(seeds, known, "random")
        chosen = [int(label) for label in np.atleast_1d(classes)]
        bad = [label for label in chosen if not 0 <= label < known]
        if bad or not chosen:
            has = f"classes 0 to {known - 1}" if known else "no classes"
            raise AlphaflowError(f"sample: class {bad[0] if bad else 'list is empty'}: this model has {has}.")
        return [chosen[i % len(chosen)] for i in range(len(seeds))]


def load(
    address: str | Path,
    *,
    device: str | torch.device | None = None,
    weights: Literal["ema", "raw"] = "ema",
    decoder: DecoderChoice = "auto",
) -> Model:
    """A file, a run folder, or user/repo[@revision] on the Hub; `decoder` auto is bf16 on a GPU, fp32 on a CPU."""
    if weights not in ("ema", "raw"):
        raise AlphaflowError(f"load: weights {weights!r}: there are ema and raw.")
    chosen = torch.device(device) if device is not None else None
    return Model(open_generator(str(address), device=chosen, weights=weights, decoder=decoder))
