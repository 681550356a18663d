"""Every recipe of the family's newer members goes the whole way at toy size: train, sample, eval, report, push."""

import json

import pytest

from alphaflow_cli.cli import run
from alphaflow_cli.recipe import load_recipe, plan
from alphaflow_cli.train.journal import read_rows

TOY = (
    "data.autoencoder=none", "data.image_size=16", "data.latent_size=16", "data.channels=3", "data.classes=10",
    "data.normalise=scale", "data.flips=false", "model.dim=32", "model.depth=2", "model.heads=2", "model.patch=4",
    "train.steps=50", "train.batch=16", "train.precision=fp32", "train.save_every=50", "train.log_every=10",
    "train.sample_every=0", "train.milestone_every=0", "optim.warmup_steps=5", "eval.metrics=[fd-tiny]",
    "eval.images=100",
)  # fmt: skip
NEW = {"soflow-b4": "between", "cifar10-soflow": "between", "meanflow-b2-boundary": "derivative"}
GUIDED = {"imf-b2": "derivative", "alphaflow-imf-b2": "derivative"}  # guidance is an input
AS_B2 = {"imf-m2": "derivative", "imf-l2": "derivative", "imf-xl2": "derivative"}
AS_B4 = {"soflow-b2": "between", "soflow-xl2": "between"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("latents") / "store"
    assert run(["prep-latents", "glyphs:100", "--size", "16", "--out", str(store)]) == 0
    return store


def sets(name):
    """The recipe's keys at toy size; a curriculum passes through all of its phases."""
    own = ("data.channel_mean=null", "data.channel_std=null", "model.velocity_head=1", "model.mlp_ratio=2.7")
    return (*TOY, *own, "train.precise_below=0") if name in GUIDED | AS_B2 else TOY


def go(*line):
    assert run([str(part) for part in line]) == 0, line


@pytest.mark.parametrize("name", [
    *NEW, *GUIDED, *(pytest.param(name, marks=pytest.mark.slow) for name in AS_B4 | AS_B2)
])  # fmt: skip
def test_a_recipe_goes_from_training_to_a_dry_push(name, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    go("train", name, "--data", store, "--out", "run", *(part for text in sets(name) for part in ("--set", text)))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    if name == "alphaflow-imf-b2":  # through all phases
        assert [row["phase"] for row in rows] == ["flow", "between", "between", "derivative", "derivative"]
    else:
        assert {row["phase"] for row in rows[1:]} == {(NEW | AS_B4 | GUIDED | AS_B2)[name]}
    assert all(row["nonfinite"] == 0 for row in rows)
    guided = name in GUIDED | AS_B2
    assert all(("l_head" in row) == guided for row in rows)
    go("sample", "run", "--nfe", "1", "--nfe", "2", "--seeds", "0-3", "--out", "pictures")
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 8
    capsys.readouterr()
    go("eval", "run", "--nfe", "1", "--nfe", "2", "--reference", "glyphs:100", "--json")
    listed = [row for each in json.loads(capsys.readouterr().out)["evaluations"] for row in each["rows"]]
    assert [row["pictures"]["nfe"] for row in listed] == [1, 2]
    assert all(row["value"] > 0 for row in listed)
    if guided:
        assert all(row["pictures"]["guidance_scale"] == load_recipe(name).sample.scale for row in listed)
    go("report", "run")
    go("push", "run", "user/x", "--dry-run")
    card = (tmp_path / "run" / "hub" / "README.md").read_text(encoding="utf-8")
    assert ("Guidance is an input, at no cost: `--guidance" if guided else "built into the weights") in card


@pytest.mark.parametrize(("name", "text"), [
    ("soflow-b4", "0 < α < 1 from step 0 (100.0% of the run): one more forward per step"),
    ("soflow-xl2", "fading above t = 0.8: effective scale 3, built into the weights"),
    ("cifar10-soflow", "RAdam, lr 0.0001 constant; EMA half-life 6931.13 steps, moved every 16 steps"),
    ("meanflow-b2-boundary", "a derivative (JVP) per step, along the network's own velocity"),
    ("imf-b2", "an input of the network: each row draws a scale from 1 to 8 (density w^-1) with an interval"),
    ("imf-xl2", "a velocity head with 8 blocks of its own: 711,113,760 parameters"),
    ("alphaflow-imf-b2", "until step 569,842 (42.3% of the run): one more forward per step, along the network's own"),
])  # fmt: skip
def test_show_tells_the_phases_and_what_they_cost(name, text, capsys):
    go("recipe", "show", name)
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(("name", "sets"), [
    ("soflow-b4", ()), ("meanflow-b2-boundary", ()), ("meanflow-b2-boundary", ("guidance.omega=1", "guidance.kappa=0")),
])  # fmt: skip
def test_the_counted_cost_of_a_member_is_that_of_its_rows(name, sets):
    """In forwards of one row: 3 for a graded row; ∅, y and (z_s, r, s), or the tangent, of the others."""
    from alphaflow_cli.recipe.speed import TANGENT, forward_flops
    from alphaflow_cli.train.journal import mean_step_flops

    recipe = load_recipe(name, sets)
    n_equal, batch = round(recipe.times.equal_share.initial * 256), 256
    later = batch - n_equal
    kept = 1 - recipe.guidance.label_dropout
    expected = 3.0 * batch
    if name == "soflow-b4":  # a dropped row asks nothing
        expected += n_equal * kept + 2 * later * kept + later
    elif sets:  # no guidance: one forward of each r < t row gives the tangent
        expected += later + TANGENT * later
    else:  # y is needed for guidance already; a dropped row's is its ∅, and a dropped r = t row's ∅ its own prediction
        expected += n_equal * kept + later + later * kept + TANGENT * later
    counted = mean_step_flops(recipe, plan.alpha_at(recipe)(0), n_equal, compiled=False)
    assert counted / forward_flops(recipe) == pytest.approx(expected, rel=0.01)
