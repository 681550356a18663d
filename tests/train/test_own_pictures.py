"""Pictures of one's own in one step: a shipped recipe yields to the store of --data, a file and --set hold."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from latent_stores import moments_store
from PIL import Image

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import dump_recipe, load_recipe, shipped
from alphaflow_cli.train.propose import RecipeRequest, propose_recipe
from alphaflow_cli.train.start import check_recipe, doubts
from alphaflow_cli.train.store import check_is_store, check_store, disagreements, resolve_run, store_of

TINY = (
    "--set model.dim=16 --set model.depth=1 --set model.heads=2 --set train.steps=4 --set train.batch=4 "
    "--set alpha=0.5 --set train.save_every=2 --set train.log_every=1 --set train.sample_every=4"
)


def prepare(folder, options):
    """Pictures of three classes, and their store `mine`, made by the command."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "newt"):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            picture = Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8))
            picture.save(folder / "photos" / name / f"{i}.png")
    command = f"prep-latents {folder / 'photos'} {options} --out {folder / 'mine'}"
    assert cli(shlex.split(command)) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`mine`: pixels with mirror images; `latents`: moments of an autoencoder, without. 3 and 10 classes."""
    folder = tmp_path_factory.mktemp("own")
    prepare(folder, "--size 20 --autoencoder none --flips")
    moments_store(folder / "latents")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    for name in ("mine", "latents"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(name="quickstart", *sets, data="mine", out=None):
    return resolve_run(name, sets, data=data and Path(data), out=out and Path(out))


def begun(run):
    """As training leaves it: the recipe is in the folder."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(dump_recipe(run.recipe))
    return run.recipe


def write(text):
    Path("own.yaml").write_text(text)
    return "own.yaml"


def refusal(recipe, store, **more):
    with pytest.raises(AlphaflowError) as fault:
        check_store(recipe, Path(store), **more)
    return str(fault.value)


def test_from_a_folder_to_a_grid_three_commands_are_enough(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "--size 16 --autoencoder none")  # the first
    assert cli(shlex.split(f"train quickstart --data mine {TINY}")) == 0
    assert cli(shlex.split("sample runs/quickstart-mine --classes cat,newt --seeds 0-3 --grid grid.png")) == 0
    _, err = capfd.readouterr()
    assert err.count("quickstart takes over from mine: ") == 1
    assert "data.classes: 3" in err
    assert (tmp_path / "grid.png").is_file()
    saved = load_recipe("runs/quickstart-mine/recipe.yaml")
    assert (saved.data.classes, saved.data.store, saved.data.source, saved.eval.reference) == (3, "mine", "", "")
    # the run needs no --data again
    assert cli(shlex.split(f"train quickstart --out runs/quickstart-mine {TINY}")) == 0
    assert "the run is finished" in capfd.readouterr().err
    assert cli(shlex.split("analyze runs/quickstart-mine --batches 1 --batch 2")) == 0


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_yields_to_the_store(name, here):
    run = resolved(name, "model.patch=2")
    data = run.recipe.data
    assert (data.autoencoder, data.image_size, data.latent_size, data.channels) == ("none", 20, 20, 3)
    assert (data.classes, data.flips, data.source, data.store) == (3, True, "", "mine")
    assert data.normalise != "position"  # a pixel may be the same in every picture
    assert (run.recipe.eval.reference, run.recipe.eval.images) == ("", 12)  # as many as there are to compare with
    assert run.folder == Path("runs") / f"{name}-mine"
    assert run.notes[0].startswith(f"{name} takes over from mine: ")
    assert "\n" not in run.notes[0]
    assert disagreements(read_manifest(Path("mine")).plan, run.recipe) == []


def test_pictures_that_were_left_out_as_bad_are_not_counted_for_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos/cat").mkdir(parents=True)
    Path("photos/cat/broken.png").touch()
    prepare(tmp_path, "--size 20 --autoencoder none --bad skip")
    recipe = resolved("quickstart", "model.patch=4").recipe
    assert recipe.eval.images == 12
    assert not any("pictures" in text for text in doubts(recipe, Path("mine")))


def test_a_plan_for_an_unfinished_store_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("half").mkdir()
    Path("half/plan.json").write_text("{}")
    assert cli(["train", "quickstart", "--data", "half", "--dry-run"]) == 1
    assert "half: unfinished. First run the command that began it again" in capsys.readouterr().err


def test_what_set_says_holds_and_a_clash_names_the_line_to_change(here):
    run = resolved("quickstart", "data.classes=10", "model.patch=4")
    assert run.recipe.data.classes == 10
    assert "data.classes" not in run.notes[0]
    text = refusal(run.recipe, "mine")
    assert "data.classes: 3 in the store, 10 in the recipe" in text
    assert "--set data.classes=3" in text
    assert "prep-latents" not in text  # which would not help
    assert "--data" not in text  # it was given


def test_a_file_of_ones_own_holds_in_what_it_says_and_yields_in_the_rest(here):
    run = resolved(write("model: {patch: 4}\ndata: {classes: 5, flips: false}\n"))
    data = run.recipe.data
    assert (data.classes, data.flips) == (5, False)
    assert (data.autoencoder, data.image_size, data.channels, data.store) == ("none", 20, 3, "mine")
    assert run.folder == Path("runs/own")
    assert "--set data.classes=3" in refusal(run.recipe, "mine")
    own = "model: {patch: 4}\neval: {images: 500}\n"
    assert resolved(write(own)).recipe.eval.images == 500
    labelless = resolved(write("model: {patch: 4}\ndata: {classes: 0}\neval: {draw: random}\n"))
    check_store(labelless.recipe, Path("mine"))


def test_a_clash_that_preparing_again_mends_names_that_command_too(here):
    text = refusal(resolved(write("model: {patch: 4}\ndata: {image_size: 64, latent_size: 64}\n")).recipe, "mine")
    assert "--set data.image_size=20 --set data.latent_size=20" in text
    assert "alphaflow prep-latents SOURCE --size 64 --out DIR" in text
    text = refusal(resolved("b2", "data.flips=true", data="latents").recipe, "latents")
    assert "--set data.flips=false" in text
    assert "alphaflow prep-latents SOURCE --flips --out DIR" in text


def test_a_store_in_a_shipped_recipe_is_not_data_until_it_is_given(here):
    text = refusal(resolved("b2", "data.store=mine", data=None).recipe, "mine", given=False)
    assert "give the store by --data mine" in text
    assert "prep-latents" not in text


def test_latents_of_the_same_autoencoder_keep_the_name_that_the_recipe_has_for_it(here):
    run = resolved("b2", data="latents")
    assert run.recipe.data.autoencoder == "stabilityai/sd-vae-ft-ema"
    assert run.recipe.data.normalise == "position"
    moved = resolved(write("data: {autoencoder: weights/sd_vae_ft_ema.pt}\n"), data="latents").recipe
    assert moved.data.autoencoder == "weights/sd_vae_ft_ema.pt"
    check_store(moved, Path("latents"))


def test_the_scale_of_another_autoencoder_is_the_stores(here):
    assert resolved(write("model: {patch: 4}\ndata: {normalise: scale}\n")).recipe.data.scale == 1.0
    run = resolved("quickstart", "data.normalise=scale", "data.scale=0.5", "model.patch=4")
    assert run.recipe.data.scale == 0.5


def test_a_patch_that_does_not_fit_names_one_that_does(here):
    with pytest.raises(AlphaflowError, match=r"set model.patch: 2 \(--set model.patch=2\)"):
        resolved("quickstart", "model.patch=3")


def test_a_patch_that_does_not_fit_yields_to_one_with_as_many_tokens(here):
    run = resolved("quickstart")  # 24 px in patches of 6: 4 × 4 tokens; the store has 20 px
    assert run.recipe.model.patch == 5
    assert "model.patch: 5" in run.notes[0]
    assert resolved("b2").recipe.model.patch == 2  # which divides 20


def test_data_of_the_recipes_own_kind_change_nothing_that_was_not_said(here):
    run = resolved(write(dump_recipe(resolved("b2", data="latents").recipe)), data="latents")
    assert run.notes == ()
    assert run.folder == Path("runs/b2")  # its name


def test_a_run_goes_on_with_the_data_that_it_was_begun_with(here):
    recipe = begun(resolved("quickstart", "model.patch=4"))
    for again in (
        resolved("quickstart", "model.patch=4"),
        resolved("quickstart", "model.patch=4", data=None, out="runs/quickstart-mine"),
    ):
        assert again.recipe == recipe
        assert again.notes == ()
        assert check_recipe(again.recipe, again.folder) == []
    assert store_of(recipe, data=None, out=Path("elsewhere")) == Path("mine")
    moved = resolved("quickstart", "model.patch=4", "data.store=moved", data=None, out="runs/quickstart-mine")
    assert moved.recipe.data.store == "moved"


def test_a_run_whose_data_were_moved_asks_where_they_are(here):
    recipe = begun(resolved("quickstart", "model.patch=4"))
    Path("mine").rename("moved")
    with pytest.raises(
        AlphaflowError, match=r"run\S*: its latents are not in mine any more\. Say where .*: --data DIR"
    ):
        resolved("quickstart", "model.patch=4", data=None, out="runs/quickstart-mine")
    again = resolved("quickstart", "model.patch=4", data="moved", out="runs/quickstart-mine").recipe
    assert replace(again, data=replace(again.data, store="mine")) == recipe


def test_other_data_for_a_run_that_has_begun_want_another_folder(here):
    begun(resolved("quickstart", "model.patch=4", out="run"))
    again = resolved("quickstart", "model.patch=4", data="latents", out="run").recipe
    with pytest.raises(AlphaflowError) as fault:
        check_store(again, Path("latents"), Path("run"))
    assert "run: was begun with other data than latents has" in str(fault.value)
    assert str(fault.value).endswith("Take another folder: --out RUN")


def test_a_run_of_before_that_was_given_mirror_images_goes_on_without_them(here):
    sets = ("model.patch=4", "data.flips=false", "data.store=''")
    recipe = begun(resolved("quickstart", *sets, out="run"))
    assert resolved("quickstart", "model.patch=4", out="run").recipe.data.flips is recipe.data.flips is False


def test_the_plan_is_of_the_data_that_were_given(here, capsys):
    assert cli(shlex.split("train quickstart --data mine --set model.patch=4 --dry-run")) == 0
    out = capsys.readouterr().out
    assert "3×20×20 pixels, 3 classes" in out
    assert "quickstart takes over from mine: " in out
    assert "runs/quickstart-mine" in out


def test_pictures_in_place_of_a_store_are_answered_by_the_command_that_makes_one(place):
    line = r"alphaflow prep-latents \S+/photos --size 32 --autoencoder none --out latents/photos, then train with"
    with pytest.raises(AlphaflowError, match=line):
        resolved(data=place / "photos")


def test_a_store_that_is_not_there_leaves_no_folder(here, capsys):
    assert cli(shlex.split("train quickstart --data latents/nothing")) == 1
    assert "latents/nothing: no latent store here" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_constants_of_other_latents_are_estimated_on_the_store_instead(here):
    own = "data: {normalise: channel, channel_mean: [1, 2, 3, 4], channel_std: [1, 1, 1, 1]}\n"
    Path("like.yaml").write_text(own)
    made = propose_recipe(RecipeRequest(Path("mine"), Path("new.yaml"), like="like.yaml")).recipe
    assert (made.data.channels, made.data.normalise, made.data.channel_mean) == (3, "channel", None)
    same = propose_recipe(RecipeRequest(Path("latents"), Path("new.yaml"), like="like.yaml")).recipe
    assert same.data.channel_mean == (1, 2, 3, 4)


def test_the_folder_one_stands_in_gets_latents_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    with pytest.raises(AlphaflowError, match=r"--out latents/birds, then train with --data latents/birds$"):
        check_is_store(Path(), "quickstart")
