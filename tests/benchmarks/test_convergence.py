"""The comparison: members differ where they should and nowhere else, and no order is claimed without its seeds."""

import json
from types import SimpleNamespace

import pytest
import table
from conflict import conflict_lines, training_lines
from measure import is_measured
from page import document
from places import ROOT
from run import Job, is_done, parser, told_options
from table import Run, read_run, told, verdict

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.recipe import diff_recipes, dump_recipe, load_recipe

FOLDER = ROOT / "benchmarks" / "convergence"
MEMBERS = {path.stem: load_recipe(str(path)) for path in sorted((FOLDER / "recipes").glob("*.yaml"))}
MAY_DIFFER = ("name", "alpha.", "times.equal_share.", "loss.weight", "loss.velocity", "sample.")
UNCLAMPED = {"loss.clamp"}
ALONE = {  # what else differs, as their headers say
    "alphaflow-25-converging": UNCLAMPED,
    "alphaflow-25-unclamped": UNCLAMPED,
    "meanflow-25-boundary": {"loss.tangent"},
    "meanflow-25-short": {"loss.short_first"},
    "meanflow-25-data": {"model.prediction"},
}
SOFLOW = ("loss.", "times.", "model.positions", "model.second_init")


def runs_of(member, *scores):
    return [Run(member, seed, {1: s, 2: s / 2, 4: s / 4}, 0.5, 100.0, 3000, 192_000) for seed, s in enumerate(scores)]


def test_every_member_has_a_recipe_and_a_name():
    assert set(MEMBERS) == set(table.NAMES)
    assert {member for _, members in table.PANELS for member, _, _ in members} == set(table.NAMES)


@pytest.mark.parametrize("member", MEMBERS)
def test_members_differ_in_the_objective_only(member):
    fields = [name for name, _, _ in diff_recipes(MEMBERS["alphaflow-25"], MEMBERS[member])]
    may_differ = MAY_DIFFER + SOFLOW if member.startswith("soflow") else MAY_DIFFER
    others = {name for name in fields if not name.startswith(may_differ)}
    assert others == ALONE.get(member, set())


def test_the_converging_member_has_a_partner_that_differs_in_the_weight_alone():
    fields = diff_recipes(MEMBERS["alphaflow-25-unclamped"], MEMBERS["alphaflow-25-converging"])
    assert [name for name, _, _ in fields if name != "name"] == ["loss.weight"]


def test_an_order_is_claimed_only_where_the_seeds_do_not_overlap():
    apart = runs_of("a", 1.0, 1.1, 1.2) + runs_of("b", 2.0, 2.1, 2.2)
    assert "better on every seed (3 and 3 seeds)" in verdict(apart, "a", "b", 1)
    assert "worse on every seed" in verdict(apart, "b", "a", 1)
    assert "no order" in verdict(runs_of("a", 1.0, 1.1, 2.05) + runs_of("b", 2.0, 2.1, 2.2), "a", "b", 1)
    few = verdict(runs_of("a", 1.0) + runs_of("b", 2.0, 2.1, 2.2), "a", "b", 1)
    assert few == "1.00 against 2.00 on their common seed 0: no order is claimed."
    assert verdict(runs_of("a", 1.0), "a", "b", 1) == "not finished yet."


def test_a_comparison_judges_and_draws_its_own_members_only():
    newer = table.pairs_of(table.NEWER)
    assert newer
    assert all({first, second} <= {*table.NEWER} for first, second, _ in newer)
    titles = [panel.title for panel in table.chart([], table.NEWER).panels]
    assert titles == ["FD-tiny, MeanFlow .25, one thing changed", "FD-tiny, α-Flow and SoFlow"]


def test_the_spread_is_the_standard_deviation_over_seeds():
    assert told([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert told([2.0]) == "2.00"


def test_a_run_is_read_from_its_own_files(tmp_path):
    rows = [{"step": 50, "images_seen": 3200, "seconds_per_step": 0.1, "v_loss": 0.75}]
    rows.append({"step": 60, "images_seen": 3840, "seconds_per_step": 0.2, "v_loss": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"evaluations": [{"rows": [{"pictures": {"nfe": nfe}, "value": 10.0 / nfe}]} for nfe in (1, 2, 4)]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = read_run(SimpleNamespace(member="flow", seed=0, folder=tmp_path))
    assert run.scores == {1: 10.0, 2: 5.0, 4: 2.5}
    assert run.seconds == pytest.approx(50 * 0.1 + 10 * 0.2)
    assert (run.steps, run.images_seen, run.velocity_loss) == (60, 3840, 0.5)


def test_a_run_without_r_equal_t_rows_has_no_velocity_loss(tmp_path):
    row = {"step": 50, "images_seen": 3200, "seconds_per_step": 0.1, "v_loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    results = {"evaluations": [{"rows": [{"pictures": {"nfe": nfe}, "value": 10.0 / nfe}]} for nfe in (1, 2, 4)]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = read_run(SimpleNamespace(member="soflow-0", seed=0, folder=tmp_path))
    assert run.velocity_loss is None
    assert "| SoFlow, as on CIFAR-10 | 1 | 10.00 | 5.00 | 2.50 | – | 3,200 | 5 |" in table.table([run])


def test_the_page_has_a_line_per_member_and_says_what_is_unfinished_and_what_failed():
    runs = runs_of("meanflow-25", 5.0, 6.0, 7.0) + runs_of("alphaflow-25", 1.0, 2.0, 3.0)
    how = SimpleNamespace(
        steps=3000, jobs=2, images=5000, reference_name="cifar10-jpeg", told=" --jobs 4", members=[*MEMBERS]
    )
    found = {"p5": -0.7, "p50": -0.5, "p95": -0.2}
    conflict = {"member": "meanflow-25", "cosines": {"tfm.tc": found, "tfm.fm": found}, "share_below_-0.4": 0.8}
    lines = conflict_lines([conflict | {"batches": 60, "rows_per_batch": 64}], table.NAMES)
    text = document(runs, {"flow-s0": "ended with code 1"}, 19, lines, ["abc1234"], how)
    assert "run.py CIFAR10 --jobs 4\n" in text
    assert "| MeanFlow .25 | 3 | 6.00 ± 1.00 | 3.00 ± 0.50 | 1.50 ± 0.25 | 0.50 ± 0.00 | 192,000 | 100 |" in text
    assert "Finished: 6 of 19 runs" in text
    assert "Failed: flow-s0: ended with code 1" in text
    assert "trained at commit abc1234" in text
    assert "| MeanFlow .25 | 60 × 64 | -0.50 (-0.70 to -0.20) | 80% | -0.50 (-0.70 to -0.20) |" in text
    assert "not finished yet" in text
    assert to_png(table.chart(runs, how.members)).startswith(b"\x89PNG")


def test_scores_count_only_with_these_weights_pictures_reference_and_every_nfe(tmp_path):
    def write(nfes=(1, 2, 4), weights="w", reference="r", count=9):
        pictures = [{"nfe": nfe, "checkpoint_sha256": weights} for nfe in nfes]
        rows = [{"pictures": each, "reference": {"sha256": reference}, "count": count} for each in pictures]
        (tmp_path / "results.json").write_text(json.dumps({"evaluations": [{"rows": [row]} for row in rows]}))
        return is_measured(tmp_path / "results.json", "w", "r", 9)

    assert not is_measured(tmp_path / "results.json", "w", "r", 9)
    assert write()
    assert not any([write(nfes=(1,)), write(weights="v"), write(reference="q"), write(count=8), write((1, 2, 4, 8))])


def test_the_command_on_the_page_repeats_every_option_that_changes_a_number():
    assert told_options(parser().parse_args(["C", "--out", "x", "--minutes", "3"])) == ""
    line = ["C", "--steps", "9", "--members", "flow", "meanflow-25", "--images", "120", "--reference-name", "a b"]
    assert told_options(parser().parse_args(line)) == (
        " --steps 9 --members flow meanflow-25 --images 120 --reference-name 'a b'"
    )


def test_a_run_of_another_recipe_is_refused(tmp_path):
    job = Job("flow", 0, tmp_path / "flow-s0")
    (job.folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    recipe = load_recipe(str(job.recipe), ["train.steps=9", "train.seed=0"])
    (job.folder / "recipe.yaml").write_text(dump_recipe(recipe))
    assert is_done(job, 9)
    assert not is_done(job, 10)
    changed = load_recipe(str(job.recipe), ["train.steps=9", "train.seed=0", "optim.lr=0.9"])
    (job.folder / "recipe.yaml").write_text(dump_recipe(changed))
    with pytest.raises(SystemExit, match=r"another optim\.lr: give another --out"):
        is_done(job, 9)


def test_the_conflict_along_training_is_counted_over_the_seeds(tmp_path):
    jobs = [SimpleNamespace(member="meanflow-25", folder=tmp_path / f"s{seed}") for seed in range(2)]
    for job, cosines in zip(jobs, ([-0.5, -0.3, None], [-0.45, -0.6, -0.9]), strict=True):
        job.folder.mkdir()
        rows = [{"step": 50}, *({"step": 250, "conflict": {"cos_tfm_tc": cosine}} for cosine in cosines)]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| MeanFlow .25 | -0.50 | 4 of 5 (80%) |" in training_lines(jobs, table.NAMES)
    assert training_lines([], table.NAMES) == []
