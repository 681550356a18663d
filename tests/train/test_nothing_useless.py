"""What a run would do in vain is said before it begins, and what is refused leaves nothing behind."""

import shlex

import pytest
from small_models import pixel_checkpoint
from train_helpers import make_recipe, make_store, train

from alphaflow_cli.cli import run as cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.train.start import TrainOptions, check_recipe, keep_recipe, prepare_run

STEADY = ("alpha=0.5", "train.steps=4", "train.save_every=2", "train.log_every=1")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def test_train_says_every_doubt_before_it_begins_and_once(store, tmp_path, capsys):
    recipe = make_recipe(tmp_path, "train.precision=bf16", "optim.warmup_steps=2000", "ema.half_lives=[90]")
    prepare_run(recipe, TrainOptions(tmp_path / "run", store))
    lines = [line for line in capsys.readouterr().err.splitlines() if "beware: " in line]
    words = ("the warm-up (2,000 steps) outlasts the run: lr reaches 1e-05", "half-life 90 steps", "bf16 is slower")
    for text in (*words, "alphaflow eval would draw 50,000 pictures, and there are 48 to compare them with"):
        assert sum(text in line for line in lines) == 1, lines
    assert len(lines) == 4


def test_a_refused_checkpoint_to_begin_with_leaves_nothing(store, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    pixel_checkpoint(tmp_path / "other.safetensors")
    refused = {
        "tiny.yaml --init-from other.safetensors": "another architecture",
        "quickstart --init-from nothing.safetensors": "no such run or checkpoint",  # before its pictures are drawn
    }
    for words, reason in refused.items():
        data = f"--data {store}" if "tiny" in words else ""
        assert cli(shlex.split(f"train {words} {data} --out runs/a/b")) == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()


def test_a_refused_run_leaves_the_folder_that_was_there(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    (tmp_path / "runs").mkdir()
    assert cli(shlex.split(f"train tiny.yaml --data {store} --out runs/a --set data.classes=3")) == 1
    assert [*(tmp_path / "runs").iterdir()] == []


def test_a_lock_takes_the_folders_along_that_it_made(tmp_path):
    with hold(tmp_path / "a" / "b", "test"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with hold(tmp_path / "a" / "b", "test"):
        (tmp_path / "a" / "kept").touch()
    assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "kept"]


def test_a_finished_run_goes_on_where_more_steps_change_nothing_of_it(store, tmp_path):
    out = train(make_recipe(tmp_path, *STEADY), store, tmp_path / "run")
    longer = make_recipe(tmp_path, *STEADY[:1], "train.steps=6", *STEADY[2:])
    train(longer, store, out)
    assert load_recipe(str(out / "recipe.yaml")).train.steps == 6
    assert (out / "checkpoints" / "step-00000006").is_dir()


@pytest.mark.parametrize(
    ("sets", "moved"),
    [
        (("alpha.end=50%",), "alpha"),
        (("alpha=0.5", "optim.final_lr=0"), "the learning rate"),
        (("alpha=0.5", "loss.short_first=true"), "loss.short_first"),
        (("alpha=0.5", "times.equal_share.kind=step", "times.equal_share.start=50%"), "times.equal_share"),
    ],
)
def test_more_steps_than_the_schedule_allows_name_the_way_on(sets, moved, tmp_path):
    keep_recipe(make_recipe(tmp_path, *sets), tmp_path)
    with pytest.raises(AlphaflowError) as fault:
        check_recipe(make_recipe(tmp_path, *sets, "train.steps=40"), tmp_path)
    text = str(fault.value)
    assert f"with 40 {moved} would have gone another way from the first step on" in text
    assert f"--init-from {tmp_path} --out RUN" in text
    assert "\n" not in text


def test_schedules_in_steps_and_fewer_steps_are_told_apart(tmp_path):
    keep_recipe(make_recipe(tmp_path), tmp_path)  # alpha from step 5 to 15
    assert check_recipe(make_recipe(tmp_path, "train.steps=40"), tmp_path) == [("train.steps", 20, 40)]
    with pytest.raises(AlphaflowError, match="holds a run of another recipe"):
        check_recipe(make_recipe(tmp_path, "train.steps=16"), tmp_path)
