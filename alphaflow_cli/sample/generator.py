"""From a checkpoint to pictures. Sample i depends on its seed, its label and the checkpoint: on nothing else.

Noise of seed i: a CPU torch.Generator seeded with i, torch.randn(C, h, w) in float32; a consistency step draws its
fresh noise from the same generator afterwards, in float64. The network sees whole groups of GROUP rows, the last one
filled up with zeros: matrix products of odd sizes use other kernels, whose rounding would show through.

The decoder makes pictures of latents in one of two precisions:

    fp32    true float32: TF32, a GPU's default for convolutions, is switched off
    bf16    bfloat16; on a CPU and compiled in channels_last, which a GPU's eager kernels are slower with (measured)

It is compiled where the verb wants it and torch.compile can: `eval` from COMPILED_FROM pictures on, `sample` when
asked, since a compiled decoder rounds at other places. It sees groups of GROUP rows as the network does, of MANY where
`eval` decodes many pictures eagerly on a GPU; a compiled decoder would need one form for each size otherwise.

Everybody who draws (sample, eval, the grids of train and push, Python users) reads `Generator.stream`, batch by batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from alphaflow_cli.core import pixels, sampler
from alphaflow_cli.core.path import Net
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import changed, sha256_of, stamp_of
from alphaflow_cli.model.build import DTYPES, build_network
from alphaflow_cli.model.checkpoint import Checkpoint, check_autoencoder, load_checkpoint
from alphaflow_cli.model.compiling import can_compile, compile_by, compile_part
from alphaflow_cli.model.find import find_checkpoint
from alphaflow_cli.nn.autoencoder import Autoencoder, load_autoencoder
from alphaflow_cli.recipe.plan import label_rows, null_label
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.precision import exact_device, has_bf16, true_float32
from alphaflow_cli.runtime.processes import choose_device
from alphaflow_cli.runtime.transfer import Laps
from alphaflow_cli.sample.walk import LazyLabels, Walk

DecoderPrecision = Literal["fp32", "bf16"]
DecoderChoice = Literal["auto", "fp32", "bf16"]
DECODER_DTYPES: dict[DecoderPrecision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
GROUP = 16
MANY, MANY_FROM, MANY_MEMORY = 64, 1_000, 40e9  # rows, pictures, a GPU's bytes: 371 pictures/s, not 294 (one H100)
COMPILED_FROM = 12_000  # pictures of 256 px: 14 s / (1/371 s − 1/658 s), eager and compiled pictures/s of an H100


@dataclass(frozen=True)
class Decoder:
    """How an autoencoder is made ready to decode."""

    precision: DecoderPrecision
    compiled: bool = False
    group: int = GROUP
    backend: Any = "inductor"  # of torch.compile

    def load(self, name: str, device: torch.device) -> Autoencoder:
        """The autoencoder of that name. Nothing is compiled before the first group."""
        last = self.precision == "bf16" and (self.compiled or device.type != "cuda")
        autoencoder = load_autoencoder(name, device=device, dtype=DECODER_DTYPES[self.precision], channels_last=last)
        if self.compiled and autoencoder.module is not None:
            part: Any = autoencoder.module.decoder
            compile_part(part, self.backend)  # in place: the weights keep their names
        return autoencoder


def plan_decoder(choice: DecoderChoice, device: torch.device, *, pictures: int, compiled: bool) -> Decoder:
    """Auto is bf16 on a GPU that has it, else fp32. `pictures`: of all processes, so that sharing them changes none."""
    if choice not in get_args(DecoderChoice):
        raise AlphaflowError(f"decoder {choice!r}: there are {', '.join(get_args(DecoderChoice))}")
    on_gpu = device.type == "cuda"
    if choice == "fp32" or (choice == "auto" and not has_bf16(device)):
        return Decoder("fp32")
    if compiled and can_compile(device):
        return Decoder("bf16", compiled=True)
    return Decoder("bf16", group=MANY if on_gpu and pictures >= MANY_FROM and _is_large(device) else GROUP)


def decoder_pays(recipe: Recipe, pictures: int) -> bool:
    """Whether compiling the decoder pays for so many pictures."""
    return pictures * recipe.data.image_size**2 / 256**2 >= COMPILED_FROM


def _is_large(device: torch.device) -> bool:
    return bool(torch.cuda.get_device_properties(device).total_memory >= MANY_MEMORY)


def decode_in_groups(autoencoder: Autoencoder, latents: Tensor, group: int = GROUP) -> Tensor:
    """Raw latents (n, C, h, w) to float32 pixels (n, 3, H, W); whole groups."""
    count = len(latents)
    spare = -count % group if autoencoder.module is not None else 0
    rows = torch.cat([latents, latents.new_zeros((spare, *latents.shape[1:]))]) if spare else latents
    exact = autoencoder.dtype == torch.float32
    with true_float32() if exact else nullcontext():  # inside, TF32's old switches raise, and compilers may read them
        return torch.cat([autoencoder.decode(part.float()) for part in torch.split(rows, group)])[:count]


def precision_text(network: str, decoder: DecoderPrecision | None) -> str:
    """The precision of a picture in words, for the protocol; decoder None: pixels come from the network itself."""
    if network == "fp32" and decoder in (None, "fp32"):
        return "fp32"
    return f"{network} network" + (f", {decoder} decoder" if decoder else "")


@dataclass(frozen=True)
class Drawn:
    """Pictures drawn together: one batch of a stream."""

    span: slice  # which of the stream's seeds
    seeds: Sequence[int]
    labels: Sequence[int]
    latents: Tensor  # (n, C, h, w) float64, as the network made them
    unchecked: Tensor | None  # (n, 3, H, W) uint8 on the generator's device; None where only latents are wanted
    bad: Tensor | None  # (n,) which pictures have values that are not finite; nobody has looked at it yet
    far: Tensor | None  # (n,) how many values of each lie beyond ±1.2
    laps: Laps  # of the network and the decoder

    @property
    def images(self) -> Tensor | None:
        """The pictures; broken ones are refused, for which the host waits for the device."""
        if self.bad is not None:
            pixels.refuse_bad(self.bad)
        return self.unchecked

    def arrays(self) -> np.ndarray:
        """The pictures in memory, (n, H, W, 3), as files and grids take them."""
        images = self.images
        assert images is not None
        return np.ascontiguousarray(images.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy())

    def latent_arrays(self) -> np.ndarray:
        """The latents in memory, (n, C, h, w); those of a broken checkpoint are refused, as its pictures are."""
        pixels.refuse_bad(pixels.bad_pictures(self.latents))
        return self.latents.cpu().numpy()


class Generator:
    """A network with everything around it; `stream` draws its pictures, batch by batch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        net: nn.Module | None = None,
        decoder: DecoderChoice = "auto",
    ) -> None:
        self.folder = Path()  # the checkpoint's: a converted or pulled one may have its autoencoder beside it
        self.digest = ""  # sha256 of the file that these weights were read from; empty while a run holds them
        self.recipe, self.origin, self.device = checkpoint.recipe, checkpoint.origin, device
        self.exact = exact_device(device)
        self.mean, self.std = checkpoint.mean.to(self.exact), checkpoint.std.to(self.exact)
        self.net = net or load_network(checkpoint).to(device).eval()
        self.bf16 = self.recipe.train.precision == "bf16" and has_bf16(device)
        self.decoder = plan_decoder(decoder, device, pictures=0, compiled=False)
        record: dict[str, Any] = self.origin.get("autoencoder") or {}  # of the one that made the latents
        self._record = record if record.get("id") else {**record, "id": self.recipe.data.autoencoder}
        self.has_decoder = self._record["id"] != "none"  # the network makes latents, not pixels
        self.named_decoder = ""  # sha256 of the weights that were named, where the checkpoint does not know its own

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of one latent."""
        data = self.recipe.data
        return data.channels, data.latent_size, data.latent_size

    @property
    def class_names(self) -> list[str]:
        """By index; empty where the checkpoint has none, and for a model without labels, whatever its store had."""
        known = self.origin.get("class_names") if label_rows(self.recipe) else None
        return [str(name) for name in known or []]

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Loaded when the first picture is decoded: the one beside the checkpoint, else by its id; a store made with a
        local one knows its bare name only, so then the recipe's."""
        record, of_recipe = self._record, self.recipe.data.autoencoder
        name = f"{record['id']}@{record['revision']}" if record.get("revision") else str(record["id"])
        if (self.folder / name / "config.json").is_file():
            name = str(self.folder / name)
        elif "/" not in name and not Path(name).exists() and of_recipe != "none" and self.has_decoder:
            name = of_recipe
        return self._load_autoencoder(name)

    def _load_autoencoder(self, name: str) -> Autoencoder:
        """Whichever it is, its weights are checked against those that made the latents."""
        autoencoder = self.decoder.load(name, self.device)
        check_autoencoder(autoencoder, self._record)
        return autoencoder

    @property
    def precision(self) -> str:
        """The precision of the network and of the decoder, as the protocol says it."""
        trained = self.recipe.train.precision
        network = "fp32" if trained == "bf16" and not self.bf16 else trained
        compiled = ", compiled" if self.decoder.compiled else ""
        return precision_text(network, self.decoder.precision if self.has_decoder else None) + compiled

    def expect(self, pictures: int, *, compiled: bool, autoencoder: str) -> None:
        """Get ready for so many pictures of all processes together, with a compiled decoder where that can be.

        `autoencoder`: another copy of the checkpoint's. Where compiling fails, a line says so, and nothing is compiled.
        """
        assert "autoencoder" not in vars(self), "expect comes before the first picture"
        compiled = compiled and self.has_decoder
        self.decoder = plan_decoder(self.decoder.precision, self.device, pictures=pictures, compiled=compiled)
        if autoencoder:
            self.use_autoencoder(autoencoder)

        def first() -> None:
            self.decode(torch.zeros((1, *self.shape), dtype=torch.float64, device=self.device))

        def undo() -> None:
            self.decoder = replace(self.decoder, compiled=False)
            del self.autoencoder
            if autoencoder:
                self.use_autoencoder(autoencoder)

        if self.decoder.compiled:
            compile_by(first, undo=undo, what="the decoder")

    def use_autoencoder(self, name: str) -> None:
        """Decode with this copy of the checkpoint's autoencoder; one that does not fit the latents is refused."""
        if not self.has_decoder:
            raise AlphaflowError(f"--autoencoder {name}: this model makes pixels without one; leave it out.")
        there, data = self._load_autoencoder(name), self.recipe.data
        side = there.downscale * data.latent_size
        if (there.channels, side) != (data.channels, data.image_size):
            raise AlphaflowError(
                f"--autoencoder {name}: makes {side} px of {there.channels}×{data.latent_size}×{data.latent_size} "
                f"latents, and this model's are of {data.image_size} px and {data.channels} channels. Give the one "
                "that made the latents."
            )
        self.autoencoder = there
        if not self._record.get("weights_sha256"):
            self.named_decoder = self.autoencoder.weights_sha256

    @torch.no_grad()
    def latents(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        """(n, C, h, w) float64, the network's own normalised latents."""
        groups = [slice(None)]
        if self.device.type == "cpu":
            groups = [slice(i, i + GROUP) for i in range(0, len(seeds), GROUP)]
        return torch.cat([self._group(seeds[part], labels[part], walk) for part in groups])

    def _group(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        spare = -len(seeds) % GROUP
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(dtype: torch.dtype) -> Tensor:
            rows = [torch.randn(self.shape, generator=g, dtype=dtype) for g in generators]
            return to_device(torch.stack(rows + [torch.zeros(self.shape, dtype=dtype)] * spare), self.exact)

        y = to_device(torch.tensor([*labels, *[0] * spare]), self.device)
        net: Net = partial(self._call, guide=walk.guide)
        if walk.guidance != 1.0:
            net = sampler.guided_net(net, null_label(self.recipe), walk.guidance, channels=walk.guidance_channels)
        out = sampler.sample(
            net, draw(torch.float32), y, grid=walk.grid, sampler=walk.sampler, fresh_noise=lambda: draw(torch.float64)
        )
        return out[: len(seeds)]

    def _call(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, *, guide: tuple[float, float, float] | None) -> Tensor:
        """The network in its own precision; the state stays float64."""
        dtype = next(self.net.parameters()).dtype
        inputs = {}
        if guide is not None:
            inputs["guide"] = to_device(torch.tensor(guide, dtype=t.dtype).to(dtype), self.device).expand(len(t), 3)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            u: Tensor = self.net(*(value.to(dtype).to(self.device) for value in (x, t, r)), y, **inputs)
        return u.to(self.exact)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to uint8 pictures (n, 3, H, W); whole groups again, for the same reason."""
        return pixels.to_uint8(self._decoded(latents), self.recipe.data.pixels)

    def _decoded(self, latents: Tensor) -> Tensor:
        raw = (latents * self.std + self.mean).float().to(self.device)
        return decode_in_groups(self.autoencoder, raw, self.decoder.group)

    def images(self, seeds: Sequence[int], labels: Sequence[int], walk: Walk) -> Tensor:
        """One batch of pictures, uint8 (n, 3, H, W) on the device."""
        return self.decode(self.latents(seeds, labels, walk))

    def stream(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | LazyLabels,
        walk: Walk,
        spans: Iterable[slice],
        *,
        decoded: bool = True,
    ) -> Iterator[Drawn]:
        """Draw these spans of the seeds, one after the other; nothing of a former one is kept.

        Seeds and labels may be worked out when a span is read, so that a million of them take no memory. On a GPU the
        work is queued, and nothing here waits for it.
        """
        for span in spans:
            some, classes = seeds[span], labels[span]
            laps, images, bad, far = Laps(self.device), None, None, None
            latents = self.latents(some, classes, walk)
            laps.end("network")
            if decoded:
                made = self._decoded(latents)
                bad, far = pixels.bad_pictures(made), pixels.far_values(made)
                images = pixels.quantise(made, self.recipe.data.pixels)
            laps.end("decoder")
            yield Drawn(span, some, classes, latents, images, bad, far, laps)


def spans_of(count: int, batch: int) -> Iterator[slice]:
    """Cut so many pictures into batches; the last one may be smaller."""
    return (slice(first, min(first + batch, count)) for first in range(0, count, batch))


def pictures(
    generator: Generator, seeds: Sequence[int], labels: Sequence[int] | LazyLabels, walk: Walk, *, batch: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Seed, label and uint8 picture (H, W, 3), one after the other as they are drawn."""
    for drawn in generator.stream(seeds, labels, walk, spans_of(len(seeds), batch)):
        yield from zip(drawn.seeds, drawn.labels, drawn.arrays(), strict=True)


def load_network(checkpoint: Checkpoint) -> nn.Module:
    """The recipe's network with the checkpoint's weights."""
    net = build_network(checkpoint.recipe).to(DTYPES[checkpoint.recipe.train.precision])
    net.load_state_dict(checkpoint.weights)
    return net


def open_generator(
    address: str, *, device: torch.device | None = None, weights: str = "ema", decoder: DecoderChoice = "auto"
) -> Generator:
    """Load a checkpoint (a file, a run folder, an address on the Hub), ready to sample; on a GPU where there is one."""
    path, checkpoint, digest = read_hashed(address, weights)
    if weights == "raw" and checkpoint.origin.get("weights") != "raw":
        raise AlphaflowError(f"{address}: holds averaged weights only; --weights raw needs a run folder.")
    generator = Generator(checkpoint, device=device or choose_device(None), decoder=decoder)
    if decoder != "auto" and not generator.has_decoder:
        raise AlphaflowError(f"--decoder {decoder}: this model makes pixels without a decoder; leave it out.")
    generator.folder, generator.digest = path.parent, digest
    return generator


READINGS = 3  # of a checkpoint that a training run replaces meanwhile; a save takes far longer than a reading


def read_hashed(address: str, weights: str) -> tuple[Path, Checkpoint, str]:
    """A checkpoint's path, content and sha256: of the bytes that were loaded, though a run may replace the file."""
    for _ in range(READINGS):
        path = find_checkpoint(address, weights=weights)
        before = stamp_of(path) if path.is_file() else None
        digest = sha256_of(path) if before else ""  # what is wrong with it, the reader says better
        checkpoint = load_checkpoint(path)
        if before == stamp_of(path):
            return path, checkpoint, digest
    raise changed(path)
