"""The number of threads of a run on a CPU: chosen by a few steps, stored, kept, and changed where no bit changes."""

import math
import re

import pytest
import torch
from train_helpers import assert_same, make_recipe, make_store

from alphaflow_cli.cli import run as cli
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.runtime.threads import Cores
from alphaflow_cli.train import start, state
from alphaflow_cli.train import threads as choosing

TWO = Cores(2, "2 cores")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture
def two_cores(monkeypatch):
    """As on a machine of two cores whose user has said nothing. The number is noted only: threads that wait spin."""
    number = [2]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("alphaflow_cli.runtime.threads.cores_here", lambda: TWO)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[-1])
    monkeypatch.setattr(torch, "set_num_threads", number.append)
    return number


def train(tmp_path, store, *words, out="run"):
    make_recipe(tmp_path)
    recipe = str(tmp_path / "tiny.yaml")
    return cli(["train", recipe, "--data", str(store), "--out", str(tmp_path / out), *words])


def stored(folder):
    path = state.newest_state(folder)
    assert path is not None
    return state.read_facts(path).threads


@pytest.mark.parametrize(("one", "two", "chosen"), [(0.1, 0.2, 1), (0.2, 0.1, 2)])
def test_the_faster_number_is_chosen_said_stored_and_kept(
    one, two, chosen, two_cores, store, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(choosing, "measure_threads", lambda *_: (one, two))
    assert train(tmp_path, store, "--set", "train.steps=10", "--set", "alpha.end=8") == 0
    words = f"threads: {chosen} (2 cores; a step took {one} s with 1, {two} s with 2)"
    assert words in capsys.readouterr().err
    assert stored(tmp_path / "run") == chosen
    monkeypatch.setattr(choosing, "measure_threads", lambda *_: (two, one))  # now the other would win
    assert train(tmp_path, store, "--set", "train.steps=15", "--set", "alpha.end=8") == 0
    assert f"threads: {chosen} (as the run began)" in capsys.readouterr().err
    assert stored(tmp_path / "run") == chosen


def test_the_users_number_holds_is_said_and_a_change_on_the_way_too(two_cores, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert train(tmp_path, store, "--set", "train.steps=10", "--set", "alpha.end=8") == 0
    assert "threads: 2 (OMP_NUM_THREADS=2)" in capsys.readouterr().err
    assert train(tmp_path, store, "--set", "train.steps=15", "--set", "alpha.end=8", "--threads", "1") == 0
    err = capsys.readouterr().err
    assert "threads: 1 (--threads)" in err
    assert "beware: the run computed with 2 threads so far" in err
    assert train(tmp_path, store, "--threads", "zero") == 2
    assert "'zero' is not a whole number from 1 to 1,024" in capsys.readouterr().err


def test_measuring_changes_no_bit_and_takes_no_longer_than_a_second(two_cores, store, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    world = join_world(device="cpu")
    before = torch.random.get_rng_state()
    one, two = choosing.measure_threads(recipe, 16, 2, 1_000, world)
    assert 0 < one < math.inf
    assert two > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(choosing, "CORE_FLOPS", 1e4)  # a step of hours, by arithmetic
    assert choosing.measure_threads(recipe, 16, 2, 4, world) == (0.0, 0.0), "too few steps to pay for it"
    monkeypatch.undo()


def test_a_step_that_waits_too_long_is_broken_off(two_cores, tmp_path):
    recipe = make_recipe(tmp_path)
    trial = choosing.Trial(recipe, torch.device("cpu"), compiled=False)
    done = []
    choosing._cut_short(trial.net, lambda: done.append(trial.step(16, 17)), 60)
    choosing._cut_short(trial.net, lambda: done.append(trial.step(16, 17)), -1)
    assert len(done) == 1
    trial.step(16, 17)  # no hook is left behind


def watched(tmp_path, store, monkeypatch, *words, one, same):
    """A run with two threads whose steps take four times as long from step 12 on; its folder and what it said."""
    make_recipe(tmp_path)
    monkeypatch.setattr(choosing, "measure_threads", lambda *_: (0.2, 0.1))
    monkeypatch.setattr(choosing, "try_one_thread", lambda run, several: (one, same))
    numbers = []

    class Slower(choosing.Watch):
        def __exit__(self, *_):
            numbers.append(torch.get_num_threads())
            self.seconds, self.steps = self.seconds + (0.1 if self.run.step < 12 else 0.4), self.steps + 1

    monkeypatch.setattr("alphaflow_cli.train.loop.Watch", Slower)
    assert train(tmp_path, store, *words) == 0
    return numbers


def test_a_run_that_becomes_slow_takes_one_thread_where_the_bits_stay_until_the_phase_ends(
    two_cores, store, tmp_path, monkeypatch, capsys
):
    numbers = watched(tmp_path, store, monkeypatch, one=0.15, same=True)
    err = capsys.readouterr().err
    assert "a step takes 0.4 s, and took 0.1 s before: this machine is busy otherwise" in err
    assert err.count("going on with 1 thread instead of 2 (0.15 s), which computes the same bits here") == 2, (
        "once in a phase"
    )
    assert numbers[:15] == [2] * 15
    assert numbers[15:] == [1] * 5
    assert 2 in two_cores[two_cores.index(1) :], "another phase begins with its own number"
    assert stored(tmp_path / "run") == 2


def test_a_run_that_becomes_slow_is_advised_where_bits_would_change(two_cores, store, tmp_path, monkeypatch, capsys):
    numbers = watched(tmp_path, store, monkeypatch, one=0.15, same=False)
    assert "stop the run and add --threads 1" in capsys.readouterr().err
    assert set(numbers) == {2}


def test_the_users_own_number_is_not_changed_on_the_way(two_cores, store, tmp_path, monkeypatch, capsys):
    numbers = watched(tmp_path, store, monkeypatch, "--threads", "2", one=0.15, same=True)
    assert "with 1 thread it takes 0.15 s. Nothing is changed" in capsys.readouterr().err
    assert set(numbers) == {2}


def test_nothing_is_said_where_one_thread_would_be_no_faster(two_cores, store, tmp_path, monkeypatch, capsys):
    numbers = watched(tmp_path, store, monkeypatch, one=0.5, same=True)
    assert not re.search("busy otherwise|--threads 1", capsys.readouterr().err)
    assert set(numbers) == {2}


def test_the_test_of_bits_sees_a_sum_that_is_cut_otherwise_and_changes_nothing_of_the_run(
    two_cores, store, tmp_path, monkeypatch
):
    recipe = make_recipe(tmp_path, "guidance.omega=1", "guidance.kappa=0", "train.steps=20")
    run = start.open_run(recipe, start.TrainOptions(tmp_path / "run", store), join_world(device="cpu"))
    run.step = 1
    before = {name: weight.clone() for name, weight in run.optimiser.parameters.items()}
    seconds, same = choosing.try_one_thread(run, 1)
    assert seconds > 0
    assert same, "one thread twice"
    step = choosing.Trial.step

    def otherwise(trial, count, at):
        step(trial, count, at)
        if torch.get_num_threads() == 2:
            trial.optimiser.weights[0].data.add_(1e-6)

    monkeypatch.setattr(choosing.Trial, "step", otherwise)
    assert not choosing.try_one_thread(run, 2)[1]
    assert all(torch.equal(before[name], weight) for name, weight in run.optimiser.parameters.items())
    monkeypatch.setattr(choosing.Trial, "step", step)
    guided = make_recipe(tmp_path, "train.steps=20")
    run = start.open_run(guided, start.TrainOptions(tmp_path / "guided", store), join_world(device="cpu"))
    run.step = 1
    assert not choosing.try_one_thread(run, 1)[1], "guidance asks another number of rows at every step"


def test_a_run_that_measured_first_is_bit_for_bit_the_one_that_did_not(two_cores, store, tmp_path, monkeypatch):
    assert train(tmp_path, store, "--threads", "1", out="plain") == 0
    real = choosing.measure_threads

    def measured(*words):
        assert min(real(*words)) > 0
        return 0.1, 0.2

    monkeypatch.setattr(choosing, "measure_threads", measured)
    assert train(tmp_path, store, out="measured") == 0
    assert_same(tmp_path / "plain", tmp_path / "measured")
