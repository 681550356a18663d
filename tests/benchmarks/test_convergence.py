"""The comparison: members differ where they should and nowhere else, and no order is claimed without its seeds."""

import hashlib
import json
from math import exp

import cnn_ruler
import evidence
import members
import pages
import pictures
import pytest
import run
import samplers
import slots
import torch
from cnn_ruler import HOLE, Ruler, augmented, train_classifier
from conflict import cells, points, ranks, with_grades
from members import CURRICULA, MEMBERS, NEW_SEEDS, NEWER, SEEDS, STEPS, Job, best_curriculum, plan, valid
from pictures import halves
from places import ROOT
from table import Factor, factor, runs_of, verdict

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.recipe import diff_recipes, load_recipe
from alphaflow_cli.recipe.plan import schedules_of
from alphaflow_cli.sample.grid import picture_png

FOLDER = ROOT / "benchmarks" / "convergence"
RECIPES = {path.stem: load_recipe(str(path)) for path in sorted((FOLDER / "recipes").glob("*.yaml"))}
MAY_DIFFER = ("name", "alpha.", "times.equal_share.", "loss.weight", "loss.velocity", "sample.")
UNCLAMPED = {"loss.clamp"}
ALONE = {  # what else differs, as their headers say
    "alphaflow-25-converging": UNCLAMPED,
    "alphaflow-25-unclamped": UNCLAMPED,
    "meanflow-25-boundary": {"loss.tangent"},
    "meanflow-25-short": {"loss.short_first"},
    "meanflow-25-data": {"model.prediction"},
}
RULER = hashlib.sha256(b"weights").hexdigest()[:12]
SOFLOW = ("loss.", "times.", "model.positions", "model.second_init")


def line_of(job, *, tiny=1.0, cnn=1.0):
    scores = {str(nfe): {"fd_tiny": tiny / nfe, "fd_cnn": cnn / nfe, "as_asked": 0.5, "precision": 0.6, "recall": 0.2}
              for nfe in (1, 2, 4)}  # fmt: skip
    facts = {"run": job.name, "member": job.member, "steps": job.steps, "seed": job.seed, "width": job.width}
    conflict = [[100, 1.0, -0.5, 0.1, 1.0, 2.0], [job.steps, 0.0, None, None, 1.0, 1.0]]
    measured = {"scores": scores, "conflict": conflict}
    made = {"device": "1 x GPU", "commit": "abc1234", "ruler": RULER, "images": 5000, "seconds": 9.0}
    more = {"guided": scores, "scale": 2.0} if len(MEMBERS[job.member].scales) > 1 else {}
    return facts | measured | made | more | {"recipe": job.digest}


def lines_of(member, *tinies, steps=STEPS, seeds=SEEDS, cnn=1.0):
    return [
        line_of(Job("", member, steps, seed), tiny=tiny, cnn=cnn) for seed, tiny in zip(seeds, tinies, strict=False)
    ]


def all_lines():
    lines = []
    while new := [job for job in plan(lines, "cuda") if job.name not in {line["run"] for line in lines}]:
        lines += [line_of(job, tiny=2.0 if job.member == "alphaflow-25" else 1.0) for job in new]
    return lines


@pytest.mark.parametrize("member", RECIPES)
def test_members_differ_in_the_objective_only(member):
    fields = [name for name, _, _ in diff_recipes(RECIPES["alphaflow-25"], RECIPES[member])]
    may_differ = MAY_DIFFER + SOFLOW if member.startswith("soflow") else MAY_DIFFER
    others = {name for name in fields if not name.startswith(may_differ)}
    assert others == ALONE.get(member, set())


def test_the_converging_member_has_a_partner_that_differs_in_the_weight_alone():
    fields = diff_recipes(RECIPES["alphaflow-25-unclamped"], RECIPES["alphaflow-25-converging"])
    assert [name for name, _, _ in fields if name != "name"] == ["loss.weight"]


def test_every_run_of_the_plan_is_a_sound_recipe_of_its_own_length_and_seed():
    for job in {job.member: job for job in plan(all_lines(), "cuda")}.values():
        recipe = load_recipe(str(job.recipe), job.sets)
        assert (recipe.train.steps, recipe.train.seed) == (job.steps, job.seed)
        assert not recipe.train.tf32


def test_curricula_are_one_until_their_first_share_and_nought_from_their_last():
    from alphaflow_cli.core.alpha import schedule_value

    for first, last in members.ENDS:
        job = Job("", f"alpha-{first}-{last}", 1000, 0)
        alpha = dict(schedules_of(load_recipe(str(job.recipe), job.sets)))["alpha"]
        ends = {"initial": 1, "final": 0, "start": 10 * first, "end": 10 * last, "gamma": alpha.gamma}
        values = [schedule_value(step, kind=alpha.kind, clamp=alpha.clamp, **ends) for step in range(1000)]
        assert abs(values.index(next(v for v in values if v < 1)) - 10 * first) <= 2
        assert values[-1] == 0.0 or last == 100
        assert abs(sum(v > 0 for v in values) - 10 * last) <= 2


def test_a_run_of_several_parts_keeps_its_first_place():
    names = [job.name for job in plan([], "cuda")]
    assert names[0] == "meanflow-25-20000-s0"
    assert names.index("alphaflow-25-3000-s2") < names.index("meanflow-75-6000-s0") < names.index("soflow-75-3000-s0")


def test_runs_on_a_gpu_and_on_a_cpu_are_not_mixed(tmp_path):
    job = plan([], "cuda")[0]
    lines = [line_of(job), line_of(job) | {"device": "EPYC, 2 cores, 1 thread(s) used"}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for device, line in zip(("cuda", "cpu"), lines, strict=True):
        assert slots.lines_of(work_in(tmp_path, device=device)) == {job.name: line}
    run.keep(work_in(tmp_path))
    assert slots.read_lines(tmp_path / "results.jsonl") == lines


def test_one_command_writes_the_pages_of_every_kind_of_device(tmp_path, monkeypatch):
    line = line_of(plan([], "cpu")[0])
    lines = [line, line | {"device": "EPYC, 2 cores, 1 thread(s) used"}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = {}
    monkeypatch.setattr(pages, "write_pages", lambda lines, faults, left, at: written.update({at: lines}) or [])
    monkeypatch.setattr("sys.argv", ["run.py", "--out", str(tmp_path / "out"), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    assert written == {tmp_path: lines[:1], tmp_path / "cpu": lines[1:]}


def test_strips_of_finished_runs_are_kept_beside_the_pages(tmp_path):
    for name in ("done", "half"):
        (tmp_path / f"{name}.png").write_bytes(b"x")
    run.keep_strips(tmp_path, tmp_path / "kept", {"done"})
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["done.png"]


def test_the_plan_has_every_run_once_and_three_seeds_of_all_but_the_baselines():
    jobs = plan(all_lines(), "cuda")
    assert len({job.name for job in jobs}) == len(jobs)
    for member in {job.member for job in jobs}:
        seeds = {job.seed for job in jobs if job.member == member}
        assert len(seeds) >= (1 if member in members.ALONE else 3), member
    assert {job.member for job in jobs} == set(MEMBERS)


def test_a_cpu_has_the_longest_runs_of_the_budget_with_the_seeds_of_a_claim():
    seeds = {}
    for job in plan(all_lines(), "cpu"):
        if job.cut == "budget":
            seeds.setdefault((job.member, job.steps), []).append(job.seed)
    claimed = {(member, 20_000): [*range(5)] for member in ("meanflow-25", "alphaflow-25")}
    assert seeds == claimed | {("alphaflow-50", 20_000): [0, 1, 2]}


def test_the_best_curriculum_is_known_once_all_are_measured_and_is_not_the_published_one():
    lines = [line for member in CURRICULA for line in lines_of(member, 1.0, 1.0, 1.0)]
    lines = [*lines, *lines_of("alphaflow-25", 0.1, 0.1, 0.1)]
    better = [line for line in lines if line["member"] != "alpha-10-50"] + lines_of("alpha-10-50", 0.5, 0.5, 0.5)
    assert best_curriculum(better[:-1]) is None
    assert best_curriculum(better) == "alpha-10-50"
    confirmed = [job for job in plan(better, "cuda") if job.cut == "confirm" and job.seed in NEW_SEEDS]
    assert {job.member for job in confirmed} == {"alpha-10-50", "meanflow-25", "alphaflow-25"}


def test_a_line_of_another_recipe_is_no_line_of_the_run():
    job = Job("", "flow", 3000, 0)
    assert valid([line_of(job)]).keys() == {job.name}
    assert valid([line_of(job) | {"recipe": "0" * 12}]) == {}
    assert job.digest != Job("", "flow", 2000, 0).digest != Job("", "flow", 2000, 1).digest


def test_a_table_is_of_the_ruler_that_has_measured_most_of_it_and_no_line_of_another_is_lost(tmp_path):
    jobs = [Job("", "meanflow-25", STEPS, seed) for seed in range(3)]
    old, new = ([line_of(job) | {"ruler": ruler} for job in jobs] for ruler in ("old", "new"))
    other = line_of(Job("", "meanflow-25", 6000, 0)) | {"ruler": "old"}
    for lines, ruler in (([*old, new[0], other], "old"), ([*old[:2], *new], "new"), ([*old, *new, other], "new")):
        found = valid(lines)
        assert {found[job.name]["ruler"] for job in jobs} == {ruler}
        assert found.get(other["run"], other) is other
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.keep(work_in(tmp_path))
        kept = slots.read_lines(tmp_path / "results.jsonl")
        assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, lines))


def test_with_another_ruler_a_table_that_lacks_a_run_is_measured_whole_and_a_full_one_is_left(tmp_path):
    def measured():
        return {line["run"] for line in slots.with_ruler(work, slots.lines_of(work)).values()}

    work, lacking = work_in(tmp_path, cuts=("budget",)), "alphaflow-25-20000-s2"
    done = [job for job in plan([], "cuda") if job.cut == "budget" and job.name != lacking]
    lines = [line_of(job) | {"ruler": "old"} for job in done]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [job.name for job in slots.missing(work, slots.lines_of(work))] == [lacking]
    full = {job.name for job in done if job.steps != 20_000}
    assert measured() == full

    first = line_of(done[0])
    (tmp_path / "lines" / f"{first['run']}.json").write_text(json.dumps(first))
    assert measured() == full | {first["run"]}
    assert slots.claim(work).name == done[1].name
    (tmp_path / "ruler.safetensors").unlink()
    assert measured() == full


def test_an_order_is_claimed_only_where_the_interval_of_the_pairs_leaves_1_out():
    apart = factor({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 4.0, 2: 8.01})
    assert apart is not None
    assert (apart.side, apart.seeds) == (-1, 3)
    mixed = factor({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 1.0, 2: 8.0})
    assert mixed is not None
    assert mixed.side == 0
    assert factor({0: 1.0}, {0: 2.0}) is None
    known = factor({0: exp(1), 1: exp(2), 2: exp(3)}, {0: 1.0, 1: 1.0, 2: 1.0})  # mean 2, deviation 1
    reach = 4.30265 / 3**0.5  # t at 97.5% of two degrees of freedom
    assert known == Factor(pytest.approx(exp(2)), pytest.approx(exp(2 - reach)), pytest.approx(exp(2 + reach)), 3)


def test_a_factor_has_enough_digits_to_show_on_which_side_of_1_its_ends_lie():
    assert str(Factor(1.0533, 1.00489, 1.1041, 3)) == "× 1.05 (1.005 to 1.10)"
    assert str(Factor(0.99962, 0.99929, 0.99996, 3)) == "× 0.9996 (0.999 to 0.99996)"
    assert str(Factor(0.9504, 0.9031, 1.00012, 3)) == "× 0.95 (0.90 to 1.0001)"
    assert str(Factor(0.9996, 0.9, 1.12, 3)) == "× 1.00 (0.90 to 1.12)"
    assert str(Factor(1.0, 1.0, 1.0, 3)) == "× 1.00 (1.00 to 1.00)"


def test_a_verdict_says_where_the_rulers_differ():
    a = runs_of(lines_of("alphaflow-25", 1.0, 1.1, 1.0), "alphaflow-25", STEPS)
    b = runs_of(lines_of("meanflow-25", 2.0, 2.3, 2.1), "meanflow-25", STEPS)
    assert "**better by FD-tiny, no order by FD-cnn**" in verdict(a, b, 1)
    assert "**worse by FD-tiny, no order by FD-cnn**" in verdict(b, a, 1)
    assert verdict(a, {}, 1) == "not finished yet."


def test_two_samplers_are_compared_on_the_same_runs_and_with_meanflow():
    runs, base = (
        runs_of(lines_of("soflow-0", 2.0, 2.2, 2.4), "soflow-0", STEPS),
        runs_of(lines_of("meanflow-25", 1.0, 1.1, 1.2), "meanflow-25", STEPS),
    )
    halves_of_it = {seed: {"fd_tiny": value, "fd_cnn": 1.0} for seed, value in enumerate((0.5, 0.55, 0.6))}
    assert samplers.row("soflow-0", runs, halves_of_it, base) == (
        "| SoFlow, as on CIFAR-10 | 3 | 1.10 ± 0.10 | 0.55 ± 0.05 | 0.50 ± 0.00 | 1.00 ± 0.00 | × 0.50 (0.50 to 0.50) "
        "| × 1.00 (1.00 to 1.00) | × 2.00 (2.00 to 2.00) | × 2.00 (2.00 to 2.00) |\n"
    )


def test_the_figures_of_the_other_sampler_are_kept_run_by_run_beside_its_table(tmp_path, monkeypatch):
    (tmp_path / "lines").mkdir()
    (tmp_path / "cpu" / "newer").mkdir(parents=True)
    for line in lines_of("soflow-0", 2.0, 2.2):
        (tmp_path / "lines" / f"{line['run']}.json").write_text(json.dumps(line))
    monkeypatch.setattr(samplers, "HERE", tmp_path)
    monkeypatch.setattr(samplers, "open_ruler", lambda *given: None)
    monkeypatch.setattr(samplers, "measured", lambda out, name, *more: {"fd_tiny": float(name[-1]) + 1, "fd_cnn": 1.0})
    monkeypatch.setattr("sys.argv", ["samplers.py", str(tmp_path), "--device", "cpu"])
    samplers.main()
    page, figures = (tmp_path / "cpu" / "newer" / f"samplers.{form}" for form in ("md", "jsonl"))
    assert "| SoFlow, as on CIFAR-10 | 2 | 1.05 ± 0.07 | 1.50 ± 0.71 |" in page.read_text()
    kept = [json.loads(line) for line in figures.read_text().splitlines()]
    assert kept[1] == {"run": "soflow-0-3000-s1", "images": 5000, "consistency": {"fd_tiny": 2.0, "fd_cnn": 1.0}}


def test_the_pages_are_made_of_the_lines_alone_and_name_what_is_missing(tmp_path, monkeypatch):
    lines, drawn = all_lines(), []
    for module in (pages, evidence):
        monkeypatch.setattr(module, "to_png", lambda chart: drawn.append(chart) or b"")  # they take a second each
    left = [Job("curriculum", member, STEPS, seed) for seed in (2, 1) for member in ("alpha-0-30", "floor-02")]
    left += [Job("curriculum", "low-002", STEPS, 2), Job("size", "flow", 20_000, 0, 128)]
    left += [Job("newer", "imf-head", STEPS, 2)]
    written = [*pages.write_pages(lines, {"flow-3000-s1": "Traceback\nValueError: x"}, left, tmp_path)]
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "RESULTS.md",
        "newer/RESULTS.md",
        "EVIDENCE.md",
    ]
    text = written[2].read_text()
    assert "- Failed: flow-3000-s1: ValueError: x" in text
    both = "alpha-0-30, floor-02 (3,000 steps, seeds 1, 2); low-002 (3,000 steps, seed 2)"
    assert f"- Not run yet, (b) curriculum: {both}.\n" in text
    assert "- Not run yet, (c) twice the width: flow (20,000 steps, dim 128, seed 0).\n" in text
    assert "imf-head (" not in text
    assert "- Not run yet, the newer members: imf-head (3,000 steps, seed 2).\n" in written[1].read_text()
    assert "Not run yet" not in written[0].read_text()
    assert "| α-Flow .25 | 10 | 2.00 ± 0.00 | 1.00 ± 0.00 | 0.50 ± 0.00 |" in text
    assert "Seeds that all of them have: 0, 1, 2, 3, 4." in text
    assert "has the least grade over the seeds 0 to 2." in text
    assert "the same, sampled with scale 2" in written[1].read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {"results.png", "budget.png", "conflict.png"}
    assert "not finished yet" not in text
    assert len(drawn) == 4
    assert to_png(drawn[2]).startswith(b"\x89PNG")


def test_the_best_curriculum_is_judged_without_the_runs_that_chose_it_and_equal_budgets_by_their_own_seeds(
    tmp_path, monkeypatch
):
    drawn = []
    for module in (pages, evidence):
        monkeypatch.setattr(module, "to_png", lambda chart: drawn.append(chart) or b"")
    lines = [line for line in all_lines() if line["member"] != "alpha-10-50"]
    lines += [*lines_of("alpha-10-50", 0.5, 0.5, 0.5), *lines_of("alpha-10-50", 7, 7, 7, 7, 7, seeds=NEW_SEEDS)]
    newer, about_curricula = [path.read_text() for path in pages.write_pages(lines, {}, [], tmp_path)][1:]
    budget = about_curricula.split("### 3,000 steps")[1].split("###")[0]
    assert "| α 1 until 10%, 0 from 50% | 5 | 7.00 ± 0.00 |" in budget
    assert "| MeanFlow .25 | 10 |" in budget
    assert "- α 1 until 10%, 0 from 50% against MeanFlow .25, 1 NFE: FD-tiny × 7.00 (7.00 to 7.00)" in budget
    (at_3000,) = [dict(curve.points)[3000.0] for curve in drawn[2].panels[0].lines if curve.label.startswith("α 1 ")]
    assert at_3000 == 7.0
    assert "| MeanFlow .25 | 3 |" in newer
    assert f"- Finished: {3 * 14} runs." in newer


def test_a_budget_of_two_classifiers_is_joined_for_the_ruler_alone_that_needs_none():
    old, new = lines_of("meanflow-25", 1, 2, 3), lines_of("meanflow-25", 4, 5, 6, steps=20_000)
    chart = pictures.over_budget([*(line | {"ruler": "old"} for line in old), *new], ["meanflow-25"], (STEPS, 20_000))
    tiny, cnn = chart.panels[0].lines, chart.panels[2].lines
    assert [[x for x, _ in curve.points] for curve in tiny] == [[3_000, 20_000]]
    assert [[x for x, _ in curve.points] for curve in cnn] == [[3_000], [20_000]]
    assert [curve.label for curve in cnn] == ["MeanFlow .25", ""]


@pytest.mark.parametrize(
    ("device", "jobs"), [("1 x GPU", "CIFAR10 --jobs 16"), ("Xeon", "CIFAR10 --device cpu --jobs 2")]
)
def test_a_page_names_the_command_of_its_own_runs(device, jobs):
    text = pages.head("Title", [line_of(plan([], "cuda")[0]) | {"device": device}])
    assert f"    python benchmarks/convergence/run.py {jobs} --results NEW" in text


def test_a_comparison_waits_until_every_member_has_a_run_and_curricula_are_compared_on_common_seeds(
    tmp_path, monkeypatch
):
    for module in (pages, evidence):
        monkeypatch.setattr(module, "to_png", lambda chart: b"")
    lines = [*lines_of("alpha-0-30", 1.0, 5.0), *lines_of("low-002", 2.0), *lines_of("meanflow-25", 3.0)]
    (page,) = pages.write_pages(lines, {}, [], tmp_path)
    text = page.read_text()
    assert page.name == "EVIDENCE.md"
    assert "Seeds that all of them have: 0." in text
    assert "| α 1 until 0%, 0 from 30% | 0.00 | 1.00 |" in text
    assert "On new seeds" not in text


def test_the_page_of_a_cpu_has_the_ladders_of_the_ruler_that_is_the_same_there(tmp_path):
    (tmp_path / "ladders.md").write_text("| noise | yes |\n")
    text = evidence.evidence_page(lines_of("low-002", 1.0), None, tmp_path / "cpu")
    assert text[text.index("## The rulers") + 2] == "| noise | yes |"


def test_points_without_a_cosine_are_left_out_of_the_conflict():
    lines = lines_of("meanflow-25", 1.0, 1.0)
    assert len(points(lines)) == 2
    assert cells(lines) == ["-0.50, 100%", "–", "–"]


def test_the_correlation_says_whether_less_opposed_halves_go_with_better_grades():
    def runs(cosine):
        return [line | {"conflict": [[100, 1.0, cosine, 0, 1, 1]]} for line in lines_of("meanflow-25", 1.0)]

    assert ranks([3.0, 1.0, 1.0]) == [2.5, 1.0, 1.0]
    graded = [(1.0, runs(-0.1)), (2.0, runs(-0.2)), (3.0, runs(-0.9))]
    assert with_grades(graded) == ["-1.00 (whole run, 3 members)"]
    assert with_grades(graded[:2]) == []


def test_a_strip_is_cut_into_the_pictures_it_was_made_of(tmp_path):
    pixels = torch.arange(2 * 16 * 160 * 3, dtype=torch.int64).remainder(256).byte().view(32, 160, 3).numpy()
    (tmp_path / "a.png").write_bytes(picture_png(pixels))
    one, two = halves(tmp_path, "a")
    assert (len(one), one[3].tolist(), two[9].tolist()) == (10, pixels[:16, 48:64].tolist(), pixels[16:, 144:].tolist())
    assert halves(tmp_path, "b") is None


def work_in(tmp_path, **more):
    for name in ("claims", "lines", "faults"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "ruler.safetensors").write_bytes(b"weights")
    options = {
        "device": "cuda",
        "until": 1e12,
        "images": 100,
        "cuts": tuple(members.CUTS),
        "longest": 10**9,
        "toy": True,
    }
    return slots.Work(out=tmp_path, results=tmp_path, **(options | more))


def test_two_slots_never_claim_the_same_run_and_finished_ones_are_left_alone(tmp_path):
    work, jobs = work_in(tmp_path), plan([], "cuda")
    (tmp_path / "results.jsonl").write_text(json.dumps(line_of(jobs[1])) + "\n")
    assert [slots.claim(work), slots.claim(work)] == [jobs[0], jobs[2]]


def test_a_slot_ends_where_only_failed_runs_are_left(tmp_path):
    work = work_in(tmp_path, cuts=("size",))
    for job in plan([], "cuda"):
        (tmp_path / "claims" / job.name).touch()
        (tmp_path / "faults" / f"{job.name}.txt").touch()
    assert slots.claim(work) is None


def test_a_run_that_would_not_be_done_in_time_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(slots.time, "time", lambda: 0.0)
    line = line_of(plan([], "cuda")[-1]) | {"seconds": slots.START + 6000.0}
    (work_in(tmp_path).out / "lines" / f"{line['run']}.json").write_text(json.dumps(line) + "\n")
    rate = 6000 / line["steps"]
    first = slots.claim(work_in(tmp_path, until=slots.START + rate * 2500))
    assert first is not None
    assert first.steps == 2000  # not 3,000, which are wanted more


def two_classes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    images = (torch.rand((400, 3, 16, 16), generator=generator) * 100 + 120 * labels[:, None, None, None]).byte()
    return images, labels


def test_a_ruler_whose_training_was_stopped_is_the_same_ruler(tmp_path, monkeypatch):
    whole = train_classifier(two_classes(), width=4, epochs=4).state_dict()
    keep, path = cnn_ruler.keep_state, tmp_path / "ruler.state"

    def stop_after_two(path, parts, generator, done):
        keep(path, parts, generator, done)
        if done[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cnn_ruler, "keep_state", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(two_classes(), width=4, epochs=4, state=path)
    monkeypatch.setattr(cnn_ruler, "keep_state", keep)
    resumed = train_classifier(two_classes(), width=4, epochs=4, state=path).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_ruler_learns_two_classes_and_measures_them(tmp_path):
    images, labels = two_classes()
    net = train_classifier((images, labels), width=4, epochs=6)
    ruler = Ruler(net, "", (images[:200], labels[:200]), (images, labels))
    same, other = ruler.scores(images[200:], labels[200:]), ruler.scores(images[200:].flip(1), 1 - labels[200:])
    assert same["as_asked"] > 0.95
    assert other["as_asked"] < 0.05
    one_class = ruler.scores(images[200:][labels[200:] == 0], labels[200:][labels[200:] == 0])
    assert one_class["fd_cnn"] > 10 * same["fd_cnn"]
    assert one_class["recall"] < same["recall"]


def test_augmenting_shifts_and_mirrors_whole_pictures_and_hides_a_square():
    column = torch.arange(16.0).view(1, 1, 1, 16).expand(50, 3, 16, 16)
    seen = augmented(column, torch.Generator().manual_seed(0))
    holes = seen == 127.5
    assert holes.sum((1, 2, 3)).max() == 3 * HOLE**2
    assert torch.equal(holes[:, 0], holes[:, 2])
    steps = (seen[:, 0, :, 7] - seen[:, 0, :, 6])[~holes[:, 0, :, 6:8].any(2)]
    assert {*steps.tolist()} == {-1.0, 1.0}
    assert seen[:, 0, 8, 7].unique().numel() > 4


def test_every_newer_member_has_a_place_on_its_picture():
    drawn = {member for _, shown in pages.GROUPS_NEWER for member in shown}
    assert drawn == {*NEWER}
