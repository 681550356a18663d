"""The autoencoder classes of diffusers that make and decode single pictures, one entry each.

    posterior    encode gives a mean and a standard deviation; without one, the latent itself, and std 0
    frames       a network for films: a picture is a film of one frame, an axis that comes and goes here
    unit         pictures lie in [0, 1] there and in [-1, 1] here

Shapes: pixels (n, 3, H, W), latents (n, C, h, w); what a config says decides C and H / h.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaflow_cli.documents import Anything, Flag, ListOf, Maybe, Number, Table, Text, Whole
from alphaflow_cli.errors import AlphaflowError

Config = Mapping[str, Any]
LOGVAR = (-30.0, 20.0)  # bounds of the posterior's log-variance, as every AutoencoderKL clamps it
WIDTH, FEW, CHANNELS = Whole(1, 1 << 14), Whole(0, 1 << 8), Whole(1, 1 << 12)
WIDTHS = Maybe(ListOf(WIDTH, least=1, most=12))
NUMBERS = Maybe(ListOf(Anything(), most=1 << 12))  # one per channel; of RAE, one per channel and position


@dataclass(frozen=True)
class AutoencoderClass:
    """How a class of diffusers is fed, and what its config says of the latents."""

    kind: str  # the name that it has here
    channels: Callable[[Config], int]
    downscale: Callable[[Config], int]
    posterior: bool = True
    frames: bool = False
    unit: bool = False
    output: str = ""  # without a posterior: the field of encode's answer that holds the latent
    side: Callable[[Config], int | None] = lambda config: None  # of the only pictures that it makes; None: any
    decode_with: tuple[tuple[str, Any], ...] = ()  # what decode wants beside the latents
    needs: str = ""  # a package that diffusers wants for it

    def encode(self, module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of some pixels."""
        answer = module.encode(self._to_input(pixels))
        if not self.posterior:
            latents: Tensor = getattr(answer, self.output)
            return latents, torch.zeros_like(latents)
        parameters = answer.latent_dist.parameters.float()
        mean, logvar = (parameters.squeeze(2) if self.frames else parameters).chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(*LOGVAR)).exp()

    def decode(self, module: Any, latents: Tensor) -> Tensor:
        """Decode latents to pixels; a network for films gets and gives a film of one frame."""
        pixels: Tensor = module.decode(
            latents.unsqueeze(2) if self.frames else latents, **dict(self.decode_with)
        ).sample
        pixels = pixels.squeeze(2) if self.frames else pixels
        return pixels * 2 - 1 if self.unit else pixels

    def _to_input(self, pixels: Tensor) -> Tensor:
        pixels = (pixels + 1) / 2 if self.unit else pixels
        return pixels.unsqueeze(2) if self.frames else pixels


def _latent_channels(config: Config) -> int:
    return int(config["latent_channels"])


def _halvings(key: str) -> Callable[[Config], int]:
    """Each of these blocks but the last halves the picture."""
    return lambda config: int(2 ** (len(config[key]) - 1))


def _rae_side(config: Config) -> int:
    grid = int(config["encoder_input_size"]) // int(config["encoder_patch_size"])
    return grid * int(config["patch_size"])


PLAIN, ENCODER = _halvings("block_out_channels"), _halvings("encoder_block_out_channels")
CLASSES: dict[str, AutoencoderClass] = {
    "AutoencoderKL": AutoencoderClass("kl", _latent_channels, PLAIN),
    "AsymmetricAutoencoderKL": AutoencoderClass(
        "kl-asymmetric", _latent_channels, _halvings("down_block_out_channels")
    ),
    "AutoencoderKLFlux2": AutoencoderClass("kl-flux2", _latent_channels, PLAIN),
    "AutoencoderKLHunyuanImage": AutoencoderClass(
        "kl-hunyuan-image", _latent_channels, lambda config: int(config["spatial_compression_ratio"])
    ),
    "AutoencoderKLKVAE": AutoencoderClass("kl-kvae", lambda config: int(config["z_channels"]), _halvings("ch_mult")),
    "AutoencoderKLTemporalDecoder": AutoencoderClass(
        "kl-temporal", _latent_channels, PLAIN, decode_with=(("num_frames", 1),)
    ),
    "AutoencoderKLQwenImage": AutoencoderClass(
        "kl-qwen-image",
        lambda config: int(config["z_dim"]),
        lambda config: int(2 ** len(config["temperal_downsample"])),
        frames=True,
    ),
    "AutoencoderKLWan": AutoencoderClass(
        "kl-wan", lambda config: int(config["z_dim"]), lambda config: int(config["scale_factor_spatial"]), frames=True
    ),
    "AutoencoderTiny": AutoencoderClass("tiny", _latent_channels, ENCODER, posterior=False, output="latents"),
    "AutoencoderDC": AutoencoderClass("dc", _latent_channels, ENCODER, posterior=False, output="latent"),
    "VQModel": AutoencoderClass(
        "vq",
        lambda config: int(config.get("vq_embed_dim") or config["latent_channels"]),
        PLAIN,
        posterior=False,
        output="latents",
    ),
    "AutoencoderRAE": AutoencoderClass(
        "rae",
        lambda config: int(config["encoder_hidden_size"]),
        lambda config: int(config["patch_size"]),
        posterior=False,
        unit=True,
        output="latent",
        side=_rae_side,
        needs="transformers",
    ),
}
CONFIG_SHAPE = Table(  # of config.json: whatever decides about memory or is used here; diffusers reads the rest
    {"_class_name": Text(one_of=tuple(CLASSES))},
    {
        **dict.fromkeys(
            (
                "block_out_channels",
                "encoder_block_out_channels",
                "decoder_block_out_channels",
                "down_block_out_channels",
                "up_block_out_channels",
                "dim_mult",
                "ch_mult",
            ),
            WIDTHS,
        ),
        **dict.fromkeys(("latent_channels", "z_channels", "z_dim"), CHANNELS),
        **dict.fromkeys(("in_channels", "out_channels", "input_channels", "num_channels"), Whole(1, 1 << 10)),
        **dict.fromkeys(
            ("layers_per_block", "layers_per_down_block", "layers_per_up_block", "num_res_blocks", "num_enc_blocks"),
            FEW,
        ),
        **dict.fromkeys(("num_dec_blocks", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), FEW),
        **dict.fromkeys(("base_dim", "channels", "encoder_hidden_size", "decoder_hidden_size"), WIDTH),
        **dict.fromkeys(("decoder_base_dim", "vq_embed_dim", "num_vq_embeddings"), Maybe(Whole(1, 1 << 20))),
        **dict.fromkeys(("decoder_intermediate_size", "encoder_input_size"), Whole(1, 1 << 16)),
        **dict.fromkeys(("patch_size", "scale_factor_spatial", "image_size"), Anything()),
        **dict.fromkeys(("encoder_patch_size", "spatial_compression_ratio"), Whole(1, 1 << 10)),
        "decoder_num_attention_heads": Whole(1, 1 << 10),
        "temperal_downsample": Maybe(ListOf(Flag(), most=12)),
        "reshape_to_2d": Flag(),
        **dict.fromkeys(("latents_mean", "latents_std"), NUMBERS),
        **dict.fromkeys(("scaling_factor", "shift_factor"), Maybe(Number())),
    },
    others=Anything(),
)


def conventions(module: Any, entry: AutoencoderClass) -> tuple[float, float]:
    """Scale and shift of the model's own convention. RAE's encoder has applied its own already."""
    if entry.kind == "rae":
        return 1.0, 0.0
    config = module.config
    return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)


def channel_statistics(module: Any, entry: AutoencoderClass) -> tuple[list[float], list[float]] | None:
    """The mean and the standard deviation of each channel that a model states for its latents; None: it states none.

    FLUX.2 states them for the four places of a 2×2 patch apart; here they are joined, by the law of total variance.
    """
    if entry.kind == "kl-flux2":
        return _of_flux2(module)
    if entry.kind == "rae":  # applied by its encoder
        return None
    mean, std = module.config.get("latents_mean"), module.config.get("latents_std")
    if mean is None or std is None:
        return None
    channels, flat = entry.channels(module.config), [[0.0], [0.0]]
    with suppress(TypeError, ValueError):
        flat = [torch.as_tensor(each, dtype=torch.float64).flatten().tolist() for each in (mean, std)]
    finite = all(math.isfinite(value) for each in flat for value in each)
    if any(len(each) != channels for each in flat) or not finite or min(flat[1]) <= 0:
        raise AlphaflowError(
            f"latents_mean and latents_std should be {channels} numbers each, one per channel, and each std above 0"
        )
    return flat[0], flat[1]


def _of_flux2(module: Any) -> tuple[list[float], list[float]] | None:
    mean, var = module.bn.running_mean.double(), module.bn.running_var.double()
    if not int(module.bn.num_batches_tracked) and bool((mean == 0).all() and (var == 1).all()):
        return None  # as a network is made
    channels = int(module.config["latent_channels"])
    mean, var = mean.reshape(channels, -1), var.reshape(channels, -1)  # (C, places of a patch)
    std = (var.mean(1) + mean.var(1, correction=0) + float(module.config["batch_norm_eps"])).sqrt()
    return mean.mean(1).tolist(), std.tolist()


def check_usable(module: nn.Module, entry: AutoencoderClass) -> None:
    """Refuse a model whose latents are no grid, or whose pictures have more or fewer than three channels."""
    config: Any = module.config
    if not config.get("reshape_to_2d", True):
        raise AlphaflowError("its latents are a list of tokens, not a grid (reshape_to_2d is false)")
    inputs = [config.get(key) for key in ("in_channels", "input_channels", "num_channels")]
    patch = config.get("patch_size") if entry.frames else None
    channels = next((value for value in inputs if value is not None), 3) // (patch or 1) ** 2
    if channels != 3:
        raise AlphaflowError(f"its pictures have {channels} channels, and 3 are wanted")
