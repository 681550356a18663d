"""From a checkpoint to pictures. Sample i depends on its seed, its label and the checkpoint: on nothing else.

Noise of seed i: a CPU torch.Generator seeded with i, torch.randn(C, h, w) in float32; a consistency step draws its
fresh noise from the same generator afterwards, in float64. The network sees whole groups of GROUP rows, the last one
filled up with zeros: matrix products of odd sizes use other kernels, whose rounding would show through.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaflow_cli.core import pixels, sampler
from alphaflow_cli.engine.build import DTYPES, build_network, label_rows, null_label
from alphaflow_cli.engine.checkpoint import Checkpoint, load_checkpoint
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import Autoencoder, load_autoencoder
from alphaflow_cli.recipe.schema import Recipe

GROUP = 16


@dataclass(frozen=True)
class Walk:
    """How noise becomes data: the grid, the step, the guidance at sampling."""

    sampler: str
    grid: tuple[float, ...]
    guidance: float

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance at sampling doubles them."""
        return sampler.grid_evaluations(self.sampler, len(self.grid) - 1) * (2 if self.guidance != 1.0 else 1)

    def __str__(self) -> str:
        grid = ", ".join(f"{t:g}" for t in self.grid)
        return f"{self.sampler} on {grid}" + (f", guidance {self.guidance:g}" if self.guidance != 1.0 else "")


def plan_walk(
    recipe: Recipe, *, nfe: int, kind: str = "auto", times: Sequence[float] | None = None, guidance: float | None = None
) -> Walk:
    """What the recipe publishes for this NFE, unless asked otherwise."""
    said = recipe.sample
    scale = said.guidance if guidance is None else guidance
    _check_guidance(recipe, scale)
    if times is not None:
        _check_grid(times)
        return Walk(said.sampler if kind == "auto" else kind, tuple(times), scale)
    if nfe < 1:
        raise AlphaflowError(f"--nfe {nfe}: at least one network evaluation per image is needed.")
    if kind == "auto" and nfe == said.nfe and said.times is not None:
        return Walk(said.sampler, said.times, scale)
    if kind == "auto" and nfe == 2 and said.sampler not in ("flow", "heun"):
        return Walk(said.two_step_sampler, said.two_step_times, scale)
    chosen = said.sampler if kind == "auto" else kind
    if chosen == "heun" and nfe % 2 == 0:
        raise AlphaflowError(f"--nfe {nfe}: heun takes two evaluations per step and one on the last: 1, 3, 5, …")
    steps = (nfe + 1) // 2 if chosen == "heun" else nfe
    return Walk(chosen, tuple(sampler.time_grid(steps)), scale)


def _check_grid(times: Sequence[float]) -> None:
    falls = all(a > b for a, b in zip(times[:-1], times[1:], strict=True))
    if len(times) < 2 or times[0] != 1.0 or times[-1] != 0.0 or not falls:
        raise AlphaflowError(f"--times {','.join(f'{t:g}' for t in times)}: a grid falls from 1 to 0, such as 1,0.55,0.")


def _check_guidance(recipe: Recipe, scale: float) -> None:
    mix = recipe.guidance
    if scale == 1.0:
        return
    if (mix.omega, mix.kappa) != (1.0, 0.0):
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: guidance {mix.omega / (1 - mix.kappa):g} is built into these weights by "
            f"training (omega {mix.omega:g}, kappa {mix.kappa:g}); sample them with guidance 1."
        )
    if mix.label_dropout == 0.0 or recipe.data.classes == 0:
        raise AlphaflowError(
            f"guidance {scale:g} at sampling: this model has no null label (trained with guidance.label_dropout 0)."
        )


def draw_labels(seeds: Sequence[int], classes: int, draw: str) -> list[int]:
    """`random`: RandomState(seed).choice(classes), the published rule; `balanced`: seed modulo classes."""
    if classes == 0 or draw == "balanced":
        return [seed % classes if classes else 0 for seed in seeds]
    return [int(np.random.RandomState(seed % 2**32).choice(classes)) for seed in seeds]


class Generator:
    """A network with everything around it; call `images` or `latents`."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, net: nn.Module | None = None) -> None:
        self.folder = Path()  # the checkpoint's: a converted or pulled one may have its autoencoder beside it
        self.recipe, self.origin, self.device = checkpoint.recipe, checkpoint.origin, device
        self.mean, self.std = checkpoint.mean.to(device), checkpoint.std.to(device)
        self.net = net or load_network(checkpoint).to(device).eval()
        self.bf16 = self.recipe.train.precision == "bf16" and device.type == "cuda"
        self._autoencoder: Autoencoder | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        data = self.recipe.data
        return data.channels, data.latent_size, data.latent_size

    @property
    def class_names(self) -> list[str]:
        """By index; empty where the checkpoint has none."""
        return [str(name) for name in self.origin.get("class_names") or []]

    @property
    def autoencoder(self) -> Autoencoder:
        """Loaded when the first picture is decoded."""
        if self._autoencoder is None:
            record: dict[str, Any] = self.origin.get("autoencoder") or {"id": self.recipe.data.autoencoder}
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            name = f"{record['id']}@{record['revision']}" if record.get("revision") else str(record["id"])
            name = str(self.folder / name) if (self.folder / name / "config.json").is_file() else name
            self._autoencoder = load_autoencoder(name, device=self.device, dtype=dtype)
            check_autoencoder(self._autoencoder, record)
        return self._autoencoder

    @property
    def precision(self) -> str:
        """Of the network and the decoder, as the protocol says it."""
        return "bf16 network, bf16 decoder" if self.bf16 else "fp32"

    def synchronise(self) -> None:
        """Wait for the device, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def use_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Decode with this copy of the checkpoint's autoencoder."""
        check_autoencoder(autoencoder, self.origin.get("autoencoder") or {})
        self._autoencoder = autoencoder

    @torch.no_grad()
    def latents(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        """(n, C, h, w) float64, the network's own normalised latents."""
        groups = [slice(i, i + GROUP) for i in range(0, len(seeds), GROUP)] if self.device.type == "cpu" else [slice(None)]
        return torch.cat([self._group(seeds[part], labels[part], walk) for part in groups])

    def _group(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        spare = -len(seeds) % GROUP
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(dtype: torch.dtype) -> Tensor:
            rows = [torch.randn(self.shape, generator=g, dtype=dtype) for g in generators]
            return torch.stack(rows + [torch.zeros(self.shape, dtype=dtype)] * spare).to(self.device)

        y = torch.tensor([*labels, *[0] * spare], device=self.device)
        net: sampler.Net = self._call
        if walk.guidance != 1.0:
            net = sampler.guided_net(net, null_label(self.recipe), walk.guidance)
        out = sampler.sample(
            net, draw(torch.float32), y, grid=walk.grid, sampler=walk.sampler, fresh_noise=lambda: draw(torch.float64)
        )
        return out[: len(seeds)]

    def _call(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """The network in its own precision; the state stays float64."""
        dtype = next(self.net.parameters()).dtype
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            u: Tensor = self.net(x.to(dtype), t.to(dtype), r.to(dtype), y)
        return u

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to uint8 pictures (n, 3, H, W); whole groups again, for the same reason."""
        raw = latents * self.std + self.mean
        spare = -len(raw) % GROUP if self.autoencoder.module is not None else 0
        raw = torch.cat([raw, raw.new_zeros((spare, *raw.shape[1:]))]) if spare else raw
        decoded = torch.cat([self.autoencoder.decode(part.float()) for part in raw.split(GROUP)])[: len(latents)]
        return pixels.to_uint8(decoded, self.recipe.data.pixels)

    def images(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        """uint8 (n, 3, H, W) on the device."""
        return self.decode(self.latents(seeds, labels, walk))

    def batches(
        self, seeds: Sequence[int], labels: Sequence[int], walk: Walk, *, batch: int
    ) -> Iterator[tuple[Sequence[int], Sequence[int], Tensor]]:
        """(seeds, labels, pictures), batch by batch."""
        for i in range(0, len(seeds), batch):
            part = slice(i, i + batch)
            yield seeds[part], labels[part], self.images(seeds[part], labels[part], walk)


def load_network(checkpoint: Checkpoint) -> nn.Module:
    """The recipe's network with the checkpoint's weights; a shape that does not fit is named."""
    net = build_network(checkpoint.recipe).to(DTYPES[checkpoint.recipe.train.precision])
    try:
        net.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise AlphaflowError(f"the checkpoint's weights do not fit its own recipe: {str(error)[:400]}") from error
    return net


def check_autoencoder(autoencoder: Autoencoder, record: dict[str, Any]) -> None:
    """Latents must be decoded by the network that encoded them."""
    wanted = record.get("weights_sha256")
    if wanted and autoencoder.weights_sha256 != wanted:
        raise AlphaflowError(
            f"the autoencoder {autoencoder.id} has weights {autoencoder.weights_sha256[:12]}…, the latents were made "
            f"with {wanted[:12]}…. Give the right one: --autoencoder DIR."
        )


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_checkpoint(address: str, *, weights: str = "ema") -> Path:
    """A file, a run folder (its newest), or a Hub id."""
    path = Path(address)
    if path.is_dir():
        if weights == "ema" and (path / "model.safetensors").exists():
            return path / "model.safetensors"
        name = "model.safetensors" if weights == "ema" else "raw.safetensors"
        found = [path / name] if (path / name).exists() else sorted(path.glob(f"checkpoints/step-*/{name}"))
        if not found:
            raise AlphaflowError(f"{path}: no checkpoint in this folder yet. Train one: alphaflow train RECIPE --out {path}")
        return found[-1]
    if path.exists() or address.endswith((".safetensors", ".pt", ".yaml")) or address.startswith((".", "/", "~")):
        return path
    from alphaflow_cli.hub import resolve_checkpoint

    return resolve_checkpoint(address)


def open_generator(address: str, *, device: torch.device | None = None, weights: str = "ema") -> Generator:
    """Ready to sample."""
    checkpoint = load_checkpoint(path := find_checkpoint(address, weights=weights))
    if weights == "raw" and checkpoint.origin.get("weights") != "raw":
        raise AlphaflowError(f"{address}: holds averaged weights only; --weights raw needs a run folder.")
    generator = Generator(checkpoint, device=device or best_device())
    generator.folder = path.parent
    return generator


def has_labels(recipe: Recipe) -> bool:
    """Whether samples have a class."""
    return label_rows(recipe) > 0
