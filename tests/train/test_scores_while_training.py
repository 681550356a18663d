"""Scores while training: those of `alphaflow eval`, beside a training that does not notice them, whatever kills it."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from train_helpers import TIMING, begin, left_behind, make_recipe, train

from alphaflow_cli import cli
from alphaflow_cli.data.store import open_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate import measure
from alphaflow_cli.evaluate.evaluate import Ruler, check_crop
from alphaflow_cli.evaluate.tiny import Tiny
from alphaflow_cli.files import sha256_of
from alphaflow_cli.latents.encode import StoreRequest
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.train import scores, start
from alphaflow_cli.train.journal import Journal, read_rows

PIXELS = """
model: {dim: 32, depth: 1, heads: 2, patch: 4}
data: {autoencoder: none, image_size: 16, channels: 3, latent_size: 16, classes: 10, normalise: scale}
alpha: 0
optim: {lr: 1e-2, warmup_steps: 2}
ema: {half_lives: [2]}
train:
  {steps: 8, batch: 8, precision: fp32, save_every: 8, keep: 1, milestone_every: 0, log_every: 4, sample_every: 0}
eval: {quick_images: 120, draw: balanced, reference: "shapes:150"}
"""
SCORED = "eval.every=3"
SHARED = ("eval.quick_images=260", "eval.quick_nfe=[1]", "train.steps=4", "train.save_every=4")  # two chunks


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "store"
    prepare_store(StoreRequest("shapes:60", 16, "none", flips=False), folder, Processes(torch.device("cpu")))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("recipe"), SCORED, text=PIXELS)


@pytest.fixture(scope="module")
def scored(store, recipe, tmp_path_factory):
    """A finished run with scores at steps 3, 6 and 8."""
    return train(recipe, store, tmp_path_factory.mktemp("runs") / "scored")


def rows_of(run, *, scored):
    """The rows of the journal with scores, or those without; what differs from run to run is left out."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if ("scores" in row) is scored]
    return [{k: v for k, v in row.items() if k not in (*TIMING, "evals")} for row in rows]


def assert_same_weights(one, other):
    a, b = left_behind(one), left_behind(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor) and name != "sums")


def test_scores_change_no_bit_of_the_training(scored, store, tmp_path):
    plain = train(make_recipe(tmp_path, text=PIXELS), store, tmp_path / "plain")
    assert_same_weights(plain, scored)
    assert rows_of(plain, scored=False) == rows_of(scored, scored=False)
    assert rows_of(plain, scored=True) == []
    assert not (plain / "evals").exists()


def test_a_score_is_that_of_eval_and_stands_in_the_journal_with_its_protocol(scored, store, tmp_path, capsys):
    rows = [row for row in read_rows(scored / "metrics.jsonl") if "scores" in row]
    assert [row["step"] for row in rows] == [3, 6, 8]
    line = ["eval", str(scored / "checkpoints" / "step-00000008"), "--metrics", "fd-tiny", "--images", "120", "--json"]
    assert cli.run([*line, "--nfe", "1", "--nfe", "2", "--out", str(tmp_path)]) == 0
    measured = json.loads(capsys.readouterr().out)["evaluations"]
    assert {f"nfe{each['rows'][0]['pictures']['nfe']}": each["rows"][0]["value"] for each in measured} == rows[-1][
        "scores"
    ]["FD-tiny-120"]
    assert {each["id"] for each in measured} == set(rows[-1]["evals"].values()), "the same pictures, the same ruler"
    kept = json.loads((scored / "evals" / rows[0]["evals"]["nfe1"] / "results.json").read_text())
    assert kept["evaluations"][0]["rows"][0]["pictures"]["step"] == 3
    assert not list((scored / "evals" / rows[0]["evals"]["nfe1"]).glob("features-*")), "they would fill the disk"


def test_the_best_checkpoint_of_each_nfe_is_kept_though_its_own_folder_is_pruned(scored):
    rows = [row for row in read_rows(scored / "metrics.jsonl") if "scores" in row]
    assert [path.name for path in (scored / "checkpoints").iterdir()] == ["step-00000008"]
    for nfe in (1, 2):
        best = min(rows, key=lambda row: row["scores"]["FD-tiny-120"][f"nfe{nfe}"])
        assert load_checkpoint(scored / f"best-nfe{nfe}.safetensors").origin["step"] == best["step"]


def test_a_worse_score_leaves_the_best_checkpoint_as_it_is(recipe, store, scored, tmp_path):
    run = shutil.copytree(scored, tmp_path / "run")
    rows = read_rows(run / "metrics.jsonl")[:-1]  # as if killed before the last scores
    earlier = [row for row in rows if "scores" in row]
    for row in earlier:
        row["scores"] = {"FD-tiny-120": {"nfe1": 1e-3, "nfe2": 1e9}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("best-nfe1.safetensors", "best-nfe2.safetensors"):
        (run / name).unlink()
        (run / name).write_text("an earlier one")
    train(recipe, store, run)
    assert (run / "best-nfe1.safetensors").read_text() == "an earlier one"
    assert load_checkpoint(run / "best-nfe2.safetensors").origin["step"] == 8


def test_scores_against_another_reference_do_not_choose_the_best_checkpoint(store, scored, tmp_path):
    """eval.reference may be changed on the way; a distance to other pictures was never beaten again."""
    run = shutil.copytree(scored, tmp_path / "run")
    rows = read_rows(run / "metrics.jsonl")[:-1]
    for row in (row for row in rows if "scores" in row):
        row["scores"] = {"FD-tiny-120": {"nfe1": 1e-3, "nfe2": 1e-3}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(make_recipe(tmp_path, SCORED, "eval.reference=shapes:160", text=PIXELS), store, run)
    checkpoint = load_checkpoint(run / "best-nfe1.safetensors")
    assert checkpoint.origin["step"] == 8
    assert scores.why_best(run, 1, checkpoint).startswith("the best of 1 checkpoint by FD-tiny-120 at 1 NFE")
    rows = scores.score_rows(run)
    assert scores.new_references(run, rows) == {8}, "the curves of the report have a gap there"
    assert scores.new_references(run, rows[:-1]) == set()


def test_an_eval_against_other_pictures_does_not_become_the_reference_of_the_scores(scored, tmp_path):
    """The pictures are the same, so its numbers stand in the folder of the scores."""
    run = shutil.copytree(scored, tmp_path / "run")
    rows = scores.score_rows(run)
    before = scores.reference_of(run, rows[1], 1)
    measured = run / "evals" / rows[1]["evals"]["nfe1"] / "results.json"
    document = json.loads(measured.read_text())
    later = json.loads(json.dumps(document["evaluations"][0]))
    later["rows"][0]["value"] += 1
    later["rows"][0]["reference"] |= {"name": "shapes:160", "sha256": "ab" * 32}
    measured.write_text(json.dumps(document | {"evaluations": [*document["evaluations"], later]}))
    assert scores.reference_of(run, rows[1], 1) == before
    assert scores.new_references(run, rows) == set()


def dying(recipe, store, out, call, way):
    """Train until the n-th batch of pictures of the scores is due, then do `way` to this process there and then."""
    options, calls = start.TrainOptions(out, store), []
    drawn = scores.Interruptible.images

    def images(self, first, stop):
        calls.append(first)
        if len(calls) == call:
            way()
        return drawn(self, first, stop)

    scores.Interruptible.images = images
    return start.train(recipe, options)


def die(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("call", [4, pytest.param(1, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_killed_inside_an_evaluation_resumes_and_ends_the_same(call, recipe, store, scored, tmp_path):
    out = tmp_path / "run"
    started = begin(recipe, store, out, work=lambda: dying(recipe, store, out, call, die(signal.SIGKILL)))
    assert started.wait() == [-signal.SIGKILL], started.said()
    train(recipe, store, out)
    assert_same_weights(out, scored)
    assert rows_of(out, scored=True) == rows_of(scored, scored=True)
    assert rows_of(out, scored=False) == rows_of(scored, scored=False)
    origins = [[load_checkpoint(run / f"best-nfe{n}.safetensors").origin for n in (1, 2)] for run in (out, scored)]
    assert origins[0] == origins[1]


@pytest.mark.parametrize("call", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_inside_an_evaluation_ends_at_once_and_the_resumed_run_measures_it(
    call, recipe, store, scored, tmp_path
):
    out = tmp_path / "run"
    started = begin(recipe, store, out, work=lambda: dying(recipe, store, out, call, die(signal.SIGTERM)))
    assert started.wait() == [143], started.said()
    assert "stopped and saved at step" in started.said()
    assert rows_of(out, scored=True) == rows_of(scored, scored=True)[: call // 3], "the row that was cut short is none"
    train(recipe, store, out)
    assert_same_weights(out, scored)
    assert rows_of(out, scored=True) == rows_of(scored, scored=True)


@pytest.mark.slow
def test_two_processes_share_an_evaluation_and_die_and_resume_together(store, tmp_path):
    recipe = make_recipe(tmp_path, SCORED, *SHARED, text=PIXELS)
    whole = train(recipe, store, tmp_path / "whole", processes=2)
    out = tmp_path / "run"
    work = lambda: dying(recipe, store, out, 2, die(signal.SIGKILL))  # noqa: E731
    started = begin(recipe, store, out, processes=2, work=work)
    assert started.wait() == [-signal.SIGKILL] * 2, started.said()
    train(recipe, store, out, processes=2)
    assert_same_weights(out, whole)
    assert rows_of(out, scored=True) == rows_of(whole, scored=True)
    assert (out / "best-nfe1.safetensors").is_file()


@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["written", "read"])
def test_an_evaluation_that_fails_on_one_process_costs_its_row_and_the_run_goes_on(lost, store, tmp_path):
    recipe = make_recipe(tmp_path, SCORED, *SHARED, text=PIXELS)
    out = tmp_path / "run"

    def full_disk():
        if os.environ.get("RANK") == "1":
            raise AlphaflowError("features: cannot be written: No space left on device.")

    def lost_chunk():
        read = measure.load_part

        def fail(*part):
            measure.load_part = read
            raise AlphaflowError("features: cannot be read.")

        if os.environ.get("RANK") == "1":
            measure.load_part = fail

    work = lambda: dying(recipe, store, out, 1, lost_chunk if lost else full_disk)  # noqa: E731
    started = begin(recipe, store, out, processes=2, work=work)
    assert started.wait() == [0, 0], started.said()
    reason = "features: cannot be " + ("read" if lost else "written")
    assert f"no scores at step 3, and the training goes on: {reason}" in started.said()
    assert [row["step"] for row in rows_of(out, scored=True)] == [4]


def test_a_gpu_without_room_for_the_networks_costs_the_scores_and_not_the_run():
    """Only pictures that did not fit were survived; networks ended one process, and the others waited for it."""

    def no_room():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(AlphaflowError, match=r"out of memory \(CUDA out of memory\)"):
        scores.together(Processes(torch.device("cpu")), no_room)


@pytest.mark.slow
def test_scores_may_begin_with_a_run_that_is_finished(store, scored, tmp_path):
    plain = train(make_recipe(tmp_path, text=PIXELS), store, tmp_path / "run")
    train(make_recipe(tmp_path, SCORED, text=PIXELS), store, plain)
    assert rows_of(plain, scored=True) == rows_of(scored, scored=True)[-1:]
    before = sha256_of(plain / "metrics.jsonl")
    train(make_recipe(tmp_path, SCORED, text=PIXELS), store, plain)
    assert sha256_of(plain / "metrics.jsonl") == before, "once is enough"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["eval.every=5"], "eval.every compares with eval.reference, which is empty"),
        (["eval.quick_images=50"], "eval.quick_images must be 100 or more"),
        (["eval.every=-1"], "eval.every must be 0 or more"),
        (["eval.best_by=fid"], "eval.best_by fid is not among eval.quick_metrics (fd-tiny)"),
        (["eval.quick_metrics=[pr]"], "eval.best_by pr is four numbers"),
        (["eval.quick_nfe=[]"], "eval.quick_nfe wants at least one number"),
    ],
)
def test_scores_that_cannot_be_are_refused_in_the_recipe(sets, message):
    with pytest.raises(AlphaflowError, match=message.replace("(", r"\(").replace(")", r"\)")):
        load_recipe("b2", sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["eval.reference=nowhere.safetensors"], "eval.reference: nowhere.safetensors: no such file"),
        (["eval.quick_metrics=[fdd]"], "eval.quick_metrics: "),
    ],
)
def test_what_is_missing_here_is_named_before_anything_is_made(sets, message, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    recipe = make_recipe(tmp_path, SCORED, *sets, text=PIXELS)
    with pytest.raises(AlphaflowError, match=message):
        start.prepare_run(recipe, start.TrainOptions(tmp_path / "run", store))
    assert not (tmp_path / "run").exists()


def test_a_reference_that_does_not_fit_is_refused_before_the_run_is_one(store, tmp_path, capsys):
    made = tmp_path / "other.safetensors"
    line = ["reference", "shapes:100", "--size", "24", "--metrics", "fd-tiny", "--work", str(tmp_path / "work")]
    assert cli.run([*line, "-o", str(made)]) == 0
    recipe = make_recipe(tmp_path, SCORED, f"eval.reference={made}", text=PIXELS)
    started = begin(recipe, store, tmp_path / "run")
    assert started.wait() == [1]
    assert "resolutions differ" in started.said()
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_speed_in_the_journal_is_that_of_the_steps_alone(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", 0, writes=True)
    journal.started -= 100
    journal.leave_out(90)
    journal.note({"step": 5, "images_seen": 5, "scores": {"FID-10k": {"nfe1": float("nan")}}})
    assert journal.row({"step": 10}, step=10, batch=1)["seconds_per_step"] == pytest.approx(1.0, abs=0.2)
    assert scores.score_rows(tmp_path) == [{"step": 5, "images_seen": 5, "scores": {"FID-10k": {"nfe1": None}}}]


def test_of_distances_less_is_better_and_of_the_inception_score_more():
    assert scores.is_better("fid", 1.0, 2.0)
    assert scores.is_better("is", 2.0, 1.0)
    assert not scores.is_better("fd-tiny", 2.0, 2.0), "of two that are equal the earlier one stays"


def test_push_best_publishes_the_chosen_checkpoint_with_its_scores_and_says_why(scored, tmp_path, capsys):
    run = shutil.copytree(scored, tmp_path / "tiny")
    rows = read_rows(run / "metrics.jsonl")
    for row in rows:
        if "scores" in row and row["step"] != 6:  # as if the one of step 6 had been the best
            row["scores"]["FD-tiny-120"]["nfe1"] = 999.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "best-nfe1.safetensors").unlink()
    shutil.copyfile(run / "best-nfe2.safetensors", run / "best-nfe1.safetensors")
    step = load_checkpoint(run / "best-nfe1.safetensors").origin["step"]
    for row in rows:
        row.get("scores", {}).get("FD-tiny-120", {}).update({"nfe1": 2.5} if row["step"] == step else {})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.run(["push", str(run), "--best", "--dry-run", "--out", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"the best of 3 checkpoints by FD-tiny-120 at 1 NFE: 2.5 at step {step}" in card.replace("\\", "")
    assert f"at step {step}" in card
    assert card.count("| FD-tiny-120 |") == 2, "the scores of both walks are of these weights"
    assert cli.run(["eval", str(run), "--nfe", "1", "--metrics", "fd-tiny", "--images", "130"]) == 0
    assert cli.run(["push", str(run), "--best", "--dry-run", "--out", str(tmp_path / "hub")]) == 0
    newest = load_checkpoint(run / "model.safetensors").origin["step"]
    assert ("| FD-tiny-130 |" in (tmp_path / "hub" / "README.md").read_text()) == (newest == step)
    assert load_checkpoint(tmp_path / "hub" / "model.safetensors").origin["step"] == step
    named = ["push", str(run / "best-nfe1.safetensors"), "--dry-run", "--out", str(tmp_path / "named")]
    assert cli.run(named) == 0, "naming the file is the same"
    assert "the best of 3 checkpoints" in (tmp_path / "named" / "README.md").read_text()


def test_push_best_says_what_to_do_where_nothing_was_kept(scored, tmp_path, capsys):
    run = shutil.copytree(scored, tmp_path / "tiny")
    (run / "best-nfe1.safetensors").unlink()
    assert cli.run(["push", str(run), "--best", "--dry-run"]) == 1
    assert "Name one that is here: best-nfe2.safetensors" in capsys.readouterr().err
    (run / "best-nfe2.safetensors").unlink()
    assert cli.run(["push", str(run), "--best", "--dry-run"]) == 1
    assert "Train with scores" in capsys.readouterr().err
    assert cli.run(["push", str(run / "model.safetensors"), "--best", "--dry-run"]) == 1


def test_sample_and_eval_find_a_best_checkpoint_in_its_run(scored, tmp_path):
    best = scored / "best-nfe2.safetensors"
    assert cli.run(["sample", str(best), "--seeds", "0-3", "--grid", str(tmp_path / "grid.png")]) == 0
    assert cli.run(["eval", str(best), "--nfe", "2", "--metrics", "fd-tiny", "--images", "100"]) == 0


def test_the_reference_is_cropped_as_the_store_was_where_the_recipe_does_not_care(recipe, tmp_path):
    adm, cpu = tmp_path / "adm", Processes(torch.device("cpu"))
    prepare_store(StoreRequest("shapes:60", 16, "none", flips=False, crop="adm"), adm, cpu)
    assert recipe.data.crop is None, "either will do"
    run = SimpleNamespace(recipe=recipe, stream=SimpleNamespace(store=open_store(adm, "sizes")))
    reference = scores.Scores(run)._reference(Ruler({"tiny": Tiny()}, cpu, tmp_path / "evals", 64))
    check_crop(reference, "adm", (16, 16))  # as `evaluate` does, by what the checkpoints say: else there is no score
