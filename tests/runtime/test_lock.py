"""One writer per folder: double starts, kills, other machines, processes that stood still, folders that cannot lock."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from latent_stores import prepare_latents
from train_helpers import (
    assert_same,
    begin,
    fork,
    make_recipe,
    make_store,
    row_values,
    saved_step,
    small_disk,
    train,
    wait_for_step,
)

from alphaflow_cli.cli import run as cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.hub.stage import open_publication, stage
from alphaflow_cli.runtime import lock
from alphaflow_cli.sample.grid import grid_png
from alphaflow_cli.train import start, state
from alphaflow_cli.train.journal import Journal

LONG = ("train.steps=5000", "alpha.start=10", "alpha.end=20", "train.save_every=5")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@contextlib.contextmanager
def held_elsewhere(folder, tmp_path, command="train"):
    """Another process holds the folder, until it is killed at the end."""

    def work():
        with lock.hold(folder, command):
            time.sleep(600)

    other = fork(work, tmp_path / "other")
    until = time.monotonic() + 20
    while not (folder / lock.NAME).is_file() or not (folder / lock.NAME).read_text().endswith("\n"):
        assert time.monotonic() < until, other.said()
        time.sleep(0.005)
    try:
        yield other
    finally:
        with contextlib.suppress(ProcessLookupError):
            other.signal(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            other.wait()


def rewrite(folder, *, age=0.0, **changes):
    """The lock as another owner would have left it, so many seconds ago."""
    path = folder / lock.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}) + "\n")
    os.utime(path, (time.time() - age,) * 2)


def left_by_a_kill(folder, tmp_path):
    with held_elsewhere(folder, tmp_path) as other:
        other.signal(signal.SIGKILL)
        other.wait()
    return folder


def test_of_eight_starts_of_one_run_one_trains_and_seven_are_refused_in_one_line(store, tmp_path, monkeypatch):
    recipe, out, open_run = make_recipe(tmp_path), tmp_path / "run", start.open_run
    options = start.TrainOptions(out, store)

    def open_when_all_have_knocked(*arguments):  # a run of twenty steps might end before the last one comes
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("errors-*/rank-0.json"))) < 7 and time.monotonic() < until:
            time.sleep(0.05)
        return open_run(*arguments)

    monkeypatch.setattr(start, "open_run", open_when_all_have_knocked)
    start.prepare_run(recipe, options)
    started = [fork(lambda: start.train(recipe, options), tmp_path / f"errors-{i}") for i in range(8)]
    codes = [each.wait()[0] for each in started]
    assert sorted(codes) == [0, *[1] * 7], [each.said() for each in started]
    for code, each in zip(codes, started, strict=True):
        if code:
            message = json.loads((each.folder / "rank-0.json").read_text())["message"]
            assert message.startswith(f"{out}: another command is writing here (train, process "), message
            assert "\n" not in message
            assert "Wait for it, end it (kill " in message
    assert row_values(out, "step") == [3, 6, 9, 12, 15, 18, 20], "the journal is whole"
    monkeypatch.undo()
    assert_same(train(recipe, store, tmp_path / "whole"), out)
    assert not (out / lock.NAME).exists()


def test_after_a_kill_the_next_start_goes_on_at_once_and_says_so(store, tmp_path):
    recipe, out = make_recipe(tmp_path, *LONG), tmp_path / "run"
    first = begin(recipe, store, out)
    wait_for_step(out, 5)
    refused = begin(recipe, store, out)
    assert refused.wait() == [1], refused.said()
    assert f"process {first.pids[0]} on " in refused.said()
    first.signal(signal.SIGKILL)
    first.wait()
    second = begin(recipe, store, out)
    wait_for_step(out, saved_step(out) + 1)
    second.signal(signal.SIGTERM)
    assert second.wait() == [143], second.said()
    assert "is gone; this command takes over" in second.said()
    assert not (out / lock.NAME).exists(), "a stop releases it"


def test_two_processes_are_one_owner_the_first(store, tmp_path):
    recipe, out = make_recipe(tmp_path, *LONG), tmp_path / "run"
    both = begin(recipe, store, out, processes=2)
    wait_for_step(out, 5)
    owner = json.loads((out / lock.NAME).read_text())
    assert owner["pid"] == both.pids[0]
    both.signal(signal.SIGTERM)
    assert both.wait() == [143, 143], both.said()
    assert not (out / lock.NAME).exists()


def test_a_parent_hands_its_lock_on_to_its_first_worker(tmp_path, monkeypatch):
    with lock.hold(tmp_path, "train"):
        worker = {**lock.hand_on(tmp_path)}

        def work():
            monkeypatch.setenv(lock.HANDED_ON, worker[lock.HANDED_ON])
            with lock.hold(tmp_path, "train"):
                assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
                os.kill(os.getpid(), signal.SIGKILL)

        assert fork(work, tmp_path / "worker").wait() == [-signal.SIGKILL]
    assert (tmp_path / lock.NAME).exists(), "it was the worker's, not the parent's any more"
    with lock.hold(tmp_path, "train"):
        pass
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("name", ["host", "machine"])
def test_another_machine_is_refused_before_five_minutes_and_goes_on_after(tmp_path, name):
    folder = left_by_a_kill(tmp_path / "run", tmp_path)
    rewrite(folder, age=290, **{name: "elsewhere"})
    line = r"Its last sign of life was 4:5\d ago; after 5:00 without one"
    with pytest.raises(AlphaflowError, match=line) as refusal, lock.hold(folder, "train"):
        pass
    assert "\n" not in str(refusal.value)
    rewrite(folder, age=301, **{name: "elsewhere"})
    with lock.hold(folder, "train"):
        assert json.loads((folder / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_got_since_is_no_owner(tmp_path):
    folder = left_by_a_kill(tmp_path / "run", tmp_path)
    rewrite(folder, pid=os.getpid(), started="1")
    with lock.hold(folder, "train"):
        pass


def test_a_process_that_ended_and_whose_parent_does_not_ask_is_no_owner(tmp_path):
    """In a container nobody may ask: its number stays, and so does its start time."""
    child = os.fork()
    if child == 0:
        with lock.hold(tmp_path / "run", "train"):
            os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays what it is, a zombie
    try:
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == child
        with lock.hold(tmp_path / "run", "train"):
            pass
    finally:
        os.waitpid(child, 0)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[[" * 50_000, "null", '{"pid": "x", "token": 3}'])
def test_a_lock_that_names_nobody_is_taken(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content)
    with lock.hold(tmp_path, "train"):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_what_a_lock_says_cannot_drive_a_terminal(tmp_path):
    folder = left_by_a_kill(tmp_path / "run", tmp_path)
    rewrite(folder, host="\x1b[2J elsewhere")
    with lock.hold(folder, "train"):
        pass


def test_of_many_that_see_a_dead_lock_exactly_one_wins(tmp_path):
    for turn in range(6):
        folder = left_by_a_kill(tmp_path / f"run-{turn}", tmp_path)
        at = time.monotonic() + 0.3

        def work(folder=folder, at=at):
            while time.monotonic() < at:
                pass
            try:
                with lock.hold(folder, "train"):
                    (folder / f"winner-{os.getpid()}").touch()
                    while len(list(folder.glob("refused-*"))) < 5 and time.monotonic() < at + 60:
                        time.sleep(0.01)  # a slow machine may start the others late
            except AlphaflowError:
                (folder / f"refused-{os.getpid()}").touch()
                raise

        tries = [fork(work, tmp_path / f"try-{i}") for i in range(6)]
        codes = [each.wait()[0] for each in tries]
        assert sorted(codes) == [0, 1, 1, 1, 1, 1], [each.said() for each in tries]
        assert len(list(folder.glob("winner-*"))) == 1


@pytest.mark.parametrize("kind", [AlphaflowError, SystemExit, KeyboardInterrupt])
def test_it_is_released_however_the_work_ends(tmp_path, kind):
    with pytest.raises(kind), lock.hold(tmp_path, "train"):
        raise kind
    assert list(tmp_path.iterdir()) == []


def test_holding_it_twice_in_one_process_is_once(tmp_path):
    with lock.hold(tmp_path, "train"):
        with lock.hold(tmp_path, "train"):
            pass
        assert (tmp_path / lock.NAME).exists()


def test_it_beats_and_stops_beating_when_it_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with lock.hold(tmp_path, "train"):
        os.utime(tmp_path / lock.NAME, (1, 1))
        time.sleep(0.5)
        assert (tmp_path / lock.NAME).stat().st_mtime > 1
    (tmp_path / lock.NAME).write_text("")
    os.utime(tmp_path / lock.NAME, (1, 1))
    time.sleep(0.2)
    assert (tmp_path / lock.NAME).stat().st_mtime == 1


def test_a_run_that_was_taken_over_while_it_stood_still_writes_nothing_more(store, tmp_path):
    out = tmp_path / "run"
    start.prepare_run(make_recipe(tmp_path), start.TrainOptions(out, store))
    book = Journal(out / "metrics.jsonl", 0, writes=True)
    with lock.hold(out, "train"):
        book.row({"step": 1}, step=1, batch=1)
        rewrite(out, token="of another", host="elsewhere")
        for write in (lambda: book.row({"step": 2}, step=2, batch=1), lambda: lock.check_lock(out)):
            with pytest.raises(AlphaflowError, match=r"on elsewhere took over at .*, while this one stood still"):
                write()
    assert row_values(out, "step") == [1]
    assert json.loads((out / lock.NAME).read_text())["host"] == "elsewhere", "not ours to remove"


def test_what_others_write_in_a_run_is_not_swept(tmp_path):
    others = ["latents/.train-00000.safetensors.12.tmp", ".results.json.12.tmp", "analysis/.conflict.json.12.tmp"]
    ours = ["checkpoints/.step-00000005.tmp/model.safetensors", "state/.step-00000005.safetensors.12.tmp"]
    ours += [".model.safetensors.12.tmp", "checkpoints/.trash-step-00000005/x", "samples/.step-00000005.png.12.tmp"]
    for name in [*others, *ours]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    state.sweep(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


# The verbs that write, and those that only read.


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return train(make_recipe(folder, "train.steps=4", "alpha=0.5", "train.save_every=4"), store, folder / "run")


def refusal_of(capsys, *line):
    capsys.readouterr()
    assert cli([*map(str, line)]) == 1
    told = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert len(told) == 1
    return told[0]


def test_a_second_prep_latents_of_one_store_is_refused(tmp_path, capsys):
    with held_elsewhere(tmp_path / "store", tmp_path, "prep-latents"):
        said = refusal_of(capsys, "prep-latents", "glyphs:20", "--out", tmp_path / "store")
    assert "another command is writing here (prep-latents, process " in said
    prepare_latents("glyphs:20", tmp_path / "store", size=32, autoencoder="none")
    assert not (tmp_path / "store" / lock.NAME).exists()


def test_a_second_analysis_of_one_run_is_refused(finished, store, tmp_path, capsys):
    with held_elsewhere(finished / "analysis", tmp_path, "analyze"):
        said = refusal_of(capsys, "analyze", finished, "--data", store, "--batch", "8", "--batches", "1")
    assert "another command is writing here (analyze, process " in said


def test_a_second_evaluation_of_the_same_pictures_is_refused_and_another_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ("reference", "glyphs:100", "--metrics", "fd-tiny", "-o", "a.safetensors")
    assert cli([*line]) == 0
    (work,) = (path for path in (tmp_path / "evals").iterdir() if path.is_dir())
    shutil.rmtree(work)
    with held_elsewhere(work, tmp_path, "eval or reference"):
        assert "another command is writing here" in refusal_of(capsys, *line[:-1], "b.safetensors")
        assert cli(["reference", "glyphs:120", "--metrics", "fd-tiny", "-o", "b.safetensors"]) == 0


def test_readers_take_no_lock(finished, store, tmp_path):
    with held_elsewhere(finished, tmp_path), held_elsewhere(store, tmp_path / "b", "prep-latents"):
        assert cli(["report", str(finished), "-o", str(tmp_path / "page.html")]) == 0
        assert cli(["analyze", str(finished), "--data", str(store), "--batch", "8", "--batches", "1"]) == 0


# Folders that cannot be locked.


def test_a_read_only_folder_is_one_line(tmp_path):
    with small_disk(tmp_path / "disk", 100) as remount:
        remount("ro")
        for folder in (tmp_path / "disk", tmp_path / "disk" / "new"):
            line = r"cannot be written \(Read-only file system\)"
            with pytest.raises(AlphaflowError, match=line), lock.hold(folder, "train"):
                pass


def test_a_lock_that_is_a_folder_or_a_link_is_one_line_and_nothing_is_written_through_it(tmp_path):
    (tmp_path / "a" / lock.NAME).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "b" / lock.NAME).symlink_to(tmp_path / "mine")
    for name in ("a", "b"):
        with pytest.raises(AlphaflowError, match="cannot be written"), lock.hold(tmp_path / name, "train"):
            pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_said_and_the_locks_text_still_holds(tmp_path, monkeypatch, capsys):
    def without(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    folder = left_by_a_kill(tmp_path / "run", tmp_path)
    monkeypatch.setattr(fcntl, "flock", without)
    with lock.hold(folder, "train"):
        assert "this file system has no locks (No locks available); start only one" in capsys.readouterr().err
    refusal = pytest.raises(AlphaflowError, match="another command is writing here")
    with held_elsewhere(folder, tmp_path), refusal, lock.hold(folder, "train"):
        pass


def test_the_lock_is_not_pushed(finished, tmp_path):
    (finished / "samples").mkdir()
    (finished / "samples" / "step-00000004.png").write_bytes(grid_png([[np.zeros((8, 8, 3), np.uint8)]]))
    with held_elsewhere(finished, tmp_path):
        stage(open_publication(finished, with_results=False), tmp_path / "staged", repo="user/name", licence="mit")
    assert not list((tmp_path / "staged").rglob(lock.NAME))


def test_a_full_disk_leaves_no_folder_behind_and_says_to_make_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(lock, "_write", full)
    line = r"cannot be written \(No space left on device\)\. Make room, or name another folder"
    with pytest.raises(AlphaflowError, match=line), lock.hold(tmp_path / "runs" / "new", "train"):
        pass
    assert not (tmp_path / "runs").exists()
    with pytest.raises(AlphaflowError, match=line), lock.hold(tmp_path / "there", "train"):
        pass
    assert (tmp_path / "there").is_dir()
