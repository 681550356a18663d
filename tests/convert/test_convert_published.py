"""A snapshot in the published form converts, samples to the values of an independent computation, and goes back."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from foreign_nets import published_u
from snapshots import CLASSES, HEADS, published_snapshot, published_weights, tiny_autoencoder

import alphaflow_cli
from alphaflow_cli.commands.convert import command
from alphaflow_cli.convert import ConvertOptions, convert, export
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.generator import open_generator
from alphaflow_cli.sample.walk import plan_walk

SEEDS, LABELS = [0, 1, 7], [3, 9, 0]
WALKS = {
    "1 step": ("trajectory", [1.0, 0.0]),
    "2 steps": ("trajectory", [1.0, 0.5, 0.0]),
    "consistency": ("consistency", [1.0, 0.55, 0.0]),
}


def write(tmp_path, tree, name="alphaflow-B-2.pt"):
    torch.save(tree, tmp_path / name)
    return tmp_path / name


def independent(tree, which, sampler, grid):
    """Sample from the snapshot's own tables: normalised latents and pixels in [-1, 1]."""
    table = tree[which]
    w = {n.removeprefix("model.").replace("_orig_mod.", ""): v.double() for n, v in table.items() if "model." in n}
    y = torch.tensor(LABELS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).double()
    for t, to in itertools.pairwise(grid):
        rows = torch.full((3,), t, dtype=torch.float64)
        if sampler == "trajectory":
            x = x - (t - to) * published_u(w, x, torch.full_like(rows, to), rows, y, heads=HEADS)
            continue
        x_hat = x - t * published_u(w, x, 0 * rows, rows, y, heads=HEADS)
        fresh = torch.stack([torch.randn(4, 8, 8, generator=g, dtype=torch.float64) for g in generators])
        x = (1 - to) * x_hat + to * fresh
    raw = x * table["autoencoder_var"].sqrt() + table["autoencoder_mean"]
    return x, raw


@torch.no_grad()
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_converted_snapshot_samples_to_the_independent_values(tmp_path, walk, weights):
    autoencoder = tiny_autoencoder()
    tree = published_snapshot(autoencoder=autoencoder, compiled=weights == "raw")
    convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions(weights=weights))
    generator = open_generator(str(tmp_path / "b2.safetensors"))
    sampler, grid = WALKS[walk]
    plan = plan_walk(generator.recipe, nfe=len(grid) - 1, kind=sampler, times=grid)
    latents = generator.latents(SEEDS, LABELS, plan)
    x, raw = independent(tree, {"ema": "ema", "raw": "net"}[weights], sampler, grid)
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    decoded = generator.autoencoder.decode((latents * generator.std + generator.mean).float())
    pixels = autoencoder.decode(raw.float()).sample
    torch.testing.assert_close(decoded, pixels, rtol=1e-5, atol=1e-5)
    bytes_ = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    images = generator.images(SEEDS, LABELS, plan)
    assert images.shape == (3, 3, 16, 16)
    assert (images.int() - bytes_.int()).abs().max() <= 1
    assert (images == bytes_).float().mean() > 0.999


def test_the_autoencoder_inside_is_written_as_a_diffusers_folder(tmp_path):
    autoencoder = tiny_autoencoder()
    source = write(tmp_path, published_snapshot(autoencoder=autoencoder))
    outcome = convert(source, tmp_path / "b2.safetensors", ConvertOptions())
    assert outcome.autoencoder == tmp_path / "b2-autoencoder"
    loaded = diffusers.AutoencoderKL.from_pretrained(outcome.autoencoder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in autoencoder.state_dict().items())
    recipe = load_checkpoint(tmp_path / "b2.safetensors").recipe
    assert (recipe.data.autoencoder, recipe.data.image_size) == ("b2-autoencoder", 16)


def test_the_autoencoder_of_another_checkpoint_is_not_overwritten(tmp_path):
    out = tmp_path / "b2.safetensors"
    for seed in (5, 5, 6):  # the same autoencoder again, as after an error, then another one
        source = write(tmp_path, published_snapshot(autoencoder=tiny_autoencoder(seed)))
        before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "b2-autoencoder").glob("*"))
        if seed == 5:
            convert(source, out, ConvertOptions())
            out.rename(tmp_path / "mine.safetensors")
    with pytest.raises(AlphaflowError, match=r"b2-autoencoder: holds another autoencoder, which is not overwritten"):
        convert(source, out, ConvertOptions())
    assert before == sorted((path.name, path.read_bytes()) for path in (tmp_path / "b2-autoencoder").glob("*"))
    assert not out.exists()


def test_statistics_are_per_channel_and_position_and_the_file_holds_the_variance(tmp_path):
    tree = published_snapshot()
    convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions())
    checkpoint = load_checkpoint(tmp_path / "b2.safetensors")
    assert checkpoint.mean.shape == (4, 8, 8)
    torch.testing.assert_close(checkpoint.std**2, tree["ema"]["autoencoder_var"][0], rtol=1e-12, atol=0)
    assert checkpoint.recipe.data.normalise == "position"


def test_prefixes_of_a_compiled_run_are_taken_off(tmp_path):
    convert(write(tmp_path, published_snapshot(compiled=True)), tmp_path / "b2.safetensors", ConvertOptions())
    weights = load_checkpoint(tmp_path / "b2.safetensors").weights
    assert torch.equal(weights["blocks.0.attn.qkv.weight"], published_weights(12)["blocks.0.attn.qkv.weight"])


def test_a_stripped_snapshot_converts(tmp_path):
    tree = {key: value for key, value in published_snapshot().items() if key in ("ema", "cfg")}
    assert convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions()).weights == "ema"


def test_a_missing_ema_is_not_replaced_silently(tmp_path):
    tree = published_snapshot()
    del tree["ema"]
    with pytest.raises(AlphaflowError, match="no ema weights, only raw"):
        convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions())
    convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions(weights="raw"))
    assert load_checkpoint(tmp_path / "b2.safetensors").origin["weights"] == "raw"


def test_guidance_that_is_not_in_the_file_is_asked_for(tmp_path):
    tree = published_snapshot(dropout=0.1)
    with pytest.raises(AlphaflowError, match="--recipe b2-cfg"):
        convert(write(tmp_path, tree, "mine.pt"), tmp_path / "a.safetensors", ConvertOptions())
    convert(tmp_path / "mine.pt", tmp_path / "a.safetensors", ConvertOptions(recipe="b2-cfg"))
    convert(
        tmp_path / "mine.pt",
        tmp_path / "b.safetensors",
        ConvertOptions(sets=("guidance.omega=0.2", "guidance.kappa=0.92")),
    )
    mixes = [load_checkpoint(tmp_path / name).recipe.guidance for name in ("a.safetensors", "b.safetensors")]
    assert [(mix.omega, mix.kappa, mix.label_dropout) for mix in mixes] == [(1.0, 0.5, 0.1), (0.2, 0.92, 0.1)]


def test_the_name_of_a_released_file_stands_for_its_recipe_and_that_is_recorded(tmp_path):
    source = write(tmp_path, published_snapshot(dropout=0.1), "alphaflow-XL-2-cfg.pt")
    outcome = convert(source, tmp_path / "xl.safetensors", ConvertOptions())
    checkpoint = load_checkpoint(tmp_path / "xl.safetensors")
    assert (checkpoint.recipe.guidance.omega, checkpoint.recipe.guidance.kappa) == (0.2, 0.92)
    assert checkpoint.recipe.sample.two_step_sampler == "consistency"
    assert "xl2-cfg (the file's name)" in outcome.filled["recipe"]
    assert checkpoint.origin["converted"]["filled"]["recipe"] == outcome.filled["recipe"]


def test_statistics_that_are_not_filled_in_are_asked_for(tmp_path):
    tree = published_snapshot()
    tree["ema"]["are_ldm_stats_inited"] = torch.tensor(0.0)
    with pytest.raises(AlphaflowError, match="--latents FILE"):
        convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions())
    convert(tmp_path / "alphaflow-B-2.pt", tmp_path / "b2.safetensors", ConvertOptions(latents="scale:0.18215"))
    assert load_checkpoint(tmp_path / "b2.safetensors").recipe.data.scale == pytest.approx(0.18215)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [("model", "dim", 128, "dim 128, its weights say 96"), ("model", "num_blocks", 3, "num_blocks 3"),
     ("dataset", "label_shape", [12], "classes 12, its weights say 10")],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_weights_is_refused(tmp_path, section, key, value, told):
    tree = published_snapshot()
    tree["cfg"][section][key] = value
    with pytest.raises(AlphaflowError, match=told):
        convert(write(tmp_path, tree), tmp_path / "b2.safetensors", ConvertOptions())


def test_there_and_back_gives_the_same_tables(tmp_path):
    tree = published_snapshot(dropout=0.1, autoencoder=tiny_autoencoder())
    convert(write(tmp_path, tree, "alphaflow-B-2-cfg.pt"), tmp_path / "b2.safetensors", ConvertOptions())
    export(tmp_path / "b2.safetensors", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back["net"]) == list(back["ema"])
    assert set(back["ema"]) == set(tree["ema"])
    for name, value in tree["ema"].items():
        torch.testing.assert_close(back["ema"][name], value, rtol=1e-12, atol=0, check_dtype="autoencoder" in name)
    assert {key: back["cfg"][key] for key in ("model", "dataset")} == tree["cfg"]
    assert back["cfg"]["loss"]["cfg_params"] == {"omega": 1.0, "kappa": 0.5, "t_min": 0.0, "t_max": 1.0}
    convert(tmp_path / "back.pt", tmp_path / "again.safetensors", ConvertOptions(recipe="b2-cfg"))
    first, second = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("b2", "again"))
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_the_order_of_the_published_names_is_kept(tmp_path):
    convert(write(tmp_path, published_snapshot()), tmp_path / "b2.safetensors", ConvertOptions())
    back = torch.load(export(tmp_path / "b2.safetensors", tmp_path / "back.pt"), weights_only=True)["ema"]
    assert list(back)[:5] == [
        "autoencoder_mean", "autoencoder_var", "are_ldm_stats_inited", "model.pos_embed", "model.x_embedder.proj.weight"
    ]  # fmt: skip


def test_the_command_prints_the_path_last_and_what_was_filled_in(tmp_path):
    source = write(tmp_path, published_snapshot(), "mine.pt")
    done = CliRunner().invoke(command, [str(source), "-o", str(tmp_path / "b2.safetensors")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(tmp_path / "b2.safetensors")]
    assert "not in the file    recipe: b2 (no better knowledge)" in done.stderr


def test_the_python_door_opens_a_converted_snapshot(tmp_path):
    convert(
        write(tmp_path, published_snapshot(autoencoder=tiny_autoencoder())),
        tmp_path / "b2.safetensors",
        ConvertOptions(),
    )
    model = alphaflow_cli.load(tmp_path / "b2.safetensors")
    images = model.sample(3, classes=[3, 9], nfe=2).tensor
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.uint8)
    again = model.sample(seeds=[2], classes=3, nfe=2).tensor
    assert np.array_equal(images[2], again[0])
    with pytest.raises(AlphaflowError, match=f"classes {CLASSES}: not a class of this model: 0 to 9"):
        model.sample(seeds=[0], classes=[CLASSES])
