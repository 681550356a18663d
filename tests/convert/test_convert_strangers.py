"""Checkpoints that cannot be converted are named for what they are, in one line; so are weights that are no weights."""

import argparse
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from snapshots import published_snapshot, sit_weights

from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import load_autoencoder

ONE = torch.zeros(2, 2)
STRANGERS = {
    "SoFlow's U-Net": ({"model": {"x": ONE}, "ema_model": {"x": ONE}, "finished_steps": 3}, "without s_embedder"),
    "FastGen's FSDP": ({"scheduler": {}, "grad_scaler": {}, "callbacks": {}, "iteration": 5}, r"theirs\.net_model"),
    "FastGen's EDM": ({"model": {"net": {"model.enc.32x32_conv.weight": ONE}}, "iteration": 5}, "a U-Net, as py-mean"),
    "py-meanflow": ({"model": {"enc.32x32_conv.weight": ONE}, "args": argparse.Namespace()}, "a U-Net, as py-mean"),
    "guided diffusion": ({"input_blocks.0.0.weight": ONE}, "a U-Net, as py-meanflow"),
    "KL-16": ({"model": {"encoder.down.0.block.0.norm1.weight": ONE}}, "an autoencoder .KL-16, VA-VAE"),
    "VA-VAE": ({"state_dict": {"decoder.up.0.block.0.norm1.weight": ONE, "loss.x": ONE}}, "an autoencoder .KL-16"),
    "first stage": ({"first_stage_model.encoder.down.0.block.0.conv1.weight": ONE}, "an autoencoder .KL-16"),
    "diffusers": ({"encoder.down_blocks.0.resnets.0.conv1.weight": ONE}, "an autoencoder .KL-16"),
    "DMF": ({"ema": sit_weights(), "args": {"model": "DMFT-B/2", "dmf_depth": 8}}, "a Decoupled MeanFlow"),
}


def converted(tmp_path, tree, **options):
    torch.save(tree, tmp_path / "theirs.pt")
    return convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", ConvertOptions(**options))


@pytest.mark.parametrize("family", ["auto", "sit", "alphaflow"])
@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_named_for_what_it_is(tmp_path, what, family):
    tree, message = STRANGERS[what]
    with pytest.raises(AlphaflowError, match=message) as error:
        converted(tmp_path, tree, family=family)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_of_latent_diffusion_is_named_where_it_is_to_decode(tmp_path, prefix):
    names = ("encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight", "decoder.up.0.block.0.norm1.weight")
    torch.save({"state_dict": {prefix + name: ONE for name in names}}, tmp_path / "kl16.pt")
    with pytest.raises(AlphaflowError, match=r"kl16\.pt: an autoencoder of latent diffusion .KL-16, VA-VAE"):
        load_autoencoder(str(tmp_path / "kl16.pt"), device=torch.device("cpu"))


FOLDERS = {
    "orbax": (["_METADATA", "manifest.ocdbt"], "a folder of a JAX code"),
    "flax": (["checkpoint_400000"], "a folder of a JAX code"),
    "flax, one file": (["checkpoint"], "a folder of a JAX code"),
    "distributed": ([".metadata", "__0_0.distcp"], "a folder of torch.distributed.checkpoint"),
    "of pictures": (["a.png"], "a folder, no such file"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_is_named_for_what_it_is(tmp_path, capsys, what):
    names, message = FOLDERS[what]
    (tmp_path / "theirs").mkdir()
    for name in names:
        (tmp_path / "theirs" / name).write_bytes(b"x")
    assert run(["convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "o.safetensors")]) == 1
    _, line = capsys.readouterr().err.splitlines()  # the first says what begins
    assert message in line


@pytest.mark.parametrize("name", ["edm.pkl", "params.PICKLE", "state.msgpack", "weights.npz", "w.h5"])
def test_a_file_of_another_kind_is_named_by_its_suffix_and_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"a": OrderedDict()}))
    with pytest.raises(AlphaflowError, match=r"Save its weights with torch.save or as safetensors"):
        convert(tmp_path / name, tmp_path / "ours.safetensors", ConvertOptions())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.int8], ids=str)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_floats_are_named(tmp_path, dtype, suffix):
    tree = sit_weights() | {"pos_embed": torch.zeros(1, 16, 96).to(dtype)}
    path = tmp_path / f"theirs.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(tree, path)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(AlphaflowError, match=rf"theirs\.{suffix}: pos_embed is a table of {kind}"):
        convert(path, tmp_path / "ours.safetensors", ConvertOptions(family="sit", sets=("model.heads=6",)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_statistics_that_are_no_floats_are_named(tmp_path, dtype):
    save_file(
        {"mean": torch.zeros(4, 1, 1).to(dtype), "std": torch.ones(4, 1, 1).to(dtype)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(AlphaflowError, match="no floating-point numbers"):
        converted(
            tmp_path, sit_weights(), family="sit", latents=str(tmp_path / "l.safetensors"), sets=("model.heads=6",)
        )


@pytest.mark.parametrize("scale", ["nan", "inf", "-1", "0", "1e-320", "9" * 5000, "x"])
def test_a_scale_that_is_none_is_named(tmp_path, capsys, scale):
    torch.save(sit_weights(), tmp_path / "theirs.pt")
    line = ["convert", str(tmp_path / "theirs.pt"), "--from", "sit", "--set", "model.heads=6", "-o"]
    assert run([*line, str(tmp_path / "o.safetensors"), "--latents", f"scale:{scale}"]) == 1
    message = capsys.readouterr().err
    assert "--latents takes scale:" in message
    assert len(message) < 400


def test_an_integer_too_long_for_a_float_in_the_configuration_is_named(tmp_path):
    tree = published_snapshot()
    tree["cfg"]["model"]["dim"] = 10**400
    with pytest.raises(AlphaflowError, match="not one of numbers"):
        converted(tmp_path, tree)


def test_what_a_file_says_cannot_drive_the_terminal(tmp_path, capsys):
    arguments = argparse.Namespace(path_type="linear", prediction="v", model="SiT\x1b[2J\x07", **{"a\nb": 1})
    torch.save({"ema": sit_weights(), "args": arguments}, tmp_path / "theirs.pt")
    line = ["convert", str(tmp_path / "theirs.pt"), "--set", "model.heads=6", "-o", str(tmp_path / "o.safetensors")]
    assert run(line) == 0
    assert not set("\x1b\x07") & set(capsys.readouterr().err)
