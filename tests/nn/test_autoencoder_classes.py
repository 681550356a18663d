"""Every class of diffusers that is taken: encode and decode are diffusers' own, to float32 rounding."""

import json
import shlex
import shutil
from importlib.util import find_spec

import pytest
import tiny_autoencoders as tiny
import torch

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.nn.autoencoder_classes import CLASSES
from alphaflow_cli.recipe import load_recipe

WITHOUT = pytest.mark.skipif(not find_spec("transformers"), reason="AutoencoderRAE needs the package transformers")
MAKERS = {
    "kl": tiny.tiny_kl,
    "kl-asymmetric": tiny.tiny_asymmetric,
    "kl-flux2": tiny.tiny_flux2,
    "kl-hunyuan-image": tiny.tiny_hunyuan_image,
    "kl-kvae": tiny.tiny_kvae,
    "kl-temporal": tiny.tiny_temporal,
    "kl-qwen-image": tiny.tiny_qwen_image,
    "kl-wan": tiny.tiny_wan,
    "tiny": tiny.tiny_taesd,
    "dc": tiny.tiny_dc,
    "vq": tiny.tiny_vq,
    "rae": tiny.tiny_rae,
}
KINDS = [pytest.param(kind, marks=WITHOUT if kind == "rae" else ()) for kind in MAKERS]
FILMS = ("kl-qwen-image", "kl-wan")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: kind → folder and diffusers' model, made when it is first wanted."""
    root, models = tmp_path_factory.mktemp("classes"), {}

    def get(kind):
        if kind not in models:
            models[kind] = (root / f"tiny-{kind}", MAKERS[kind](root / f"tiny-{kind}"))
        return models[kind]

    return get


@pytest.fixture
def pixels():
    return torch.rand((3, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1


def load(folder, **options):
    return load_autoencoder(str(folder), device=torch.device("cpu"), **options)


def test_every_class_has_a_tiny_one():
    assert set(MAKERS) == {entry.kind for entry in CLASSES.values()}


def theirs(kind, model, pixels):
    """Mean and std as diffusers gives them, by its own words."""
    if kind in FILMS:
        posterior = model.encode(pixels[:, :, None]).latent_dist
        return posterior.mean[:, :, 0], posterior.std[:, :, 0]
    answer = model.encode((pixels + 1) / 2 if kind == "rae" else pixels)
    if hasattr(answer, "latent_dist"):
        return answer.latent_dist.mean, answer.latent_dist.std
    latents = answer.latents if hasattr(answer, "latents") else answer.latent
    return latents, torch.zeros_like(latents)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_are_diffusers_own(kind, made, pixels):
    folder, model = made(kind)
    ours = load(folder)
    assert ours.kind == kind
    mean, std = ours.encode(pixels)
    assert mean.shape == (3, ours.channels, 64 // ours.downscale, 64 // ours.downscale)
    for mine, other in zip((mean, std), theirs(kind, model, pixels), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-6)
    assert (std.min() > 0) == ours.has_posterior
    decoded = ours.decode(mean)
    assert decoded.shape == pixels.shape
    other = (
        model.decode(mean[:, :, None]).sample[:, :, 0]
        if kind in FILMS
        else model.decode(mean, **({"num_frames": 1} if kind == "kl-temporal" else {})).sample
    )
    torch.testing.assert_close(decoded, other * 2 - 1 if kind == "rae" else other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl-qwen-image", pytest.param("rae", marks=WITHOUT)])
def test_the_layout_of_pictures_is_not_forced_on_films_and_transformers(kind, made, pixels):
    folder, _ = made(kind)
    plain, asked = load(folder), load(folder, channels_last=True, dtype=torch.bfloat16)
    latents = plain.encode(pixels)[0]
    rough = asked.decode(latents)
    assert (rough - plain.decode(latents)).abs().mean() < 0.1


def test_stated_statistics_are_those_of_the_config(made):
    for kind in FILMS:
        assert load(made(kind)[0]).statistics == (tiny.STATED["latents_mean"], tiny.STATED["latents_std"])
    for kind in ("kl", "dc", "tiny"):
        assert load(made(kind)[0]).statistics is None


def test_flux2s_statistics_of_patches_are_those_of_their_channels(made):
    folder, model = made("kl-flux2")
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in load(folder).statistics)
    spread = model.bn.running_mean.double(), model.bn.running_var.double()
    drawn = spread[0] + spread[1].sqrt() * torch.randn((40_000, 16), dtype=torch.float64)
    drawn = drawn.reshape(-1, 4, 4)  # (n, C, places of a 2×2 patch)
    torch.testing.assert_close(mean, drawn.mean((0, 2)), atol=0.02, rtol=0)
    torch.testing.assert_close(std, drawn.std((0, 2)), atol=0.02, rtol=0)


def test_a_batch_norm_that_never_saw_a_picture_states_nothing(tmp_path):
    tiny.saved(tmp_path / "new", "AutoencoderKLFlux2", latent_channels=4, **tiny.BLOCKS)
    assert load(tmp_path / "new").statistics is None


def changed(folder, tmp_path, **values):
    copy = shutil.copytree(folder, tmp_path / "changed")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return copy


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("kl-wan", {"latents_mean": [1.0]}, "should be 4 numbers each, one per channel"),
        ("kl-wan", {"latents_std": [0.0, 1, 1, 1]}, "each std above 0"),
        ("kl-wan", {"_class_name": "AutoencoderKLLTXVideo"}, "is not one of AutoencoderKL"),
        ("kl-wan", {"base_dim": 10**9}, "base_dim"),
        ("kl-wan", {"z_dim": 0}, "z_dim"),
        ("kl-kvae", {"ch_mult": "wide"}, "ch_mult"),
        ("kl-wan", {"latents_mean": [[1], "x", 3, 4]}, "latents_mean"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(kind, values, words, made, tmp_path):
    with pytest.raises(AlphaflowError) as fault:
        load(changed(made(kind)[0], tmp_path, **values))
    assert words in str(fault.value)
    assert "\n" not in str(fault.value)


def test_what_rae_lacks_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("alphaflow_cli.nn.autoencoder.find_spec", lambda name: None)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    with pytest.raises(AlphaflowError, match="AutoencoderRAE needs the package transformers, which is not here: pip"):
        load(tmp_path)


SMALL = "--set model.dim=16 --set model.depth=1 --set model.heads=2 --set train.steps=4 --set train.batch=4"
CHEAP = ("kl-flux2",)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[*([WITHOUT] if k == "rae" else []), *([] if k in CHEAP else [pytest.mark.slow])])
        for k in MAKERS
    ],
)
def test_from_pictures_to_a_score_with_a_random_autoencoder(kind, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(made(kind)[0], tmp_path / f"tiny-{kind}")
    for line in (
        f"prep-latents glyphs:24 --size 64 --autoencoder {folder} --out mine",
        f"recipe new mine --like b2 --set data.autoencoder={folder}",
        f"train mine.yaml {SMALL}",
        "sample runs/mine --seeds 0-3 --grid grid.png",
        "eval runs/mine --reference glyphs:100 --metrics fd-tiny --images 100 --nfe 1",
    ):
        assert cli(shlex.split(line)) == 0, capfd.readouterr().err
    plan, recipe = read_manifest(tmp_path / "mine").plan, load_recipe("mine.yaml")
    stated = load(folder).statistics
    assert plan.autoencoder.channel_mean == (stated[0] if stated else None)
    if stated:
        assert (recipe.data.normalise, list(recipe.data.channel_std)) == ("channel", stated[1])
    error = capfd.readouterr().err
    assert ("gradients explode" in error) == (kind == "rae")
    assert (tmp_path / "runs/mine/samples/step-00000004.png").is_file()
