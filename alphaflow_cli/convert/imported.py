"""What a family's reader hands over, and how it becomes a recipe: each fact with where it comes from.

The statistics of the latents, which few files hold, come from the file, from --latents or from a convention.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alphaflow_cli.convert.arguments import plain_arguments
from alphaflow_cli.convert.shape import HEADS, NetworkShape
from alphaflow_cli.convert.source import read_source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import check_new, user_path
from alphaflow_cli.recipe import Recipe, dump_recipe, load_recipe, recipe_from_text

Family = Literal["auto", "alphaflow", "sit", "dit", "repa", "meanflow", "fastgen", "soflow", "imf"]
AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"
SD_SCALE = 0.18215  # of the Stable Diffusion autoencoders: 1 / std of a latent
ZHUYU_SCALE = 0.18125  # in zhuyu-cs/MeanFlow's trainer: written so, and its networks are trained to it
MEANFLOW_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)  # per channel, there for two days before that
MEANFLOW_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)  # the same; x = (latent − mean) · 0.5 / std
FORM = "--latents takes scale:0.18215 (or another number), meanflow, or a .safetensors file with mean and std"


@dataclass(frozen=True)
class ConvertOptions:
    """What the command line of `convert` says besides the file."""

    family: Family = "auto"
    recipe: str | None = None  # the recipe it was trained by, where the file does not say
    sets: tuple[str, ...] = ()
    latents: str | None = None  # the latents' statistics: scale:S, meanflow, or a file with mean and std
    autoencoder: str | None = None
    weights: Literal["ema", "raw"] = "ema"

    def values_of(self, key: str) -> list[str]:
        """What `--set` gives to a key; of several values the last counts."""
        pairs = (text.partition("=") for text in self.sets)
        return [value.strip() for name, _, value in pairs if name.strip() == key]

    def number(self, key: str) -> float | None:
        """The number that `--set` gives to a key which is needed before the recipe stands, such as model.heads.

        None where there is none, or no number: the recipe's own check then speaks of it.
        """
        try:
            value = float(self.values_of(key)[-1])
        except (IndexError, ValueError):
            return None
        return value if math.isfinite(value) else None

    @property
    def names_guidance(self) -> bool:
        """Whether the command line says with which guidance the network was trained."""
        return bool(self.recipe) or any(text.startswith("guidance.") for text in self.sets)


@dataclass(frozen=True)
class Latents:
    """How the network's x comes from a latent: x = (latent − mean) / std."""

    mean: Tensor  # float64, broadcastable to (C, h, w)
    std: Tensor
    normalise: Literal["position", "channel", "scale"]
    source: str  # where the numbers come from, in words
    inside: bool = False  # whether they stood in the file itself
    constants: bool = False  # whether they are constants per channel, which the recipe then gives


@dataclass(frozen=True)
class ForeignFile:
    """A foreign file while it is read: what is in it, what the command line says, what was filled in."""

    tree: dict[str, Any]
    path: Path
    options: ConvertOptions
    filled: dict[str, str] = field(default_factory=dict)  # facts that are not in it, and where they were taken from

    @property
    def name(self) -> str:
        """The name of the file without its folders, for messages."""
        return self.path.name

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The training arguments that were kept beside the weights."""
        return plain_arguments(self.tree)

    def pick(self, names: Mapping[str, tuple[str, ...]], tree: dict[str, Any] | None = None) -> tuple[object, str]:
        """Choose the EMA or the raw table of a checkpoint, and say which it is.

        Where the wanted one is missing and the other is there, the error names both.
        """
        tree, wanted = self.tree if tree is None else tree, self.options.weights
        for key in names[wanted]:
            if isinstance(tree.get(key), dict) and tree[key]:
                return tree[key], wanted
        other = "raw" if wanted == "ema" else "ema"
        if any(isinstance(tree.get(key), dict) and tree[key] for key in names[other]):
            raise AlphaflowError(
                f"{self.name}: holds no {wanted} weights, only {other}. Convert those knowingly: --weights {other}"
            )
        reason = "--weights raw" if wanted == "raw" else "released tables usually hold these"
        self.filled["weights"] = f"{wanted} ({reason}; a bare table does not say)"
        return tree, wanted

    def heads(self, dim: int, stated: float | None = None) -> int:
        """The number of attention heads: the file's, else that of --set or of the published network of this width."""
        by_set = bool(self.options.values_of("model.heads"))
        wanted = self.options.number("model.heads") if stated is None else stated
        if wanted is None and dim not in HEADS:
            raise AlphaflowError(
                f"{self.name}: does not say how many attention heads it has, and {dim} channels are none of the "
                f"published sizes ({', '.join(map(str, HEADS))}). Say it: --set model.heads=N"
            )
        heads = HEADS[dim] if wanted is None else int(wanted)
        if heads < 1 or dim % heads or (wanted is not None and heads != wanted):
            raise AlphaflowError(
                f"{self.name}: {wanted} attention heads do not divide {dim} channels. --set model.heads=N"
            )
        if stated is None or by_set:
            source = "--set model.heads" if by_set else f"of the published size with {dim} channels"
            self.filled["heads"] = f"{heads} ({source})"
        return heads

    def base_recipe(self, default: str, published: str | None = None) -> Recipe:
        """Load the recipe that the facts of the file are put into, and note which it is and why.

        It is the one of the command line, else the published one that the file's name points to, else `default`.
        """
        name = self.options.recipe or published or default
        reason = "--recipe" if self.options.recipe else "the file's name" if published else "no better knowledge"
        self.filled["recipe"] = f"{name} ({reason}): everything that the file does not say"
        recipe = load_recipe(name)
        return recipe if self.options.recipe or published else replace(recipe, expected=())  # another model's scores

    def scaled_latents(self, scale: float, reason: str) -> Latents:
        """The statistics of --latents, else a scale that the family has by convention."""
        latents = self.options.latents
        return parse_latents(latents) if latents else scaled(scale, f"latent · {scale}{reason}")


@dataclass
class Imported:
    """One checkpoint of another system, translated to our names, with everything that is known about it."""

    file: ForeignFile
    family: Family
    weights: dict[str, Tensor]  # ours
    which: str  # "ema" or "raw"
    shape: NetworkShape
    heads: int
    latents: Latents
    base: Recipe  # what it was trained by, as far as known
    autoencoder: dict[str, Tensor] = field(default_factory=dict)  # weights inside the file
    step: int | None = None
    stated: dict[str, Any] = field(default_factory=dict)  # facts that stood in the file
    unread: tuple[str, ...] = ()  # what else the file says of the training, and nothing here has a place for


def step_in_file(value: object) -> int | None:
    """Read a training step from a checkpoint; None for anything that cannot be one."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12:
        return value
    return None


def check_out(out: Path) -> None:
    """Refuse a file to write that exists already, or whose folder does not."""
    if not out.parent.is_dir():
        raise AlphaflowError(f"{out.parent}: no such folder; make it first.")
    check_new(out)


def with_facts(recipe: Recipe, facts: Mapping[str, Any]) -> Recipe:
    """Put values into a recipe by their dotted names; they are checked later, with the whole recipe."""
    for name, value in facts.items():
        section, _, field_ = name.partition(".")
        value = replace(getattr(recipe, section), **{field_: value}) if field_ else value
        recipe = replace(recipe, **{section: value})
    return recipe


def complete(foreign: Imported, out: Path) -> Recipe:
    """Put what the file says into the base recipe, then what the command line says, and check the whole."""
    shape, base, options = foreign.shape, foreign.base, foreign.file.options
    _check_sets(options)
    requested = options.number("guidance.label_dropout")
    dropout = (base.guidance.label_dropout if requested is None else requested) if shape.label_rows else 0.0
    classes = max(shape.label_rows - (dropout > 0), 0)
    scale, shift = _scale(foreign)
    model = replace(
        base.model,
        dim=shape.dim,
        depth=shape.depth,
        heads=foreign.heads,
        patch=shape.patch,
        mlp_ratio=shape.mlp_ratio,
        qk_norm=shape.qk_norm,
    )
    data = replace(
        base.data,
        channels=shape.channels,
        latent_size=shape.latent_size,
        image_size=shape.latent_size * _downscale(foreign),
        classes=classes,
        autoencoder=_autoencoder(foreign, out),
        normalise=foreign.latents.normalise,
        channel_mean=_constants(foreign.latents.mean, foreign),
        channel_std=_constants(foreign.latents.std, foreign),
        scale=scale,
        shift=shift,
        store="",
        source="",
    )
    guidance = replace(base.guidance, label_dropout=dropout)
    expected = base.expected if (model, classes) == (base.model, base.data.classes) else ()  # of that network only
    recipe = replace(base, name=_name(out), model=model, data=data, guidance=guidance, expected=expected)
    return recipe_from_text(dump_recipe(recipe), f"{out.name} (its recipe)", options.sets)


def _check_sets(options: ConvertOptions) -> None:
    """Refuse `--set` of the normalisation: it belongs together with the statistics, and --latents sets both."""
    for key in ("data.scale", "data.shift", "data.normalise", "data.channel_mean", "data.channel_std"):
        if options.values_of(key):
            raise AlphaflowError(
                f"--set {key}: would change the recipe and not the statistics stored with it. "
                "Say it with --latents: scale:0.18215, meanflow, or a .safetensors file with mean and std."
            )


def _scale(foreign: Imported) -> tuple[float, float]:
    if foreign.latents.normalise != "scale":
        return 1.0, 0.0
    return 1 / float(foreign.latents.std.flatten()[0]), float(foreign.latents.mean.flatten()[0])


def _constants(values: Tensor, foreign: Imported) -> tuple[float, ...] | None:
    return tuple(values.flatten().tolist()) if foreign.latents.constants else None


def _downscale(foreign: Imported) -> int:
    """Pixels per latent, by the autoencoder inside; without one 8, as of every Stable Diffusion autoencoder."""
    if foreign.file.options.autoencoder == "none":
        return 1
    levels = {name.split(".")[2] for name in foreign.autoencoder if name.startswith("encoder.down_blocks.")}
    return int(2 ** min(len(levels) - 1, 12)) if levels else 8  # beyond 12 no network is: refused where it is built


def _autoencoder(foreign: Imported, out: Path) -> str:
    named, filled = foreign.file.options.autoencoder, foreign.file.filled
    if named:
        filled["autoencoder"] = f"{named} (--autoencoder)"
        return named
    if foreign.autoencoder:
        return autoencoder_folder(out).name
    filled["autoencoder"] = f"{foreign.base.data.autoencoder} (the recipe's; --autoencoder names another)"
    return foreign.base.data.autoencoder


def autoencoder_folder(out: Path) -> Path:
    """The folder beside a converted checkpoint into which the autoencoder of a snapshot is written."""
    return out.with_name(f"{out.stem}-autoencoder")


def _name(out: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "-", out.stem).lstrip("._+-") or "converted"


def scaled(scale: float, source: str) -> Latents:
    """The statistics of latents that are only multiplied: x = latent · scale."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return Latents(mean=0 * one, std=one / scale, normalise="scale", source=source)


def per_channel(mean: tuple[float, ...], std: tuple[float, ...], source: str) -> Latents:
    """The statistics of latents that are normalised by constants, one of each for a channel."""
    m, s = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return Latents(mean=m, std=s, normalise="channel", source=source, constants=True)


def meanflow(source: str) -> Latents:
    """The per-channel statistics of zhuyu-cs/MeanFlow; its x has a standard deviation of 0.5."""
    return replace(per_channel(MEANFLOW_MEAN, tuple(std / 0.5 for std in MEANFLOW_STD), source), constants=False)


def parse_latents(text: str) -> Latents:
    """Read the value of --latents: a scale, `meanflow`, or a file."""
    shown = text if len(text) <= 60 else f"{text[:57]}…"
    if text == "meanflow":
        return meanflow("--latents meanflow")
    if text.startswith("scale:"):
        try:
            scale = float(text[6:])
        except ValueError as error:
            raise AlphaflowError(f"{shown!r}: {FORM}.") from error
        if not (0 < scale < math.inf and 1 / scale < math.inf):
            raise AlphaflowError(f"{shown!r}: a scale is a number above 0. {FORM}.")
        return scaled(scale, f"--latents {text}")
    if not text.endswith(".safetensors"):
        raise AlphaflowError(f"{shown!r}: {FORM}.")
    return _from_file(user_path(text))


def _from_file(path: Path) -> Latents:
    """Read `mean` and `std` from a safetensors file, or `latents.mean` and `latents.std` as in ours."""
    named = {name.removeprefix("latents."): value for name, value in read_source(path).items()}
    tensors: dict[str, Tensor] = {name: value for name, value in named.items() if name in ("mean", "std")}
    if tensors.keys() != {"mean", "std"}:
        raise AlphaflowError(f"{path}: holds no mean and std. {FORM}.")
    if not all(value.is_floating_point() for value in tensors.values()):
        raise AlphaflowError(f"{path}: its mean and std are no floating-point numbers. {FORM}.")
    return statistics(tensors["mean"], tensors["std"], str(path.name))


def statistics(mean: Tensor, std: Tensor, source: str) -> Latents:
    """Check a mean and a standard deviation, and drop their batch axis.

    They count per position where they have several positions, else per channel.
    """
    if mean.ndim not in (3, 4) or mean.shape != std.shape or mean.shape[:-3] not in ((), (1,)):
        raise AlphaflowError(
            f"{source}: mean and std have the shapes {tuple(mean.shape)} and {tuple(std.shape)}; "
            "wanted (C, 1, 1) or (C, h, w), both the same."
        )
    mean, std = (value.double().reshape(value.shape[-3:]) for value in (mean, std))
    good = torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()
    if not good:
        raise AlphaflowError(f"{source}: the latents' mean and std are not finite and positive.")
    return Latents(mean=mean, std=std, normalise="position" if mean.shape[-1] > 1 else "channel", source=source)
