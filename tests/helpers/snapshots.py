"""Checkpoints of the neighbours, built at tiny size in the form their systems write."""

from collections import OrderedDict

import torch
from foreign_nets import random_weights

SIZE = {"dim": 96, "depth": 2, "patch": 2, "channels": 4, "size": 8}
HEADS, CLASSES = 6, 10
AUTOENCODER = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 4}


def tiny_autoencoder(seed=5):
    """An AutoencoderKL with the published names, 16 px to 8x8 latents."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        return diffusers.AutoencoderKL(**AUTOENCODER, **kinds).eval()


def published_weights(seed, rows=CLASSES):
    """The network, in the published names without `model.`."""
    return random_weights(
        **SIZE, rows=rows, out=4, embedders=("noise_labels_embedder", "noise_labels_next_embedder"), seed=seed
    )


def published_snapshot(*, dropout=0.0, compiled=False, autoencoder=None):
    """net and ema, statistics per channel and position, cfg, and what a run leaves beside them."""
    g = torch.Generator().manual_seed(3)
    statistics = {
        "autoencoder_mean": torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64),
        "autoencoder_var": torch.rand(1, 4, 8, 8, generator=g, dtype=torch.float64) + 0.5,
        "are_ldm_stats_inited": torch.tensor(1.0),
    }
    inside = {f"autoencoder.model.model.{k}": v for k, v in autoencoder.state_dict().items()} if autoencoder else {}
    rows = CLASSES + (dropout > 0)

    def table(seed):
        network = {f"model.{name}": value for name, value in published_weights(seed, rows).items()}
        if compiled:
            network = {name.replace("model.blocks", "model._orig_mod.blocks"): v for name, v in network.items()}
        return OrderedDict(statistics | inside | network)

    model = {"dim": 96, "num_blocks": 2, "num_heads": HEADS, "mlp_ratio": 4.0, "label_dropout": dropout}
    cfg = {"model": model | {"tokenizer": {"resolution": [1, 2, 2]}}, "dataset": {"label_shape": [CLASSES]}}
    optimizer = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    rest = {"optimizer": optimizer, "lr_scheduler": {}, "grad_scaler": {}, "vis": {}, "stats": {}, "dataloader": {}}
    return {"net": table(11), "ema": table(12), "cfg": cfg, "ddp_consistency_checks": {}} | rest


def sit_weights(seed=21):
    """SiT and DiT: one time embedder, a null row, twice the channels (the variance)."""
    return random_weights(**SIZE, rows=CLASSES + 1, out=8, embedders=("t_embedder",), seed=seed)


def meanflow_weights(seed=31):
    """zhuyu-cs/MeanFlow: t_embedder and r_embedder."""
    return random_weights(**SIZE, rows=CLASSES + 1, out=4, embedders=("t_embedder", "r_embedder"), seed=seed)


def soflow_weights(seed=41, rows=CLASSES + 1):
    """SoFlow: t_embedder and s_embedder, under `network.`."""
    table = random_weights(**SIZE, rows=rows, out=4, embedders=("t_embedder", "s_embedder"), seed=seed)
    return {f"network.{name}": value for name, value in table.items()}
