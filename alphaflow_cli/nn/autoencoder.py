"""Autoencoders behind one interface, by diffusers: pixels in [-1, 1] to raw latents and back.

    encode: pixels (n, 3, H, W) → mean, std of the posterior, each (n, C, h, w); std = 0 where there is none
    decode: raw latents → pixels; nothing is scaled or shifted here, `scale` and `shift` are the model's own convention

An autoencoder is named by a folder (config.json and weights), a file of AutoencoderKL weights (.safetensors, or .pt as
published with α-Flow), a Hub id (user/repo, user/repo/subfolder, either with @revision), or `none`: pixels themselves.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, check_shape, read_json
from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.nn.autoencoder_files import ask_hub, cached, has_weights, kl_config, read_weights, rename
from alphaflow_cli.nn.weights import check_real
from alphaflow_cli.remote.faults import hub_faults
from alphaflow_cli.text import for_terminal

Kind = Literal["kl", "tiny", "dc", "none"]
CLASSES: dict[str, Kind] = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "AutoencoderDC": "dc"}
WIDTHS = Maybe(ListOf(Whole(1, 1 << 14), least=1, most=12))
CONFIG = Table(  # of what config.json holds, whatever decides about memory or is used here; diffusers reads the rest
    {"_class_name": Text(one_of=tuple(CLASSES))},
    {
        "block_out_channels": WIDTHS,
        "encoder_block_out_channels": WIDTHS,
        "decoder_block_out_channels": WIDTHS,
        "latent_channels": Whole(1, 1 << 12),
        "in_channels": Whole(1, 1 << 10),
        "out_channels": Whole(1, 1 << 10),
        "layers_per_block": Whole(0, 1 << 8),
        "scaling_factor": Maybe(Number()),
        "shift_factor": Maybe(Number()),
    },
    others=Anything(),
)
ADVICE = "Give another autoencoder: a folder, a weights file or a Hub id."
READING = (*DAMAGE, RuntimeError, ArithmeticError, SafetensorError)  # what diffusers raises on files that are not right
LOGVAR = (-30.0, 20.0)  # bounds of the posterior's log-variance, as every AutoencoderKL clamps it


@dataclass(frozen=True)
class Autoencoder:
    """One loaded autoencoder, or none."""

    id: str
    revision: str
    weights_sha256: str
    kind: Kind
    channels: int
    downscale: int
    scale: float
    shift: float
    module: nn.Module | None
    layout: torch.memory_format  # that the module's input is brought to

    @property
    def has_posterior(self) -> bool:
        """Latents are drawn, not looked up."""
        return self.kind == "kl"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.module is None else next(self.module.parameters()).dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, float32."""
        if self.module is None:
            return pixels, torch.zeros_like(pixels)
        mean, std = ENCODE[self.kind](self.module, self._input(pixels))
        return mean.float(), std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32, not clipped, in the plain layout."""
        if self.module is None:
            return latents
        pixels: Tensor = self.module.decode(self._input(latents)).sample  # type: ignore[operator]
        return pixels.float().contiguous()

    def _input(self, x: Tensor) -> Tensor:
        """In the weights' own precision, and in channels_last where they are."""
        return x.to(self.dtype, memory_format=self.layout)


def _encode_kl(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = module.encode(pixels).latent_dist.parameters.float().chunk(2, dim=1)
    return mean, (0.5 * logvar.clamp(*LOGVAR)).exp()


def _encode_tiny(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = module.encode(pixels).latents
    return mean, torch.zeros_like(mean)


def _encode_dc(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = module.encode(pixels).latent
    return mean, torch.zeros_like(mean)


ENCODE: dict[Kind, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "kl": _encode_kl,
    "tiny": _encode_tiny,
    "dc": _encode_dc,
}


def load_autoencoder(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    slicing: bool = False,
    tiling: bool = False,
) -> Autoencoder:
    """By name. To save memory, `slicing` decodes picture by picture (exact), `tiling` in blended tiles (not exact)."""
    if name == "none":
        return Autoencoder("none", "", "", "none", 3, 1, 1.0, 0.0, None, torch.preserve_format)
    module, revision = _load_module(name)
    digest = weights_sha256(module)
    nn.Module.to(module, device, dtype)  # diffusers' own .to warns of modules that these models do not have
    nn.Module.to(module, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    module.eval().requires_grad_(False)
    if slicing:
        module.enable_slicing()
    if tiling:
        module.enable_tiling()
    kind, config = CLASSES[type(module).__name__], module.config
    scale, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
    channels = int(config["latent_channels"])
    layout = torch.channels_last if channels_last else torch.preserve_format
    return Autoencoder(
        public_id(name), revision, digest, kind, channels, _downscale(kind, config), scale, shift, module, layout
    )


def weights_sha256(module: nn.Module) -> str:
    """Of all parameters' names and float32 values: the same for a .pt, a .safetensors and a Hub copy of one model."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _downscale(kind: Kind, config: Mapping[str, Any]) -> int:
    blocks = {"kl": "block_out_channels", "tiny": "encoder_block_out_channels", "dc": "encoder_block_out_channels"}
    return int(2 ** (len(config[blocks[kind]]) - 1))


def public_id(name: str) -> str:
    """Hub ids as they are; of a folder or file its own name: a store must not carry the machine's folders."""
    path = Path(name)
    return (path.resolve().name if path.exists() else name.split("@")[0]) or name


def _load_module(name: str) -> tuple[Any, str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path), ""
    if path.is_file():
        return _from_file(path), ""
    if name.startswith((".", "/", "~")) or name.endswith((".pt", ".safetensors")) or name.count("/") not in (1, 2):
        raise AlphaflowError(f"{name}: no such autoencoder. Give a folder, a weights file, a Hub id user/repo, or none")
    return _from_hub(name)


def _from_folder(folder: Path) -> Any:
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        raise AlphaflowError(f"{folder}: no autoencoder here (config.json is missing)")
    kind = read_json(config, CONFIG, advice=ADVICE)["_class_name"]
    try:
        return getattr(diffusers, kind).from_pretrained(folder, use_safetensors=_safe_weights(folder))
    except READING as fault:
        reason = for_terminal(fault, limit=300)
        raise AlphaflowError(f"{folder}: the autoencoder cannot be loaded ({reason})") from fault


def _safe_weights(folder: Path) -> bool:
    """safetensors where there are any; a .bin is read with weights_only by diffusers, which executes nothing."""
    return any(folder.glob("*.safetensors"))


def _from_file(path: Path) -> Any:
    """An AutoencoderKL's bare weights; the architecture is read off their shapes."""
    import diffusers

    weights = rename(read_weights(path))
    check_real(weights, path)
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in weights):
        raise AlphaflowError(
            f"{path}: an autoencoder of latent diffusion (KL-16, VA-VAE, …): the same kind of network under other "
            "names, which diffusers cannot load. Give its diffusers form: a folder or a Hub id"
        )
    try:
        module = diffusers.AutoencoderKL(**kl_config(weights))
        module.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as fault:
        raise AlphaflowError(f"{path}: not the weights of an AutoencoderKL ({fault})") from fault
    return module


def _from_hub(name: str) -> tuple[Any, str]:
    """From the cache at once; else one short question whether the Hub is there, so that offline fails fast."""
    import diffusers

    bare, _, revision = name.partition("@")
    user, repo, *below = bare.split("/")
    repo_id, subfolder, revision = f"{user}/{repo}", "".join(below), revision or "main"
    snapshot = cached(repo_id, revision)
    if snapshot and has_weights(snapshot / subfolder):
        return _from_folder(snapshot / subfolder), snapshot.name
    ask_hub(repo_id)
    where = {"subfolder": subfolder or None, "revision": revision}
    try:
        with hub_faults(name):
            config = diffusers.AutoencoderKL.load_config(repo_id, **where)
            check_shape(config, f"{name} (config.json)", CONFIG, advice=ADVICE)
            module = getattr(diffusers, config["_class_name"]).from_pretrained(repo_id, **where)
    except READING as fault:
        reason = for_terminal(fault, limit=300)
        raise AlphaflowError(f"{name}: the autoencoder cannot be downloaded ({reason})") from fault
    snapshot = cached(repo_id, revision)
    return module, snapshot.name if snapshot else revision
