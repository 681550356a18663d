"""`alphaflow ema`: averages that a run did not keep, made of those that it kept, and a check that says how well."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_helpers import make_recipe, make_store, train

from alphaflow_cli import cli
from alphaflow_cli.core.ema import ema_beta, update_ema
from alphaflow_cli.ema.averages import distances
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.latents.encode import StoreRequest
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.runtime.processes import Processes

DENSE = ("train.steps=16", "train.save_every=1", "train.keep=100", "ema.half_lives=[3,6,12]", "ema.ramp=0.9")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that kept every step, with three averages."""
    folder = tmp_path_factory.mktemp("runs")
    return train(make_recipe(folder, *DENSE), make_store(folder / "store"), folder / "dense")


def weights(path):
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("net.")}


def averages_of(run, capsys, *options):
    capsys.readouterr()
    assert cli.run(["ema", str(run), "--no-scores", "--json", *options]) == 0
    return {each["name"]: each for each in json.loads(capsys.readouterr().out)["averages"]}


def test_an_average_that_the_run_kept_is_made_of_the_others_to_a_millionth(run, capsys):
    made = averages_of(run, capsys)
    assert set(made) == {f"half-life {life}, kept" for life in (3, 6, 12)}
    for each in made.values():
        assert each["expected_error"] < 1e-6, each
        assert each["check"] < 1e-6, each


@pytest.mark.parametrize(("there", "words"), [("net.b", "net.a is not in it"), ("net.a", "net.a has another shape")])
def test_a_checkpoint_of_another_run_among_the_runs_own_gets_one_line(there, words, tmp_path):
    own, foreign = tmp_path / "own.safetensors", tmp_path / "foreign.safetensors"
    save_file({"net.a": torch.ones(2)}, own)
    save_file({there: torch.ones(3)}, foreign)
    with pytest.raises(AlphaflowError, match=f"{foreign.name}.*{words}"):
        distances([(foreign, own)])


@pytest.mark.parametrize("every", [2, 4])
def test_the_expected_error_is_what_the_check_finds(every, run, tmp_path, capsys):
    thin = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("averages"))
    for folder in (thin / "checkpoints").iterdir():
        if int(folder.name[5:]) % every:
            shutil.rmtree(folder)
    for name, each in averages_of(thin, capsys).items():
        assert 0.4 * each["check"] < each["expected_error"] < 2.5 * each["check"], name


def test_an_average_that_was_not_kept_is_what_training_would_have_kept(run, tmp_path, capsys):
    made = averages_of(run, capsys, "--half-life", "4.5", "--out", str(tmp_path / "averages"))["half-life 4.5"]
    assert made["expected_error"] < 1e-6
    raw = [weights(run / "checkpoints" / f"step-{step:08d}" / "raw.safetensors") for step in range(1, 17)]
    expected = {name: tensor.clone() for name, tensor in raw[0].items()}
    for step, each in enumerate(raw):
        beta = ema_beta(step, half_life=4.5, ramp=0.9, every=1)
        update_ema(list(expected.values()), [each[name] for name in expected], beta)
    ours = weights(tmp_path / "averages" / "ema-4.5.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6)
    checkpoint = load_checkpoint(tmp_path / "averages" / "ema-4.5.safetensors")
    assert (checkpoint.origin["step"], checkpoint.origin["half_life"]) == (16, 4.5)
    assert checkpoint.origin["averaged_again"]["files"] > 15


def test_half_lives_that_look_the_same_have_files_of_their_own_and_keep_every_digit(run, tmp_path, capsys):
    lives = (1234567.0, 1234567.5)
    averages_of(run, capsys, *(f"--half-life={life}" for life in lives), "--out", str(tmp_path / "averages"))
    files = sorted((tmp_path / "averages").glob("*.safetensors"))
    assert [load_checkpoint(file).origin["half_life"] for file in files] == list(lives)


def test_a_power_function_weighs_the_steps_by_a_power(run, tmp_path, capsys):
    averages_of(run, capsys, "--power", "0.2", "--out", str(tmp_path / "averages"))
    raw = [weights(run / "checkpoints" / f"step-{step:08d}" / "raw.safetensors") for step in range(1, 17)]
    k = torch.arange(17, dtype=torch.float64) / 16
    for gamma in torch.linspace(1.0, 6.0, 5001).tolist():
        shares = (k ** (gamma + 1)).diff()
        middle = (k[1:] + k[:-1]) / 2
        if ((shares * (middle - (shares * middle).sum()) ** 2).sum().sqrt()) < 0.1996:
            break
    expected = {
        name: sum(share * each[name].double() for share, each in zip(shares, raw, strict=True)) for name in raw[0]
    }
    ours = weights(tmp_path / "averages" / "power-0.2.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name].double(), tensor, rtol=0, atol=1e-3)


def test_a_merge_moves_the_average_on_along_its_change(run, tmp_path, capsys):
    out = tmp_path / "averages"
    made = averages_of(run, capsys, "--merge", "8:0.5", "--merge", "12:-1", "--out", str(out))
    assert made["merge 8:0.5"]["expected_error"] is None
    folders = {step: run / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (8, 12, 16)}
    then, back, now = (weights(folders[step]) for step in (8, 12, 16))
    ours = weights(out / "merge-8-0.5.safetensors")
    for name, tensor in now.items():
        torch.testing.assert_close(ours[name], tensor + 0.5 * (tensor - then[name]), rtol=1e-6, atol=1e-7)
    same = weights(out / "merge-12--1.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in back.items()), "all the way back is the earlier one"


def test_half_lives_that_the_ramp_makes_one_average_are_named(run, tmp_path, capsys):
    line = ["ema", str(run), "--no-scores", "--out", str(tmp_path), "--half-life"]
    assert cli.run([*line, "4", "--half-life", "15", "--half-life", "90"]) == 0
    assert "beware: half-life 15, 90: the run's ema.ramp (0.9) lets none be longer than 14.4" in capsys.readouterr().err
    made = weights(tmp_path / "ema-15.safetensors"), weights(tmp_path / "ema-90.safetensors")
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


def test_few_kept_files_make_a_coarse_average_and_a_line_says_so(run, tmp_path, capsys):
    thin = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-0000000?", "raw.safetensors"))
    for folder in sorted((thin / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(folder)
    assert cli.run(["ema", str(thin), "--no-scores", "--power", "0.05", "--half-life", "1"]) == 0
    told = capsys.readouterr()
    assert "beware: half-life 1: its weights are expected to be" in told.err
    assert "half-life 1 " in told.out


def test_an_earlier_step_takes_no_later_weights(run, capsys):
    made = averages_of(run, capsys, "--step", "12", "--half-life", "4")
    assert made["half-life 4"]["expected_error"] < 1e-6
    document = json.loads((run / "averages" / "step-00000012" / "averages.json").read_text())
    steps = {int(name[5:13]) for each in document["averages"] for name, _ in each["factors"]}
    assert max(steps) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "99"], "no checkpoint of step 99; there are: 7, 8"),
        (["--merge", "99:0.5"], "no earlier checkpoint of that step; there are: 1, 2"),
        (["--merge", "8"], "write STEP:FACTOR, such as 4000:0.5"),
        (["--merge", "8:nan"], "write STEP:FACTOR"),
        (["--half-life", "0"], "is not a number that is more than 0"),
        (["--power", "0.5"], "is not a number that is 0.001 or more, and at most 0.28"),
        (["--nfe", "2"], "--no-scores measures nothing: leave --nfe, "),
        (["--metrics", "fd-tiny"], "--no-scores measures nothing: leave --nfe, "),
    ],
)
def test_what_cannot_be_averaged_is_refused(options, message, run, capsys):
    assert cli.run(["ema", str(run), "--no-scores", *options]) in (1, 2)
    assert message in capsys.readouterr().err


def test_scores_without_a_reference_are_refused_before_anything_is_made(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    recipe = load_recipe(str(run / "recipe.yaml"), ['eval.reference=""'])
    (tmp_path / "run/recipe.yaml").write_text(dump_recipe(recipe))
    shutil.rmtree(tmp_path / "run/averages", ignore_errors=True)
    assert cli.run(["ema", str(tmp_path / "run"), "--half-life", "3"]) == 1
    assert "nothing to compare with. Give --reference FILE|SOURCE, or leave the scores out: --no-scores" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run/averages").exists()


def test_a_file_that_does_not_say_whose_weights_it_holds_is_named(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-00000003" / "mine.safetensors").write_text("not a checkpoint")
    assert cli.run(["ema", str(copy), "--no-scores"]) == 1
    assert "step-00000003/mine.safetensors" in capsys.readouterr().err


def test_all_averages_are_drawn_and_scored_in_one_table(tmp_path, capsys):
    text = """
model: {dim: 32, depth: 1, heads: 2, patch: 4}
data: {autoencoder: none, image_size: 16, channels: 3, latent_size: 16, classes: 10, normalise: scale}
alpha: 0
ema: {half_lives: [2, 4]}
train: {steps: 4, batch: 8, precision: fp32, save_every: 2, milestone_every: 0, log_every: 4, sample_every: 0}
eval: {quick_images: 100, quick_nfe: [1], draw: balanced, reference: "shapes:100"}
"""
    store = tmp_path / "store"
    prepare_store(StoreRequest("shapes:60", 16, "none", flips=False), store, Processes(torch.device("cpu")))
    run = train(make_recipe(tmp_path, text=text), store, tmp_path / "run")
    capsys.readouterr()
    assert cli.run(["ema", str(run), "--half-life", "3"]) == 0
    head, *lines, grid, folder = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-1].strip() == "FD-tiny-100 at 1 NFE"
    assert [line.split("  ")[0] for line in lines] == ["half-life 4, kept", "half-life 2, kept", "half-life 3"]
    assert all(float(line.split()[-1]) > 0 for line in lines)
    assert (tmp_path / "run" / "averages" / "step-00000004" / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert (str(run / "averages/step-00000004/grid.png"), str(run / "averages/step-00000004")) == (grid, folder)
    made = run / "averages" / "step-00000004" / "ema-3.safetensors"
    assert cli.run(["sample", str(made), "--seeds", "0-3", "--grid", str(tmp_path / "grid.png")]) == 0
