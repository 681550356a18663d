"""Tiny real autoencoders with random weights, made by diffusers on the spot."""

import torch


def tiny_kl(folder, seed=0):
    """An AutoencoderKL of the SD-VAE's architecture, 8 channels wide; saved as a folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ).eval()
    model.save_pretrained(folder)
    return model


def tiny_taesd(folder):
    """An AutoencoderTiny: no posterior."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    model.save_pretrained(folder)
    return model


def tiny_dc(folder):
    """An AutoencoderDC: no posterior, deep compression."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    ).eval()
    model.save_pretrained(folder)
    return model


def saved(folder, name, seed=0, **config):
    """A random autoencoder of any class of diffusers; saved as a folder."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**config).eval()
    model.save_pretrained(folder)
    return model


BLOCKS = {
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
STATED = {"latents_mean": [0.5, -1.0, 0.25, 2.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}
FILM = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **STATED}


def tiny_asymmetric(folder):
    blocks = {"down_block_out_channels": (8, 8, 8), "up_block_out_channels": (8, 8, 8)}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return saved(folder, "AsymmetricAutoencoderKL", norm_num_groups=8, latent_channels=4, **blocks, **kinds)


def tiny_flux2(folder):
    """FLUX.2's: 32 channels there; statistics of 2×2 patches in a batch norm that is no part of encode."""
    model = saved(folder, "AutoencoderKLFlux2", latent_channels=4, **BLOCKS)
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    model.bn.num_batches_tracked.fill_(7)
    model.save_pretrained(folder)
    return model


def tiny_hunyuan_image(folder):
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32, 32, 32)}
    more = {"layers_per_block": 1, "spatial_compression_ratio": 8, "sample_size": 64, "scaling_factor": 0.75}
    return saved(folder, "AutoencoderKLHunyuanImage", **config, **more)


def tiny_kvae(folder):
    config = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1, 1)}
    return saved(folder, "AutoencoderKLKVAE", **config)


def tiny_temporal(folder):
    config = {"down_block_types": BLOCKS["down_block_types"], "layers_per_block": 1, "latent_channels": 4}
    return saved(folder, "AutoencoderKLTemporalDecoder", block_out_channels=(32, 32, 32, 32), **config)


def tiny_qwen_image(folder):
    return saved(folder, "AutoencoderKLQwenImage", **FILM)


def tiny_wan(folder):
    return saved(folder, "AutoencoderKLWan", **FILM)


def tiny_vq(folder):
    return saved(folder, "VQModel", latent_channels=4, vq_embed_dim=4, **BLOCKS)


def tiny_rae(folder):
    """Encodes at 56 px what is decoded at 64 px; its latents' statistics are inside."""
    encoder = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 56}
    decoder = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn((64, 4, 4), generator=generator)
    std = torch.rand((64, 4, 4), generator=generator) + 0.5
    more = {"decoder_intermediate_size": 64, "patch_size": 16, "latents_mean": mean, "latents_std": std}
    return saved(folder, "AutoencoderRAE", **encoder, **decoder, **more)
