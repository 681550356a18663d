"""What fits into so many hours: the values that change, and how they are printed."""

import json
import shlex
from dataclasses import replace

import pytest
from train_helpers import make_recipe

from alphaflow_cli.cli import run as cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.loader import set_text
from alphaflow_cli.recipe.plan import phases
from alphaflow_cli.recipe.speed import TRAINER
from alphaflow_cli.train import estimate
from alphaflow_cli.train.estimate import PhaseTime
from alphaflow_cli.train.hours import changes, fit_hours, run_seconds, shortened
from alphaflow_cli.train.start import keep_recipe

TIMES = {"flow": 0.1, "between": 0.15, "derivative": 0.2}
MEASURED = [PhaseTime(kind, 0, seconds, 0) for kind, seconds in TIMES.items()]


@pytest.mark.parametrize("name", ["b2", "quickstart", "cifar10-shortcut", "soflow-b2"])
def test_what_is_printed_makes_the_run_that_was_reckoned_with(name):
    recipe = load_recipe(name)
    steps = recipe.train.steps // 8
    sets = [f"{key}={set_text(value)}" for key, value in changes(recipe, steps).items()]
    short = load_recipe(name, sets)  # by the rules of the file, warm-up and schedules included
    assert short == shortened(recipe, steps)
    assert short.train.steps == steps
    assert short.optim.warmup_steps == round(recipe.optim.warmup_steps / 8)
    assert [phase.kind for phase in phases(short)] == [phase.kind for phase in phases(recipe)]
    assert short.train.save_every <= steps // 10


def test_schedules_in_steps_keep_their_share_of_the_run(tmp_path):
    recipe = make_recipe(tmp_path, "train.steps=2000", "alpha.start=500", "alpha.end=1500")
    short = changes(recipe, 200)
    assert (short["alpha.start"], short["alpha.end"]) == (50, 150)
    assert not any(key.startswith("times.") for key in short), "a constant share"


def test_scores_while_training_come_as_often_in_the_run_and_a_line_says_that_they_are_not_counted(tmp_path):
    sets = ("train.steps=2000000", "alpha.end=1000000", "eval.every=1000", "eval.reference=shapes:100000")
    recipe = make_recipe(tmp_path, *sets)
    fit = fit_hours(recipe, 1, MEASURED, start=5)
    assert fit.sets["eval.every"] == round(1000 * fit.steps / 2_000_000)
    assert any("eval.every) come on top" in line for line in fit.lines())


def test_the_conflict_is_measured_as_often_in_the_run_and_its_time_counts():
    """A tenth of the steps had a tenth of the measurements, and a short run none."""
    recipe = load_recipe("b2", ["train.conflict_every=1000"])
    assert changes(recipe, 100_000)["train.conflict_every"] == 250
    more = run_seconds(recipe, 400_000, MEASURED) - run_seconds(load_recipe("b2"), 400_000, MEASURED)
    assert more == pytest.approx(400 * 16 / 3 * TIMES["flow"])  # a step of flow matching is three forwards


def test_a_warm_up_from_zero_keeps_a_step_where_little_fits():
    """The printed values were refused."""
    recipe = load_recipe("imf-b2")
    printed = [f"{key}={set_text(value)}" for key, value in changes(recipe, 20).items()]
    assert load_recipe("imf-b2", printed).optim.warmup_steps == 1


def test_the_longest_run_that_fits_is_found_and_one_step_more_does_not_fit():
    recipe = load_recipe("b2")
    fit = fit_hours(recipe, 8, MEASURED, start=20)
    assert 0 < fit.steps < recipe.train.steps
    assert fit.seconds <= 8 * 3600 < 20 + run_seconds(recipe, fit.steps + 200, MEASURED)
    assert fit.seconds > 0.99 * 8 * 3600
    assert any(line.startswith("  --set train.steps=") for line in fit.lines())


def test_a_run_that_fits_whole_changes_nothing_and_one_that_cannot_begin_is_refused():
    recipe = load_recipe("quickstart")
    fit = fit_hours(recipe, 1, MEASURED, start=5)
    assert (fit.steps, fit.sets) == (recipe.train.steps, {})
    assert "the whole run fits, 850 steps" in fit.lines()[0]
    with pytest.raises(AlphaflowError, match=r"about 5 s here, and a step 0\.2 s"):
        fit_hours(recipe, 0.001, MEASURED, start=5)


def test_steps_in_fp32_of_a_run_in_bf16_take_their_own_time():
    recipe = load_recipe("b2", ["train.precise_below=0.05"])
    wide = PhaseTime("between", 0, 1.0, 0, precise=True)
    narrow = replace(wide, seconds_per_step=TIMES["between"])
    more = run_seconds(recipe, 400_000, [*MEASURED, wide]) - run_seconds(recipe, 400_000, [*MEASURED, narrow])
    assert more == pytest.approx(37_581 * (1.0 - TIMES["between"]) * TRAINER)  # steps of 0.005 < alpha < 0.05


def test_a_small_part_of_a_recipe_is_called_so():
    assert any(line.startswith("beware: 0.0") for line in fit_hours(load_recipe("b2"), 0.1, MEASURED, start=5).lines())


def test_the_command_prints_sets_that_the_command_takes_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path, "train.steps=20")
    sets = ["--set", "train.steps=4000000", "--set", "alpha.end=3000000"]
    assert cli(["train", "tiny.yaml", *sets, "--hours", "0.02"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [part for line in lines if line.startswith("  --set") for part in shlex.split(line)]
    assert "nothing was changed; add to the command:" in lines
    load_recipe("tiny.yaml", [value for value in printed if value != "--set"])
    assert cli(["train", "tiny.yaml", *sets, "--hours", "0.02", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["hours"]["sets"]["train.steps"] == document["hours"]["steps"]
    assert not (tmp_path / "runs").exists()
    assert cli(["train", "tiny.yaml", "--hours", "0"]) == 2


def test_where_steps_take_long_a_part_of_the_rows_is_timed_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    monkeypatch.setattr(estimate, "LONG", 1e-6)
    assert cli(["train", "tiny.yaml", "--estimate", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.index("timing a few steps of each phase of tiny") < err.index(
        "steps of 16 rows take long here: steps of 4"
    )
    assert all(phase["seconds_per_step"] > 0 for phase in json.loads(out)["estimate"])


def test_the_plan_says_how_many_expected_scores_a_recipe_has_and_not_their_fields(capsys):
    assert cli(["train", "quickstart", "--set", "expected=[]", "--dry-run"]) == 0
    assert "expected: 2 scores in the shipped quickstart, 0 scores here" in capsys.readouterr().out


def test_the_plan_for_a_folder_that_holds_another_run_says_so(tmp_path, monkeypatch, capsys):
    """It said that the run resumes, which train then refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    keep_recipe(make_recipe(tmp_path), tmp_path / "runs" / "tiny")
    for sets, fits in ((("train.keep=3",), True), (("train.batch=8",), False)):
        assert cli(["train", "tiny.yaml", "--dry-run", "--json", "--set", *sets]) == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]
        assert any("runs/tiny: holds a run of another recipe" in text for text in warnings) != fits


def test_a_plan_is_for_as_many_processes_as_the_run_would_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def processes(*options):
        assert cli(["train", "tiny.yaml", "--dry-run", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["split"]["processes"]

    assert processes() == 4
    assert processes("--device", "cpu") == 1
    assert processes("--processes", "8") == 8  # a plan may be for another machine


@pytest.mark.parametrize("option", ["--dry-run", "--estimate"])
def test_of_a_launchers_processes_the_first_plans_for_all(option, tmp_path, monkeypatch, capsys):
    """Each of them printed a document of its own."""
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    monkeypatch.setattr(estimate, "TIMED_STEPS", 1)
    printed = []
    for rank in ("1", "0"):
        there = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        assert cli(["train", "tiny.yaml", option, "--json"]) == 0
        printed.append(capsys.readouterr())
    assert (printed[0].out, printed[0].err) == ("", "")
    assert json.loads(printed[1].out)["split"]["processes"] == 2


def test_hours_come_after_the_plan_and_the_estimate_that_were_wanted_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    monkeypatch.setattr(estimate, "TIMED_STEPS", 1)
    printed = {}
    for options in ((), ("--estimate",), ("--dry-run",)):
        assert cli(["train", "tiny.yaml", "--hours", "50", *options]) == 0
        printed[options] = capsys.readouterr().out
    assert "the whole run fits" in printed[()]
    assert printed[()].count("\n") == 1
    for option in ("--estimate", "--dry-run"):
        *plan, fit = printed[option,].splitlines()
        assert "the whole run fits" in fit
        assert plan[0].startswith("network")
        assert any(line.startswith("together: ") for line in plan) == (option == "--estimate")


@pytest.mark.parametrize(
    ("device", "options"),
    [("cuda", ()), ("cuda", ("--processes", "2")), ("cuda", ("--estimate",)), ("mps", ()), ("mps", ("--hours", "1"))],
)
def test_a_device_that_is_not_here_is_refused_and_not_the_cpu_in_its_place(
    device, options, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    make_recipe(tmp_path)
    assert cli(["train", "tiny.yaml", "--device", device, "--out", "run", *options]) == 1
    assert f"error: device {device}: torch sees no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
