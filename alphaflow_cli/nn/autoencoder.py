"""Autoencoders, loaded by diffusers and used by one interface: pixels in [-1, 1] to raw latents and back.

    encode: pixels (n, 3, H, W) → mean, std of the posterior, each (n, C, h, w); std = 0 where there is none
    decode: raw latents → pixels; nothing is scaled or shifted here, `scale` and `shift` are the model's own convention

An autoencoder is named by one of these:

    a folder           config.json and weights
    a weights file     of an AutoencoderKL: .safetensors, or .pt as published with α-Flow; its shapes tell the network
    a Hub id           user/repo or user/repo/subfolder, either with @revision; looked up in the Hub's cache first
    none               no autoencoder: the network works on pixels themselves
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alphaflow_cli.documents import read_json
from alphaflow_cli.errors import DAMAGE, AlphaflowError
from alphaflow_cli.files import user_path
from alphaflow_cli.nn.autoencoder_classes import (
    CLASSES,
    CONFIG_SHAPE,
    AutoencoderClass,
    channel_statistics,
    check_usable,
    conventions,
)
from alphaflow_cli.nn.weights import fit_weights, read_tree
from alphaflow_cli.remote.address import Repo
from alphaflow_cli.remote.cache import cache_folder, cached_file, is_offline
from alphaflow_cli.remote.client import endpoint
from alphaflow_cli.remote.download import fetch
from alphaflow_cli.remote.faults import HubFault, InTrouble, NoConnection
from alphaflow_cli.text import for_terminal

ANOTHER_ONE = "Give another autoencoder: a folder, a weights file or a Hub id."
READING = (*DAMAGE, RuntimeError, ArithmeticError, SafetensorError)  # what diffusers raises on files that are not right
CONVENTIONS = {4: (0.18215, 0.0), 16: (0.3611, 0.1159)}  # scale, shift of a bare weights file: SD 1.x and FLUX


@dataclass(frozen=True)
class Autoencoder:
    """One loaded autoencoder; of `none`, which leaves pixels as they are, it has no module."""

    id: str
    revision: str
    weights_sha256: str
    kind: str  # of CLASSES; or none
    channels: int
    downscale: int
    scale: float
    shift: float
    module: nn.Module | None
    layout: torch.memory_format  # that the module's input is brought to
    statistics: tuple[list[float], list[float]] | None = None  # mean and std per channel, where the model states them
    side: int | None = None  # of the only pictures that it makes; None: any multiple of downscale
    rows: int = 0  # that the encoder sees at once, filled up with zeros, where it was compiled for them; 0: any number

    @property
    def has_posterior(self) -> bool:
        """Whether latents are drawn from a distribution, and not looked up."""
        return self.module is not None and self._class.posterior

    @property
    def _class(self) -> AutoencoderClass:
        return CLASSES[type(self.module).__name__]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights, in which pictures and latents are given to the network."""
        return torch.float32 if self.module is None else next(self.module.parameters()).dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of the latents of some pixels, float32."""
        if self.module is None:
            return pixels, torch.zeros_like(pixels)
        count, spare = len(pixels), max(0, self.rows - len(pixels))
        rows = torch.cat([pixels, pixels.new_zeros((spare, *pixels.shape[1:]))]) if spare else pixels
        mean, std = self._class.encode(self.module, self._input(rows))
        return mean[:count].float(), std[:count].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The pixels of some latents: float32, not clipped, in the plain layout."""
        if self.module is None:
            return latents
        pixels = self._class.decode(self.module, self._input(latents))
        return pixels.float().contiguous()

    def _input(self, x: Tensor) -> Tensor:
        """Bring an input to the precision and the layout of the weights."""
        return x.to(self.dtype, memory_format=self.layout)


def load_autoencoder(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Autoencoder:
    """Load an autoencoder by its Hub id, its folder or its weights file; `none` leaves pixels as they are."""
    if name == "none":
        return Autoencoder("none", "", "", "none", 3, 1, 1.0, 0.0, None, torch.preserve_format)
    module, revision = _load_module(name)
    entry = CLASSES[type(module).__name__]
    try:
        check_usable(module, entry)
        statistics = channel_statistics(module, entry)
    except AlphaflowError as fault:
        raise AlphaflowError(f"{name}: {fault}. {ANOTHER_ONE}") from fault
    digest = weights_sha256(module)
    last = channels_last and not entry.frames and not entry.needs  # the layout of convolutions over pictures
    nn.Module.to(module, device, dtype)  # diffusers' own .to warns of modules that these models do not have
    nn.Module.to(module, memory_format=torch.channels_last if last else torch.contiguous_format)
    module.eval().requires_grad_(False)
    scale, shift = conventions(module, entry)
    return Autoencoder(
        id=public_id(name),
        revision=revision,
        weights_sha256=digest,
        kind=entry.kind,
        channels=entry.channels(module.config),
        downscale=entry.downscale(module.config),
        scale=scale,
        shift=shift,
        module=module,
        layout=torch.channels_last if last else torch.preserve_format,
        statistics=statistics,
        side=entry.side(module.config),
    )


def weights_sha256(module: nn.Module) -> str:
    """The checksum of all parameters' names and float32 values.

    It is the same for a .pt, a .safetensors and a Hub copy of one model.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def public_id(name: str) -> str:
    """The name that a store may carry: a Hub id as it is; of a folder or a file its last part, without the
    machine's folders.
    """
    path = Path(name)
    return (path.resolve().name if path.exists() else name.split("@")[0]) or name


def _load_module(name: str) -> tuple[Any, str]:
    path = user_path(name)
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
    name = read_json(config, CONFIG_SHAPE, advice=ANOTHER_ONE)["_class_name"]
    if not hasattr(diffusers, name):
        raise AlphaflowError(
            f"{folder}: diffusers {diffusers.__version__} knows no {name}. A newer one may: pip install -U diffusers"
        )
    if (package := CLASSES[name].needs) and not find_spec(package):
        raise AlphaflowError(f"{folder}: {name} needs the package {package}, which is not here: pip install {package}")
    try:
        safe = any(folder.glob("*.safetensors"))  # diffusers reads a .bin with weights_only, which executes nothing
        return getattr(diffusers, name).from_pretrained(folder, use_safetensors=safe)
    except READING as fault:
        reason = for_terminal(fault, limit=300)
        raise AlphaflowError(f"{folder}: the autoencoder cannot be loaded ({reason})") from fault


def _from_file(path: Path) -> Any:
    """Load the bare weights of an AutoencoderKL; the architecture is read off their shapes."""
    import diffusers

    weights = rename(read_weights(path))
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in weights):
        raise AlphaflowError(
            f"{path}: an autoencoder of latent diffusion (KL-16, VA-VAE, …): the same kind of network under other "
            "names, which diffusers cannot load. Give its diffusers form: a folder or a Hub id"
        )
    try:
        module = diffusers.AutoencoderKL(**kl_config(weights))
    except (LookupError, RuntimeError, ValueError) as fault:
        reason = f"{fault} is missing" if isinstance(fault, KeyError) else for_terminal(fault, limit=300)
        raise AlphaflowError(f"{path}: not the weights of an AutoencoderKL ({reason})") from fault
    fit_weights(module, weights, path)
    return module


def _from_hub(name: str) -> tuple[Any, str]:
    """The module and its commit: from the cache at once, else from the Hub into the cache."""
    bare, _, revision = name.partition("@")
    user, repository, *below = bare.split("/")
    repo, config = Repo(f"{user}/{repository}", revision or "main", None), "/".join([*below, "config.json"])
    path = cached_file(repo.id, config, repo.revision or "main")
    if path is None or not has_weights(path.parent):
        path = _download(repo, config)
    return _from_folder(path.parent), path.parents[len(below)].name


def _download(repo: Repo, config: str) -> Path:
    """The config.json in the cache, its weights beside it: safetensors, or where the repository has none, a .bin."""
    weights = config.replace("config.json", "diffusion_pytorch_model")
    try:
        for form in ("safetensors", "bin"):
            files = [config, f"{weights}.{form}", f"{weights}-*.{form}", f"{weights}.{form}.index.json"]
            path = fetch(repo, files, wanted=config).folder / config
            if has_weights(path.parent):
                return path
    except HubFault as fault:
        advice = f"not in the cache ({cache_folder()}) either. Download it once, or give a folder: --autoencoder DIR"
        why = "HF_HUB_OFFLINE is set" if is_offline() else fault.why.rstrip(".")
        if isinstance(fault, NoConnection) and not isinstance(fault, InTrouble) and not is_offline():
            why = f"{endpoint()} cannot be reached"
        raise AlphaflowError(f"{repo.id}: {why}, and it is {advice}") from fault
    raise AlphaflowError(f"{repo}: no autoencoder's weights ({weights}.safetensors) there. {ANOTHER_ONE}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The table of weights in a file, which may lie inside a training checkpoint; what is no weight is left out."""
    content = read_tree(path)
    if not isinstance(content, Mapping):
        raise AlphaflowError(f"{path}: holds a {type(content).__name__}, not a table of weights")
    inner = (content.get(key) for key in ("ema", "net", "state_dict", "model"))
    table = next((each for each in inner if isinstance(each, Mapping)), content)
    return {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, Tensor)}


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefix of whatever held the autoencoder, and give the attention layers their names of today."""
    anchor = "encoder.conv_in.weight"
    prefix = next((key.removesuffix(anchor) for key in weights if key.endswith(anchor)), "")
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for key, value in weights.items():
        parts = key.removeprefix(prefix).split(".")
        if key.startswith(prefix) and parts[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            attention = "attentions" in parts
            renamed[".".join(old.get(part, part) if attention else part for part in parts)] = value
    return renamed


def kl_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the widths and depths of an AutoencoderKL off its shapes.

    It has 32 norm groups where the widths allow it, as every published one has.
    """
    levels = len({key.split(".")[2] for key in weights if key.startswith("encoder.down_blocks.")})
    layers = len({key.split(".")[4] for key in weights if key.startswith("encoder.down_blocks.0.resnets.")})
    widths = [weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)]
    channels = weights["encoder.conv_out.weight"].shape[0] // 2
    scale, shift = CONVENTIONS.get(channels, (1.0, 0.0))
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": math.gcd(32, *widths),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": any("attentions" in key for key in weights),
        "scaling_factor": scale,
        "shift_factor": shift,
    }


def has_weights(folder: Path) -> bool:
    weights = [*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("diffusion_pytorch_model*.bin")]
    return (folder / "config.json").is_file() and bool(weights)
