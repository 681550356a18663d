"""Weights of autoencoders, found and read: bare files of every spelling, the Hub's cache, whether the Hub is there."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.client import session
from alphaflow_cli.remote.faults import HubFault, NoConnection, hub_faults

CONVENTIONS = {4: (0.18215, 0.0), 16: (0.3611, 0.1159)}  # scale, shift of a bare weights file: SD 1.x and FLUX


def read_weights(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # unpickling a broken or hostile file raises anything
        raise AlphaflowError(f"{path}: cannot be read as weights ({type(fault).__name__}: {fault})") from fault
    for key in ("ema", "net", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            return dict(found[key])
    if not isinstance(found, Mapping):
        raise AlphaflowError(f"{path}: holds a {type(found).__name__}, not a table of weights")
    return found


def rename(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Without the prefix of whatever held the autoencoder, and with today's names of the attention layers."""
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
    """Widths and depths from the shapes; 32 norm groups where the widths allow it, as in every published one."""
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down_blocks."))
    layers = 1 + max(int(key.split(".")[4]) for key in weights if key.startswith("encoder.down_blocks.0.resnets."))
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


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def cached(repo_id: str, revision: str) -> Path | None:
    """The Hub cache's folder of a revision, by its documented layout: refs/<name> holds a commit."""
    root = _cache() / f"models--{repo_id.replace('/', '--')}"
    ref = root / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def has_weights(folder: Path) -> bool:
    weights = [*folder.glob("diffusion_pytorch_model*.safetensors"), *folder.glob("diffusion_pytorch_model*.bin")]
    return (folder / "config.json").is_file() and bool(weights)


def ask_hub(repo_id: str) -> None:
    advice = f"not in the cache ({_cache()}) either. Download it once, or give a folder: --autoencoder DIR"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise AlphaflowError(f"{repo_id}: HF_HUB_OFFLINE is set, and it is {advice}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with hub_faults(repo_id):
            status = session().get(f"{endpoint}/api/models/{repo_id}", timeout=5).status_code
    except NoConnection as fault:
        raise AlphaflowError(f"{repo_id}: {endpoint} cannot be reached, and it is {advice}") from fault
    except HubFault as fault:
        raise AlphaflowError(f"{repo_id}: {fault.why.rstrip('.')}, and it is {advice}") from fault
    if status >= 400 and status not in (401, 403):  # those: perhaps private; the download brings the token and is clear
        raise AlphaflowError(f"{repo_id}: {endpoint} answers {status}; it is {advice}")
