"""`alphaflow sample`: the published samplers through the command line, and sample i is sample i."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import tensor
from PIL import Image
from small_models import checkpoint_m, pixel_checkpoint, recipe_m

from alphaflow_cli import cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.model.find import find_class
from alphaflow_cli.recipe.schema import Sample
from alphaflow_cli.sample.generator import Generator, open_generator
from alphaflow_cli.sample.grid import HIGHEST
from alphaflow_cli.sample.walk import draw_labels, plan_walk
from alphaflow_cli.train.samples import SampleGrids


@pytest.fixture
def golden_checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, checkpoint_m(recipe_m()))
    return path


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("traj1", ["--nfe", "1"]),
        ("traj2", ["--nfe", "2"]),
        ("traj_custom_055", ["--times", f"1,{float(np.float32(0.55))!r},0"]),
        ("cons2", ["--nfe", "2", "--sampler", "consistency"]),
        ("fm8", ["--nfe", "8", "--sampler", "flow"]),
    ],
)
def test_the_command_line_walks_the_published_samplers(golden_checkpoint, tmp_path, case, options):
    """Bound 1e-9 where torch draws the published noise; a processor without AVX2 rounds its last digit otherwise."""
    out, noise = tmp_path / "latents.npy", tensor("sampler_f64.npz", "noise_init")[0].double()
    drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn, noise, rtol=1e-6, atol=1e-6)
    bound = 1e-9 if torch.equal(drawn, noise) else 1e-5
    for seed, label in zip([0, 1, 2, 12345], [3, 7, 0, 9], strict=True):
        line = ["sample", str(golden_checkpoint), "--seeds", str(seed), "--classes", str(label)]
        assert cli.run([*line, *options, "--latents", str(out)]) == 0
        expected = tensor("sampler_f64.npz", f"{case}/out")[[0, 1, 2, 12345].index(seed)]
        np.testing.assert_allclose(np.load(out)[0], expected.numpy(), rtol=bound, atol=bound)


def test_a_picture_is_the_same_in_every_batch_and_order(tmp_path):
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    for batch in (1, 7, 64):
        folder = tmp_path / str(batch)
        line = ["sample", str(path), "--seeds", "0-29", "--nfe", "2", "--sampler", "consistency"]
        assert cli.run([*line, "--batch", str(batch), "--out", str(folder)]) == 0
    assert cli.run(["sample", str(path), "--seeds", "29,3,17", "--nfe", "2", "--sampler", "consistency",
                    "--out", str(tmp_path / "few")]) == 0  # fmt: skip
    files = sorted(file.name for file in (tmp_path / "1").glob("*.png"))
    assert len(files) == 30
    for name in files:
        pictures = {(tmp_path / folder / name).read_bytes() for folder in ("1", "7", "64")}
        assert len(pictures) == 1, name
    for file in (tmp_path / "few").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "1" / file.name).read_bytes()


def test_a_grid_of_several_numbers_of_steps_says_how_many_pictures_it_shows(tmp_path, capsys):
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    line = ["sample", str(path), "--seeds", "0-21", "--nfe", "1", "--nfe", "2", "--grid", str(tmp_path / "g.png")]
    assert cli.run(line) == 0
    shown = "g.png: shows the first 20 of 22 pictures, a row for each number of evaluations"
    assert shown in capsys.readouterr().err


def test_a_grid_shows_no_more_pictures_than_its_form_can_hold(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(HIGHEST, "WEBP", 300)  # not 16,383 pixels
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    assert cli.run(["sample", str(path), "--seeds", "0-30", "--grid", str(tmp_path / "g.webp")]) == 0
    assert "g.webp: shows the first 18 of 31 pictures" in capsys.readouterr().err
    with Image.open(tmp_path / "g.webp") as grid:
        assert grid.height <= 300


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_two_processes_draw_what_one_draws(tmp_path):
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    for processes in (1, 2):
        line = ["sample", str(path), "--seeds", "0-20", "--batch", "4", "--processes", str(processes)]
        grid = tmp_path / f"grid{processes}.png"
        assert cli.run([*line, "--latents", str(tmp_path / f"{processes}.npy"), "--grid", str(grid)]) == 0
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()
    assert (tmp_path / "grid1.png").read_bytes() == (tmp_path / "grid2.png").read_bytes()
    assert not [*tmp_path.glob("*.part*"), *tmp_path.glob(".*.lock")]


def test_labels_are_drawn_by_the_published_rule():
    drawn = draw_labels(range(10), 1000, "random")
    assert drawn == [684, 37, 168, 874, 122, 867, 906, 175, 451, 382]
    assert draw_labels(range(5), 3, "balanced") == [0, 1, 2, 0, 1]


def test_guidance_at_sampling_mixes_both_velocities(tmp_path):
    checkpoint = checkpoint_m(recipe_m())
    generator = Generator(checkpoint, device=torch.device("cpu"))
    walk = plan_walk(generator.recipe, nfe=1, guidance=3.0)
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(5)).double()[None]
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        u_y = generator.net(noise, one, zero, torch.tensor([4]))
        u_null = generator.net(noise, one, zero, torch.tensor([10]))
    expected = noise - (u_null + 3.0 * (u_y - u_null))
    torch.testing.assert_close(generator.latents([5], [4], walk), expected, rtol=1e-12, atol=1e-12)
    assert walk.nfe == 2


def test_a_model_without_labels_shows_no_class_though_its_store_had_some(tmp_path):
    """Every row of the training's grid bore the name of the first class."""
    generator = open_generator(str(pixel_checkpoint(tmp_path / "c.safetensors", classes=0)))
    shown = SampleGrids()._grid(generator)
    assert generator.class_names == []
    generator.origin["class_names"] = []
    assert SampleGrids()._grid(generator) == shown


def test_the_grid_of_a_run_is_drawn_by_heun_at_evaluations_that_it_has(tmp_path):
    generator = open_generator(str(pixel_checkpoint(tmp_path / "c.safetensors")))
    generator.recipe = replace(generator.recipe, sample=Sample(sampler="heun"))
    assert SampleGrids()._grid(generator).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "2"], "guidance 2 is built into these weights"),
        (["--times", "1,0.5"], "a grid falls from 1 to 0"),
        (["--times", "1,0.2,0.5,0"], "a grid falls from 1 to 0"),
        (["--times", "0.55,0"], "it may begin between 0.9 and 1"),
        (["--times", "1.5,0"], "it may begin between 0.9 and 1"),
        (["--guidance-channels", "3"], "there is no guidance to restrict"),
        (["--classes", "class 77"], "not a class of this model"),
        (["--classes", "10"], "not a class of this model"),
        (["--classes", "²"], "not a class of this model"),
        (["--classes", "9" * 5000], "not a class of this model"),
        (["--sampler", "heun", "--nfe", "4"], "1, 3, 5"),
        (["--weights", "raw"], "holds averaged weights only"),
    ],
)
def test_a_wish_that_cannot_be_granted_gets_one_line(tmp_path, capsys, options, message):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, checkpoint_m(recipe_m(omega=1.0, kappa=0.5)))
    assert cli.run(["sample", str(path), "--seeds", "0", "--latents", str(tmp_path / "x.npy"), *options]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "x.npy").exists()


def test_a_name_that_two_classes_bear_is_answered_with_their_numbers():
    """ImageNet has two cranes; the message said that it had none."""
    names = ["tench, Tinca tinca", "crane", "dog", "Crane, lifting device"]
    assert find_class("dog", names, 4) == 2
    assert find_class("lifting device", names, 4) == 3
    with pytest.raises(AlphaflowError, match=r"--classes crane: the name of several classes: 1, 3\. Give a number"):
        find_class("crane", names, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "cat.png"), "a folder for pictures, or FILE.npz; for one picture of all: --grid cat.png"),
        (("--out", "all.tar"), "a folder for pictures, or FILE.npz"),
        (("--out", "all.npy"), "a folder for pictures, or FILE.npz"),
        (("--out", "ALL.NPZ"), "write .npz in small letters"),
        (("--latents", "z.png"), "latents are a file .npy"),
    ],
)
def test_a_name_that_would_hide_what_is_in_the_file_is_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    assert cli.run(["sample", str(path), "--seeds", "0", *options]) == 2
    assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    "seeds", ["a", "5-2", "1,,2", "-3", "²", "1-²", str(2**64), "0-9999999999", "0-99999999,7", "0-" + "9" * 5000]
)
def test_seeds_that_are_no_seeds_are_a_fault_of_the_command_line(tmp_path, seeds):
    assert cli.run(["sample", "x.safetensors", f"--seeds={seeds}", "--grid", "g.png"]) == 2


NO_VALUES = [
    ("--nfe", "0"), ("--nfe", "1000000000"), ("--nfe", "9" * 5000), ("--nfe", "1.5"),
    ("--times", "1,nan,0"), ("--times", "1,inf,0"), ("--times", "a"), ("--times", "1," * 200_000 + "0"),
    ("--guidance", "nan"), ("--guidance", "inf"), ("--guidance", "-inf"), ("--guidance", "9" * 5000),
    ("--guidance", "two"), ("--guidance-channels", "0"), ("--guidance-channels", "x"),
    ("--processes", "1000000000"),
]  # fmt: skip


@pytest.mark.parametrize("verb", ["sample", "eval"])
@pytest.mark.parametrize(("option", "value"), NO_VALUES, ids=lambda text: str(text)[:20])
def test_a_value_that_no_option_has_is_a_fault_of_the_command_line(tmp_path, capsys, verb, option, value):
    written = ["--grid", str(tmp_path / "g.png")] if verb == "sample" else []
    assert cli.run([verb, str(pixel_checkpoint(tmp_path / "c.safetensors")), option, value, *written]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: Invalid value for")
    assert option in last


def test_a_recipe_or_a_call_cannot_ask_for_a_billion_steps():
    with pytest.raises(AlphaflowError, match="at most 10,000 are made"):
        plan_walk(recipe_m(), nfe=10**9)


def test_a_grid_that_begins_below_one_takes_the_noise_for_z_at_that_time(golden_checkpoint, tmp_path):
    generator = Generator(checkpoint_m(recipe_m()), device=torch.device("cpu"))
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(5)).double()[None]
    t, zero, y = torch.full((1,), 0.999, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.tensor([4])
    with torch.no_grad():
        expected = noise - 0.999 * generator.net(noise, t, zero, y)
    line = ["sample", str(golden_checkpoint), "--seeds", "5", "--classes", "4", "--times", "0.999,0"]
    assert cli.run([*line, "--latents", str(tmp_path / "z.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_guidance_of_three_channels_leaves_the_fourth(golden_checkpoint, tmp_path):
    def latents(*options):
        line = ["sample", str(golden_checkpoint), "--seeds", "0-2", "--classes", "4", *options]
        assert cli.run([*line, "--latents", str(tmp_path / "z.npy")]) == 0
        return np.load(tmp_path / "z.npy")

    plain, full, three = latents(), latents("--guidance", "3"), latents("--guidance", "3", "--guidance-channels", "3")
    assert np.array_equal(three[:, :3], full[:, :3])
    assert np.array_equal(three[:, 3:], plain[:, 3:])
    assert not np.array_equal(full[:, 3:], plain[:, 3:])
    assert np.array_equal(latents("--guidance", "3", "--guidance-channels", "4"), full)


def test_more_guided_channels_than_there_are_get_one_line(golden_checkpoint, tmp_path, capsys):
    line = ["sample", str(golden_checkpoint), "--guidance", "3", "--guidance-channels", "5"]
    assert cli.run([*line, "--latents", str(tmp_path / "z.npy")]) == 1
    assert "this model's latents have 4 channels" in capsys.readouterr().err


def test_a_broken_checkpoint_is_named(tmp_path, capsys):
    path = pixel_checkpoint(tmp_path / "c.safetensors")
    data = path.read_bytes()
    truncated = tmp_path / "short.safetensors"
    truncated.write_bytes(data[: len(data) // 2])
    foreign = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, foreign)
    missing = tmp_path / "no.safetensors"
    for file, words in ((truncated, "truncated"), (foreign, "not an alphaflow checkpoint"), (missing, "no such")):
        assert cli.run(["sample", str(file), "--grid", str(tmp_path / "g.png")]) == 1
        said = capsys.readouterr().err
        assert str(file) in said
        assert words in said


def test_weights_that_are_not_finite_make_no_picture(tmp_path, capsys):
    path = pixel_checkpoint(tmp_path / "nan.safetensors")
    checkpoint = load_checkpoint(path)
    checkpoint.weights["final.linear.bias"][3] = float("nan")
    save_checkpoint(path, checkpoint)
    for option, name in (("--grid", "g.png"), ("--latents", "z.npy")):
        assert cli.run(["sample", str(path), "--seeds", "0-3", option, str(tmp_path / name)]) == 1
        assert "not finite" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_the_recipe_chooses_sampler_and_grid_per_nfe():
    said = Sample(two_step_sampler="consistency", two_step_times=(1.0, 0.55, 0.0))
    recipe = replace(recipe_m(), sample=said)
    assert plan_walk(recipe, nfe=1).grid == (1.0, 0.0)
    two = plan_walk(recipe, nfe=2)
    assert (two.sampler, two.grid) == ("consistency", (1.0, 0.55, 0.0))
    assert plan_walk(recipe, nfe=2, kind="trajectory").grid == (1.0, 0.5, 0.0)
    assert plan_walk(recipe, nfe=4).grid == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert plan_walk(recipe, nfe=3, kind="heun").nfe == 3
