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
