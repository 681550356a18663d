"""Training goes on where it was killed, bit for bit: weights, averages, optimiser, journal."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from train_helpers import (
    MEMBERS,
    assert_same,
    begin,
    case,
    largest_difference,
    left_behind,
    make_recipe,
    make_store,
    saved_step,
    train,
    wait_for_step,
)

from alphaflow_cli.model.find import step_of
from alphaflow_cli.runtime.launch import StopFlag
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start, state
from alphaflow_cli.train.journal import Journal, Trackers, read_rows
from alphaflow_cli.train.loop import train_steps

WAYS = {  # processes, micro-batch, --set
    "one process": (1, None, ()),
    "two processes": (2, None, ()),
    "accumulation": (1, 3, ()),
    "two processes and accumulation": (2, 3, ()),
    "fsdp2": (2, None, ("train.strategy=fsdp2",)),
    "soflow": (1, None, MEMBERS["soflow"]),
    "the boundary tangent": (1, None, MEMBERS["boundary"]),
    "improved MeanFlow": (1, 3, MEMBERS["imf"]),
    "improved MeanFlow, fsdp2": (2, None, (*MEMBERS["imf"], "train.strategy=fsdp2")),
    "gradient checkpointing in bf16": (1, None, ("train.precision=bf16", "train.gradient_checkpointing=true")),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The recipe, and a run of it in one process to its end."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = make_recipe(folder)
    return recipe, train(recipe, store, folder / "run")


@pytest.fixture
def finished(whole, tmp_path):
    """The same, to be changed."""
    return whole[0], Path(shutil.copytree(whole[1], tmp_path / "run"))


def interrupted_at(recipe, options, step, how):
    """Train until the end of this step, then: `kill` the process there and then, or ask it to `stop`."""
    world = join_world()
    run = start.open_run(recipe, options, world)
    book = Journal(options.out / "metrics.jsonl", run.step, writes=world.is_main)
    stop = StopFlag()

    def after(now):
        if now.step == step and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if now.step == step - 1 and how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)

    with stop:
        train_steps(run, book, stop, trackers=Trackers(recipe, world, options.out, run.step), after_save=after)
    assert run.step == step, "SIGTERM finishes the step, saves and leaves"
    return 143


def interrupt(recipe, store, out, step, how, processes, micro_batch):
    options = start.TrainOptions(out, store, micro_batch)
    started = begin(recipe, store, out, processes=processes, work=lambda: interrupted_at(recipe, options, step, how))
    expected = {"kill": -signal.SIGKILL, "stop": 143}[how]
    assert started.wait() == [expected] * processes, started.said()


SLOW = (
    "two processes",  # "two processes and accumulation" is the same and more
    "accumulation",
    "soflow",
    "the boundary tangent",
    "improved MeanFlow",
    "improved MeanFlow, fsdp2",
    "gradient checkpointing in bf16",
)


@pytest.mark.parametrize("way", [case(name, *[pytest.mark.slow] * (name in SLOW)) for name in WAYS])
def test_twenty_steps_are_ten_a_kill_and_ten_and_are_five_seven_and_eight(way, store, tmp_path):
    processes, micro_batch, sets = WAYS[way]
    recipe = make_recipe(tmp_path, *sets)
    whole = train(recipe, store, tmp_path / "whole", processes=processes, micro_batch=micro_batch)

    if way == "one process" or way in SLOW:
        once = tmp_path / "once"  # killed after step 12; 10 was saved
        interrupt(recipe, store, once, 12, "kill", processes, micro_batch)
        assert saved_step(once) == 10
        train(recipe, store, once, processes=processes, micro_batch=micro_batch)
        assert_same(whole, once)

    often = tmp_path / "often"  # asked to stop after 5, killed after 7 more, where 10 was saved
    interrupt(recipe, store, often, 5, "stop", processes, micro_batch)
    assert saved_step(often) == 5, "a stop saves where it is"
    interrupt(recipe, store, often, 12, "kill", processes, micro_batch)
    assert saved_step(often) == 10
    train(recipe, store, often, processes=processes, micro_batch=micro_batch)
    assert_same(whole, often)


def test_the_phases_are_all_there_and_the_journal_has_every_row_once(store, tmp_path):
    recipe = make_recipe(tmp_path)
    out = tmp_path / "run"
    interrupt(recipe, store, out, 13, "kill", 1, None)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [3, 6, 9, 12]
    train(recipe, store, out)
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18, 20]
    assert [row["phase"] for row in rows] == [*["flow"] * 2, *["between"] * 3, *["derivative"] * 2]
    assert (rows[0]["alpha"], rows[-1]["alpha"]) == (1, 0)


def test_a_run_moved_from_two_processes_to_one_and_back_differs_by_rounding_only(store, tmp_path):
    recipe = make_recipe(tmp_path, "train.precision=fp64")
    whole = train(recipe, store, tmp_path / "whole", processes=2)
    moved = tmp_path / "moved"
    interrupt(recipe, store, moved, 6, "kill", 2, None)
    interrupt(recipe, store, moved, 11, "kill", 1, None)
    train(recipe, store, moved, processes=2)
    assert largest_difference(whole, moved) < 1e-12
    same = ("step", "images_seen", "alpha", "phase", "equal_share", "lr", "nonfinite")
    rows = [[tuple(row[name] for name in same) for row in left_behind(out)["rows"]] for out in (whole, moved)]
    assert rows[0] == rows[1]
    for one, other in zip(left_behind(whole)["rows"], left_behind(moved)["rows"], strict=True):
        assert one["l"] == pytest.approx(other["l"], rel=1e-12)


def test_another_seed_is_another_run(whole, store, tmp_path):
    other = train(make_recipe(tmp_path, "train.seed=1"), store, tmp_path / "other")
    assert largest_difference(whole[1], other) > 1e-3


def kill_at_random(recipe, store, out, *, kills, processes, seed):
    """SIGKILL at random moments until that many hit; every start must resume. Returns the steps lost each time."""
    rng, lost, done = random.Random(seed), [], 0
    while done < kills:
        before = saved_step(out)
        started = begin(recipe, store, out, processes=processes)
        early = rng.random() < 0.2  # while it starts, perhaps; else some time after its first save, perhaps in the next
        if not early:
            wait_for_step(out, before + 1)
        signal.sigtimedwait([], rng.uniform(0, 0.4 if early else 0.06))
        victims = started.pids if processes == 1 or rng.random() < 0.5 else [rng.choice(started.pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in set(started.pids) - set(victims):  # what the agent does with those that are left
            signal.sigtimedwait([], 0.02)
            os.kill(pid, signal.SIGKILL)
        codes = started.wait()
        done += any(code == -signal.SIGKILL for code in codes)
        reached = max((row["step"] for row in read_rows(out / "metrics.jsonl")), default=0)
        lost.append(reached - max(saved_step(out), 0))
        newest = state.newest_state(out)
        assert saved_step(out) >= before + (not early), started.said()
        if newest is not None:
            files = {path.name for path in (out / "checkpoints" / newest.stem).iterdir()}
            assert files >= {"model.safetensors", "raw.safetensors", "ema-50.safetensors"}
        if saved_step(out) >= recipe.train.steps:
            break
    return done, lost


MANY = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.mark.parametrize(
    ("kills", "processes"), [(6, 1), pytest.param(100, 1, marks=MANY), pytest.param(30, 2, marks=MANY)]
)
def test_kills_at_random_moments_lose_nothing_beyond_the_save_interval(kills, processes, store, tmp_path):
    steps = 20 * kills
    recipe = make_recipe(
        tmp_path, f"train.steps={steps}", "train.save_every=4", "train.log_every=1", f"alpha.start={steps // 3}",
        f"alpha.end={steps // 2}",
    )  # fmt: skip
    out = tmp_path / "killed"
    done, lost = kill_at_random(recipe, store, out, kills=kills, processes=processes, seed=kills)
    assert done >= kills, f"the run ended after {done} kills"
    assert max(lost) <= recipe.train.save_every
    train(recipe, store, out, processes=processes, seconds=1200)
    whole = train(recipe, store, tmp_path / "whole", processes=processes, seconds=1200)
    assert_same(whole, out)
    assert not list(out.rglob(".*tmp")) + list(out.rglob(".trash*"))


def test_a_truncated_state_is_named_and_never_begins_a_run_anew(finished, store):
    recipe, out = finished
    path = state.newest_state(out)
    older = path.with_name("step-00000010.safetensors")
    older.write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:100_000])
    assert state.newest_state(out) == older
    older.unlink()
    rows = (out / "metrics.jsonl").read_text()
    started = begin(recipe, store, out)
    assert started.wait() == [1]
    assert f"{path}: truncated" in started.said()
    assert f"--init-from {out} with another --out" in started.said()
    assert (out / "metrics.jsonl").read_text() == rows


def test_the_model_file_at_the_top_is_the_newest_checkpoints(whole):
    out = whole[1]
    newest = out / "checkpoints" / "step-00000020" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == newest.read_bytes()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]
    assert oct(newest.stat().st_mode & 0o777) == "0o644"


def test_milestones_are_kept(store, tmp_path):
    out = train(make_recipe(tmp_path, "train.milestone_every=5", "train.keep=1"), store, tmp_path / "run")
    assert [step_of(path) for path in sorted((out / "checkpoints").iterdir())] == [5, 10, 15, 20]


def test_a_run_begun_anew_keeps_its_own_checkpoints_beside_later_ones(finished, store):
    """They were removed as soon as they were saved, because those of the lost work bore larger numbers."""
    recipe, out = finished
    shutil.rmtree(out / "state")  # as the line on a damaged state advises
    interrupt(recipe, store, out, 12, "kill", 1, None)
    assert saved_step(out) == 10
    assert [step_of(path) for path in sorted((out / "checkpoints").iterdir())] == [5, 10, 15, 20]
    train(recipe, store, out)
    assert [step_of(path) for path in sorted((out / "checkpoints").iterdir())] == [15, 20]


def test_a_finished_run_is_left_alone(finished, store):
    recipe, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    started = begin(recipe, store, out)
    assert started.wait() == [0]
    assert "the run is finished" in started.said()
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {p for p in after if after[p] != before[p]} <= {out / "metrics.jsonl"}


def test_weights_and_averages_are_apart_in_the_files(whole):
    from alphaflow_cli.model.checkpoint import load_checkpoint

    out = whole[1]
    folder, tensors = out / "checkpoints" / "step-00000020", left_behind(out)
    for file, head in {"model": "ema0", "ema-50": "ema1", "raw": "raw"}.items():
        checkpoint = load_checkpoint(folder / f"{file}.safetensors")
        assert (checkpoint.origin["step"], checkpoint.origin["images_seen"]) == (20, 320)
        for name, value in checkpoint.weights.items():
            assert torch.equal(value, tensors[f"{head}.{name}"]), (file, name)
