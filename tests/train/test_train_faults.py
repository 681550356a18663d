"""What can go wrong while training: one clear message, exit code 1, and nothing lost."""

import resource

import numpy as np
import pytest
import torch
from train_helpers import (
    NEEDS_FSDP2,
    assert_same,
    begin,
    fork,
    largest_difference,
    left_behind,
    make_recipe,
    make_store,
    row_values,
    saved_step,
    small_disk,
    train,
)

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.launch import StopFlag
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start, state
from alphaflow_cli.train.journal import Journal, Trackers, read_rows
from alphaflow_cli.train.loop import train_steps
from alphaflow_cli.train.parallel import largest_that_fits


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


def disturbed(recipe, options, disturb):
    """A run whose batches go through `disturb(run, step, batch)` first."""
    world = join_world()
    run = start.open_run(recipe, options, world)
    batch_at = run.stream.batch_at
    run.stream.batch_at = lambda step, rows: disturb(run, step, batch_at(step, rows))
    book = Journal(options.out / "metrics.jsonl", run.step, writes=world.is_main)
    trackers = Trackers(recipe, world, options.out, run.step)
    train_steps(run, book, StopFlag(), trackers=trackers, after_save=lambda now: None)


def run_disturbed(recipe, store, out, disturb, *, processes=1, micro_batch=None):
    options = start.TrainOptions(out, store, micro_batch)
    return begin(recipe, store, out, processes=processes, work=lambda: disturbed(recipe, options, disturb))


def poison(when):
    """A NaN in one latent of the steps for which `when(run, step)` says so."""

    def disturb(run, step, batch):
        if when(run, step):
            batch.latents[0, 0, 0, 0] = torch.nan
        return batch

    return disturb


def refused(started, *texts, code=1):
    codes = started.wait()
    assert set(codes) == {code}, started.said()
    for text in texts:
        assert text in started.said(), started.said()
    assert "NotImplemented" not in started.said()


# Gradients that are not finite.


def test_a_skipped_step_is_counted_and_changes_no_weight(store, tmp_path):
    sets = ("train.steps=8", "alpha.start=0", "alpha.end=8", "train.log_every=1", "train.save_every=1")
    recipe, out, seven = make_recipe(tmp_path, *sets), tmp_path / "run", tmp_path / "seven"
    started = run_disturbed(recipe, store, out, poison(lambda run, step: step == 7))
    assert started.wait() == [0], started.said()
    assert "step 8: the gradient was not finite; the step was skipped (1 in a row)" in started.said()
    assert row_values(out, "nonfinite") == [0] * 7 + [1]
    assert read_rows(out / "metrics.jsonl")[-1]["l"] is None, "JSON knows no NaN"
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    run_disturbed(recipe, store, seven, leave_at(7)).wait()
    before, after = left_behind(seven), left_behind(out)
    assert before["step"] == 7
    for name in (name for name in after if name.startswith(("raw.", "adam."))):
        assert torch.equal(after[name], before[name]), name


def leave_at(step):
    """The process is gone before it computes this step."""

    def disturb(run, now, batch):
        if now == step:
            raise SystemExit(3)
        return batch

    return disturb


def test_too_many_skips_in_a_row_end_the_run(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite_limit=3")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step >= 7))
    refused(started, "step 10: the gradient was not finite for 3 steps in a row (optim.nonfinite_limit 3)")
    assert saved_step(tmp_path / "run") == 5


def test_three_skips_that_are_not_in_a_row_do_not(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite_limit=2")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step in (7, 9, 11)))
    assert started.wait() == [0], started.said()
    assert sum(row_values(tmp_path / "run", "nonfinite")) == 3


def test_stop_ends_the_run(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite=stop")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step == 7))
    refused(started, "step 8: the gradient was not finite. The last save is kept")
    assert saved_step(tmp_path / "run") == 5


def test_a_roll_back_goes_on_from_the_last_save_with_other_draws(store, tmp_path):
    recipe, out = make_recipe(tmp_path, "optim.nonfinite=rollback", "train.log_every=1"), tmp_path / "run"
    started = run_disturbed(recipe, store, out, poison(lambda run, step: step == 7 and run.retries == 0), processes=2)
    assert started.wait() == [0, 0], started.said()
    assert "rolled back to step 5, with other draws (1 of at most 10 times)" in started.said()
    assert row_values(out, "step") == list(range(1, 21)), "every row once"
    plain = train(recipe, store, tmp_path / "plain")
    same, other = (row_values(each, "l") for each in (plain, out))
    assert same[:5] == pytest.approx(other[:5], rel=1e-4)
    assert abs(same[6] - other[6]) > 1e-3, "the same draws would have met the same fault"


def test_rolls_back_that_do_not_help_end_the_run(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite=rollback", "optim.nonfinite_limit=2")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step == 7))
    refused(started, "the gradient was not finite again, after 2 rolls back")


def test_a_roll_back_before_the_first_save_says_so(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite=rollback")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step == 2))
    refused(started, "there is no saved state to roll back to yet")


def test_replaced_gradients_are_counted_too(store, tmp_path):
    recipe = make_recipe(tmp_path, "optim.nonfinite=replace")
    started = run_disturbed(recipe, store, tmp_path / "run", poison(lambda run, step: step == 7))
    assert started.wait() == [0], started.said()
    assert sum(row_values(tmp_path / "run", "nonfinite")) == 1
    assert all(torch.isfinite(v).all() for k, v in left_behind(tmp_path / "run").items() if k.startswith("raw."))


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("skip", "step 4: the gradient was not finite for 3 steps in a row"),
        ("rollback", "the gradient was not finite, and there is no saved state to roll back to yet"),
        ("stop", "step 2: the gradient was not finite. The last save is kept"),
    ],
)
def test_a_run_whose_loss_is_infinite_does_not_pass_as_finished(policy, text, store, tmp_path):
    """The adaptive weight of an infinite error is 0: so was the gradient, which is finite, and the run went on."""
    sets = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0", "optim.nonfinite_limit=3")
    recipe = make_recipe(tmp_path, *sets, f"optim.nonfinite={policy}")
    refused(begin(recipe, store, tmp_path / "run"), text)


# Data and folders.


def test_a_store_with_a_nan_in_it_is_refused(tmp_path):
    from latent_stores import random_moments, write_store

    moments = random_moments(48)
    moments[3, 1, 2, 2] = np.nan
    with np.errstate(invalid="ignore"):
        store = write_store(tmp_path / "store", {"moments": moments}, np.arange(48) % 10)
    line = r"manifest\.json: not whole JSON \(NaN is no number in JSON\)\. Remove it, or the whole store, and run"
    with pytest.raises(AlphaflowError, match=line):
        start.prepare_run(make_recipe(tmp_path), start.TrainOptions(tmp_path / "run", store))


def test_a_store_that_disagrees_is_refused_with_both_sides(store, tmp_path):
    recipe = make_recipe(tmp_path, "data.classes=7", "data.image_size=64", "data.latent_size=8")
    with pytest.raises(AlphaflowError) as fault:
        start.prepare_run(recipe, start.TrainOptions(tmp_path / "run", store))
    for line in (
        "data.image_size: 32 in the store, 64 in the recipe",
        "data.classes: 10 in the store, 7 in the recipe",
    ):
        assert line in str(fault.value)


@pytest.mark.parametrize(("sets", "shown"), [((), True), (("guidance.omega=1", "guidance.kappa=0"), False)])
def test_a_new_run_says_which_guidance_it_builds_in(sets, shown, store, tmp_path, capsys):
    recipe = make_recipe(tmp_path, *sets)
    start.prepare_run(recipe, start.TrainOptions(tmp_path / "run", store))
    line = "guidance: omega 0.6, kappa 0.2 for 0 < t < 1: effective scale 0.75, built into the weights"
    err = capsys.readouterr().err
    assert (line in err) == ("guidance:" in err) == shown


def test_a_folder_of_another_recipe_is_refused_with_the_differences(store, tmp_path):
    (tmp_path / "run").mkdir()
    start.keep_recipe(make_recipe(tmp_path), tmp_path / "run")
    more = ("ema.half_lives=[3.5]", "expected=[{step: 1, value: 2}]")
    with pytest.raises(AlphaflowError) as fault:
        start.prepare_run(
            make_recipe(tmp_path, "optim.lr=2e-3", "train.seed=4", "data.source=shapes:40", *more),
            start.TrainOptions(tmp_path / "run", store),
        )
    assert "optim.lr: 0.001 there, 0.002 requested" in str(fault.value)
    assert "train.seed: 0 there, 4 requested" in str(fault.value)
    assert 'data.source: "" there, shapes:40 requested' in str(fault.value)
    assert " there, [3.5] requested" in str(fault.value)
    assert "expected" not in str(fault.value)


def test_a_recipe_of_the_run_that_was_edited_or_is_gone_is_compared_with_what_was_trained(store, tmp_path):
    """Whatever stood in recipe.yaml was taken for the run's recipe: a run went on with another rate, without a word."""
    out, options = tmp_path / "run", start.TrainOptions(tmp_path / "run", store)
    run_disturbed(make_recipe(tmp_path), store, out, leave_at(12)).wait()
    edited = make_recipe(tmp_path, "optim.lr=2e-3", "eval.images=50")
    for written in (True, False):
        (out / "recipe.yaml").unlink(missing_ok=True)
        if written:
            start.keep_recipe(edited, out)
        with pytest.raises(AlphaflowError) as fault:
            start.prepare_run(edited, options)
        assert "another recipe:\n  optim.lr: 0.001 there, 0.002 requested\nPut these values back" in str(fault.value)
    start.prepare_run(make_recipe(tmp_path), options)
    start.keep_recipe(make_recipe(tmp_path, "eval.images=50", "sample.nfe=2", "train.keep=7"), out)
    start.prepare_run(make_recipe(tmp_path, "eval.images=50", "sample.nfe=2", "train.keep=7"), options)


@NEEDS_FSDP2
def test_a_run_may_go_on_with_another_journal_and_strategy(store, tmp_path):
    whole = train(make_recipe(tmp_path), store, tmp_path / "whole", processes=2)
    out = tmp_path / "run"
    run_disturbed(make_recipe(tmp_path), store, out, leave_at(12), processes=2).wait()
    changed = make_recipe(tmp_path, "train.log_every=1", "train.strategy=fsdp2", "train.keep=1")
    train(changed, store, out, processes=2)
    assert "log_every: 1\n" in (out / "recipe.yaml").read_text()
    assert largest_difference(whole, out) < 1e-4
    assert row_values(out, "step") == [3, 6, 9, *range(11, 21)]


def test_another_store_for_the_same_run_is_refused(store, tmp_path):
    recipe = make_recipe(tmp_path)
    out = train(recipe, store, tmp_path / "run")
    refused(begin(recipe, make_store(tmp_path / "other", 50), out), "was trained on a latent store with the digest")


def test_a_recipe_may_name_its_store_by_a_tilde(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(store.parent))
    recipe = make_recipe(tmp_path, f"data.store=~/{store.name}")
    assert start.prepare_run(recipe, start.TrainOptions(tmp_path / "run")) == store


def test_no_store_at_all_says_what_to_do(tmp_path):
    with pytest.raises(AlphaflowError, match="alphaflow prep-latents SOURCE --out DIR"):
        start.prepare_run(make_recipe(tmp_path), start.TrainOptions(tmp_path / "run"))


def test_a_changed_byte_in_the_store_is_found_before_the_first_step(tmp_path):
    store = make_store(tmp_path / "store")
    shard = next(store.glob("train-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(begin(make_recipe(tmp_path), store, tmp_path / "run"), "its bytes changed since it was written")


def test_more_processes_than_rows_of_a_batch_are_refused(tmp_path):
    with pytest.raises(AlphaflowError, match=r"17 processes for a batch of 16 rows.*at most 16"):
        start.count_processes(make_recipe(tmp_path), 17)


def test_a_store_smaller_than_a_batch_trains(tmp_path):
    recipe = make_recipe(tmp_path, "train.steps=3", "alpha=0.5", "train.save_every=3")
    train(recipe, make_store(tmp_path / "store", 3), tmp_path / "run", processes=4)


# Disks.


def kilobytes_of(folder):
    return sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink == 1) // 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_and_loses_nothing(processes, store, tmp_path):
    recipe = make_recipe(tmp_path)
    whole = train(recipe, store, tmp_path / "whole", processes=processes)
    with small_disk(tmp_path / "disk", int(kilobytes_of(whole) * 0.9)) as remount:
        out = tmp_path / "disk" / "run"
        started = begin(recipe, store, out, processes=processes)
        codes = started.wait()
        assert codes[0] == 1, started.said()
        assert 0 not in codes
        assert "cannot be written" in started.said()
        assert "No space left on device" in started.said()
        assert 5 <= saved_step(out) < 20
        assert state.newest_state(out) is not None
        remount("size=100m")
        train(recipe, store, out, processes=processes)
        assert_same(whole, out)


def test_a_file_that_cannot_grow_ends_the_run_and_loses_nothing(store, tmp_path):
    recipe, out = make_recipe(tmp_path), tmp_path / "run"
    options = start.TrainOptions(out, store)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        return start.train(recipe, options)

    refused(begin(recipe, store, out, work=limited), "cannot be written", "File too large", "What was there is kept")
    assert saved_step(out) == -1
    train(recipe, store, out)
    assert_same(train(recipe, store, tmp_path / "whole"), out)


def test_a_read_only_run_folder_is_named_before_the_start(store, tmp_path):
    with small_disk(tmp_path / "disk", 100) as remount:
        remount("ro")
        with pytest.raises(AlphaflowError, match=r"run: cannot be written \(Read-only file system\).*--out RUN"):
            start.prepare_run(make_recipe(tmp_path), start.TrainOptions(tmp_path / "disk" / "run", store))


def test_a_run_folder_that_becomes_read_only_ends_the_run(store, tmp_path):
    recipe = make_recipe(tmp_path)
    with small_disk(tmp_path / "disk", 100_000) as remount:
        out = tmp_path / "disk" / "run"
        start.prepare_run(recipe, start.TrainOptions(out, store))
        remount("ro")
        options = start.TrainOptions(out, store)
        started = fork(lambda: start.train(recipe, options), tmp_path / "errors")
        refused(started, "Read-only file system", "cannot be written")


def test_a_run_folder_under_a_file_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlphaflowError, match=r"cannot be written \(Not a directory\)"):
        start.prepare_run(make_recipe(tmp_path), start.TrainOptions(tmp_path / "file" / "run", store))


# Memory.


def out_of_memory_above(rows):
    """At twice as many rows, in the second micro-batch only: the first has left gradients and sums."""
    tried = []

    def disturb(run, step, batch):
        count = len(batch.y)
        if count > 2 * rows or (count > rows and (step, count) in tried) or run.world.size > 1:
            raise torch.OutOfMemoryError("simulated")
        tried.append((step, count))
        return batch

    return disturb


def test_a_step_that_runs_out_of_memory_goes_on_in_smaller_parts(store, tmp_path):
    recipe = make_recipe(tmp_path)
    started = run_disturbed(recipe, store, tmp_path / "run", out_of_memory_above(4))
    assert started.wait() == [0], started.said()
    assert "out of memory at step 0: going on with 1 process × 4 micro-batches of 4 rows = batch 16" in started.said()
    assert_same(train(recipe, store, tmp_path / "four", micro_batch=4), tmp_path / "run")


def test_the_smaller_parts_are_kept_when_the_run_resumes(store, tmp_path):
    recipe, out = make_recipe(tmp_path), tmp_path / "run"
    short, gone = out_of_memory_above(4), leave_at(11)
    first = run_disturbed(recipe, store, out, lambda *of: gone(*of[:2], short(*of)))
    assert first.wait() == [3], first.said()
    started = run_disturbed(recipe, store, out, out_of_memory_above(4))
    assert started.wait() == [0], started.said()
    assert "out of memory" not in started.said()


def test_a_micro_batch_that_was_asked_for_is_not_changed_silently(store, tmp_path):
    recipe = make_recipe(tmp_path)
    started = run_disturbed(recipe, store, tmp_path / "run", out_of_memory_above(4), micro_batch=8)
    refused(started, "out of memory at step 0 with micro-batches of 8 rows (simulated)", "--micro-batch 4")


def test_several_processes_say_what_to_do_instead_of_waiting_for_each_other(store, tmp_path):
    recipe = make_recipe(tmp_path)
    started = run_disturbed(recipe, store, tmp_path / "run", out_of_memory_above(4), processes=2)
    codes = started.wait(60)
    assert codes == [1, 1]
    assert "--micro-batch 4" in started.said()


@pytest.mark.parametrize(("rows", "limit", "fits"), [(256, 300, 256), (256, 100, 64), (37, 9, 5), (5, 1, 1)])
def test_the_probe_halves_until_it_fits(rows, limit, fits):
    asked = []

    def attempt(count):
        asked.append(count)
        if count > limit:
            raise torch.OutOfMemoryError("simulated")

    assert largest_that_fits(rows, attempt) == fits
    assert asked == sorted(asked, reverse=True)


def test_not_even_one_row_is_said():
    def attempt(count):
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(AlphaflowError, match="not even one row"):
        largest_that_fits(8, attempt)
