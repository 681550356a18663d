"""A checkpoint with everything around it as one module: noise and label go in, pictures come out.

    noise          (B, C, h, w) float32   of seed i: torch.randn(C, h, w) of a CPU generator seeded with i
    label          (B,) int64             only of a network with labels
    fresh_noise_k  (B, C, h, w) float32   only of a walk that draws noise again (consistency with two steps or more)
    → image        (B, 3, H, W) uint8
    → latent       (B, C, h, w) float32   instead of the image, without the decoder: what the autoencoder decodes

The grid of times, the null label of guidance, the latents' statistics, the decoder and the rounding to bytes are
inside. B is open. The state of the walk is float64, as in `alphaflow sample`; network and decoder compute in float32.
What is written is compared with the checkpoint itself, on pictures of the first seeds.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaflow_cli.core import sampler
from alphaflow_cli.core.path import Net
from alphaflow_cli.core.pixels import quantise
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_by
from alphaflow_cli.recipe.plan import label_rows, null_label
from alphaflow_cli.sample.generator import Generator, open_generator
from alphaflow_cli.sample.walk import Walk, draw_labels, plan_walk

CHECKED = 5  # pictures that are compared: another number than the graph was traced with
Wanted = tuple[list[int], list[int], np.ndarray]  # seeds, labels, and what the checkpoint makes of them
MOST_ROWS = 2**31 - 1  # without a bound torch 2.6 refuses: the batch could be the integer that ends an open slice
MOST_LEVELS, MOST_SHARE = 2, 0.01  # of 255, of the values: beyond it a graph is not that model


@dataclass(frozen=True)
class Exported:
    """A checkpoint opened for export: how its pictures are drawn, and whether they are decoded."""

    generator: Generator
    walk: Walk
    decoded: bool

    @property
    def names(self) -> list[str]:
        """The names of the graph's inputs, in their order."""
        labels = ["label"] if label_rows(self.generator.recipe) else []
        return ["noise", *labels, *(f"fresh_noise_{k + 1}" for k in range(self.fresh))]

    @property
    def fresh(self) -> int:
        """How often the walk draws noise again; the draw of the last step is multiplied by 0."""
        return len(self.walk.grid) - 2 if self.walk.sampler == "consistency" else 0

    @property
    def output(self) -> str:
        """What comes out of the graph."""
        return "image" if self.decoded else "latent"

    def inputs(self, seeds: list[int], labels: list[int]) -> list[Tensor]:
        """The inputs that draw these seeds, as `alphaflow sample` draws them."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(dtype: torch.dtype) -> Tensor:
            shape = self.generator.shape
            return torch.stack([torch.randn(shape, generator=each, dtype=dtype) for each in generators]).float()

        given = [draw(torch.float32)]
        if "label" in self.names:
            given.append(torch.tensor(labels))
        return given + [draw(torch.float64) for _ in range(self.fresh)]


def open_exported(
    address: str, *, nfe: int = 1, decoder: bool | None = None, weights: str = "ema", autoencoder: str = ""
) -> Exported:
    """Open a checkpoint on the CPU. `decoder`: whether latents are decoded in the graph (None: where there are any)."""
    generator = open_generator(address, device=torch.device("cpu"), weights=weights)
    if decoder is not None and not generator.has_decoder:
        option = "--decoder" if decoder else "--no-decoder"
        raise AlphaflowError(f"{option}: this model makes pixels without a decoder; leave it out.")
    if autoencoder:
        generator.use_autoencoder(autoencoder)
    return Exported(generator, plan_walk(generator.recipe, nfe=nfe), decoder is not False)


class OneGraph(nn.Module):
    """The whole way from noise to pictures, as a module that can be traced."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: Exported) -> None:
        super().__init__()
        generator = source.generator
        self.source, self.rule = source, generator.recipe.data.pixels
        self.net = generator.net.float()
        self.autoencoder: Any = generator.autoencoder.module if source.decoded else None
        if self.autoencoder is not None:
            _open_batch(self.autoencoder)
        self.register_buffer("mean", generator.mean)
        self.register_buffer("std", generator.std)
        self.eval().requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.source.names, inputs, strict=True))
        noise, walk = given["noise"], self.source.walk
        label = given.get("label", noise.new_zeros((noise.shape[0],), dtype=torch.int64))
        fresh = iter([value for name, value in given.items() if name.startswith("fresh_noise_")])
        net: Net = self._call
        if walk.guidance != 1.0:
            y_null = null_label(self.source.generator.recipe)
            net = sampler.guided_net(net, y_null, walk.guidance, channels=walk.guidance_channels)
        x = sampler.sample(
            net,
            noise,
            label,
            grid=walk.grid,
            sampler=walk.sampler,
            fresh_noise=lambda: next(fresh, torch.zeros_like(noise)).double(),
        )
        latent = (x * self.std + self.mean).float()
        if not self.source.decoded:
            return latent
        return quantise(latent if self.autoencoder is None else self.autoencoder.decode(latent).sample, self.rule)

    def _call(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        more, guide = {}, self.source.walk.guide
        if guide is not None:
            more = {"guide": t.new_tensor(guide).float().expand(t.shape[0], 3)}
        u: Tensor = self.net(x.float(), t.float(), r.float(), y, **more)
        return u.double()


class PlainUpsample(nn.Module):
    """What diffusers' Upsample2D computes, without its question whether the batch has 64 rows, which closes a graph."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        larger = nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv(larger)  # type: ignore[no-any-return]


def _open_batch(decoder: nn.Module) -> None:
    """Put a PlainUpsample in the place of each plain Upsample2D, so that a graph takes any number of pictures."""
    for parent in decoder.modules():
        for name, child in parent.named_children():
            known: Any = child
            if type(child).__name__ == "Upsample2D" and known.use_conv and known.interpolate and known.norm is None:
                parent.register_module(name, PlainUpsample(child))  # in a ModuleList, too


@dataclass(frozen=True)
class Difference:
    """How far what was written is from the checkpoint."""

    pictures: int
    largest: float  # of a byte; of a latent in units of the largest one
    share: float  # of the values that differ
    output: str

    def __str__(self) -> str:
        start = f"checked on {self.pictures} pictures against the checkpoint: largest difference"
        if self.output == "latent":
            return f"{start} {self.largest:.1e} of the largest latent"
        return f"{start} {self.largest:g} of 255, in {self.share:.4%} of the values"


def compare(made: np.ndarray, wanted: np.ndarray, output: str) -> Difference:
    """Compare pictures (or latents) with those of the checkpoint."""
    assert made.shape == wanted.shape, (made.shape, wanted.shape)
    apart = np.abs(made.astype(np.float64) - wanted.astype(np.float64))
    scale = max(float(np.abs(wanted).max()), 1e-12) if output == "latent" else 1.0
    return Difference(len(made), float(apart.max()) / scale, float((apart > 0).mean()), output)


def reference_pictures(source: Exported) -> Wanted:
    """Seeds, labels and what the checkpoint itself makes of them; before the network is touched by an export."""
    generator = source.generator
    seeds = list(range(CHECKED))
    labels = draw_labels(seeds, generator.recipe.data.classes, "balanced")
    latents = generator.latents(seeds, labels, source.walk)
    if source.decoded:
        return seeds, labels, generator.decode(latents).numpy()
    return seeds, labels, (latents * generator.std + generator.mean).float().numpy()


def checked(source: Exported, run: Callable[[list[Tensor]], np.ndarray], reference: Wanted) -> Difference:
    """Run what was written on the reference's seeds, and compare what comes out."""
    seeds, labels, wanted = reference
    return compare(run(source.inputs(seeds, labels)), wanted, source.output)


def refuse_far(difference: Difference, path: Path) -> None:
    """Refuse to write a graph whose pictures are not the checkpoint's."""
    bound = MOST_LEVELS if difference.output == "image" else 1e-3
    if not difference.largest <= bound or (difference.output == "image" and difference.share > MOST_SHARE):
        raise AlphaflowError(
            f"{path}: not written, because it would give other pictures: {difference}. Where a decoder cannot be "
            "exported, --no-decoder leaves it out."
        )


def dynamic_shapes(count: int) -> dict[str, tuple[dict[int, Any], ...]]:
    """Say that the first axis of every input is the batch, of any size."""
    batch = torch.export.Dim("batch", max=MOST_ROWS)
    return {"inputs": tuple({0: batch} for _ in range(count))}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch's exporters warn about their own insides; the comparison tells whether the result is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def export_torch(source: Exported, out: Path) -> Difference:
    """Write the graph as a `.pt2` of torch.export, which torch reads without this package."""
    reference = reference_pictures(source)
    differences: list[Difference] = []

    def write(path: Path) -> None:
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as file:
            module = torch.export.load(file).module()
        differences.append(checked(source, lambda inputs: module(*inputs).numpy(), reference))
        refuse_far(differences[0], out)

    with quiet():
        example = tuple(source.inputs([0, 1], [0, 0]))
        program = torch.export.export(OneGraph(source), example, dynamic_shapes=dynamic_shapes(len(example)))
        write_by(out, write)
    return differences[0]
