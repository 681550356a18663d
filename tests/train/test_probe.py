"""What is measured before a run is what will run: its phases, its shares, and its compiled blocks."""

from types import SimpleNamespace

import pytest
import torch
from other_device import other_device
from train_helpers import CPU, fork, make_recipe

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.train import compiling, estimate, graphs, start

KINDS = ("flow", "between", "derivative")


@pytest.fixture
def compiled(monkeypatch):
    """The networks whose blocks were compiled, without a compiler's minutes."""
    found = []

    def compile_eagerly(net):
        found.append(compile_blocks(net, backend="eager"))
        return net

    monkeypatch.setattr(estimate, "compile_blocks", compile_eagerly)
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo itself
@pytest.mark.parametrize("setting", [True, False])
def test_an_estimate_compiles_what_the_run_compiles(compiled, tmp_path, monkeypatch, setting):
    """In a process of its own: a compiled backward pass starts threads, beside which no later test could fork."""
    recipe = make_recipe(tmp_path)
    assert estimate.choose_compile is start.choose_compile  # one decision, of the run and of its estimate
    monkeypatch.setattr(estimate, "choose_compile", lambda *facts: setting)

    def check():
        measured, is_compiled = estimate.measure_run(recipe, 8, 1, None, ready=lambda world, rows: None)
        rows, text = estimate.estimate_training(recipe, measured, compiled=is_compiled)
        assert [(row["phase"], row["compiled"]) for row in rows] == [(kind, setting) for kind in KINDS]
        assert all(row["seconds_per_step"] > 0 for row in rows)
        assert [net.compiled for net in compiled] == ([True] if setting else [])
        assert text[-1] == ("compiled, as the run will be" if setting else "not compiled, as the run will be")

    started = fork(check, tmp_path / "errors")
    assert started.wait() == [0], started.said()


@pytest.mark.parametrize(
    ("setting", "gain", "graphed"), [("auto", 0.0, True), ("auto", 1e9, False), ("true", 1e9, True)]
)
def test_an_estimate_replays_what_the_run_replays(tmp_path, monkeypatch, setting, gain, graphed):
    assert estimate.choose_graphs is start.choose_graphs
    monkeypatch.setattr(compiling, "why_launched", lambda *facts: "")
    monkeypatch.setattr(compiling, "GAIN", gain)
    monkeypatch.setattr(graphs, "Capturing", lambda: lambda work: work)
    recipe = make_recipe(tmp_path, f"train.graphs={setting}")
    measured, _ = estimate.measure_run(recipe, None, 1, "cpu", ready=lambda world, rows: None)
    rows, text = estimate.estimate_training(recipe, measured, compiled=False)
    assert [(row["phase"], row["graph"]) for row in rows] == [(kind, graphed) for kind in KINDS]
    assert text[-1] == f"not compiled{', each step one CUDA graph' if graphed else ''}, as the run will be"
    assert estimate.measure_run(recipe, 8, 2, "cpu", ready=lambda world, rows: None)[0][0].graphed is False


def test_an_estimate_times_micro_batches_as_large_as_the_runs(monkeypatch, tmp_path):
    """At most 5 of 16 rows make four parts of 4; four of 5 were counted, a quarter more than there is."""
    seen = []
    monkeypatch.setattr(estimate, "measure_phases", lambda recipe, *rows, **_: seen.append(rows) or [])
    for fits, processes in ((5, 1), (16, 1), (16, 8)):
        estimate.measure_run(make_recipe(tmp_path), fits, processes, "cpu", ready=lambda world, rows: None)
    assert [micro_batch for micro_batch, _ in seen] == [4, 16, 2]


def test_the_probe_of_memory_tries_compiled_blocks_on_what_fits_eagerly(monkeypatch, tmp_path):
    tried = []

    class Trial:
        def __init__(self, recipe, device, *, compiled, processes):
            self.compiled, self.processes = compiled, processes

        def phases(self, count):
            assert self.processes == 2
            tried.append((self.compiled, count))
            if count > (4 if self.compiled else 8):
                raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(estimate, "Trial", Trial)
    assert estimate._rows_that_fit(make_recipe(tmp_path), CPU, 32, compiled=True, processes=2) == 4
    assert tried == [(False, 32), (False, 16), (False, 8), (True, 8), (True, 4)]
    tried.clear()
    assert estimate._rows_that_fit(make_recipe(tmp_path), CPU, 32, compiled=False, processes=2) == 8
    assert tried == [(False, 32), (False, 16), (False, 8)]


@pytest.mark.parametrize(("strategy", "line"), [("fsdp2", "such as --micro-batch 1"), ("ddp", "not even one row fits")])
def test_a_sharded_network_that_fits_no_gpu_as_a_whole_asks_for_its_rows(monkeypatch, tmp_path, strategy, line):
    """It was said not to fit, although it is sharded because it does not."""

    class Trial:
        def __init__(self, *_, **__):
            pass

        def phases(self, count):
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(estimate, "Trial", Trial)
    world = SimpleNamespace(device=torch.device("cuda"), size=2)
    with pytest.raises(AlphaflowError, match=line):
        estimate.micro_batch_that_fits(make_recipe(tmp_path, f"train.strategy={strategy}"), world, compiled=False)


def test_a_trial_takes_the_shares_of_the_step_that_it_stands_for(monkeypatch, tmp_path):
    recipe = make_recipe(tmp_path, "times.equal_share={kind: linear, initial: 0.75, final: 0.25, start: 0, end: 20}")
    trial, seen = estimate.Trial(recipe, CPU, compiled=False), []
    monkeypatch.setattr(trial, "step", lambda count, at: seen.append((count, at)))
    trial.phases(16)
    assert seen == [(16, 5), (16, 14), (16, 19)]
    rows = []
    take = estimate.random_rows
    monkeypatch.setattr(estimate, "random_rows", lambda *args: rows.append(args[2]) or take(*args))
    for at in (0, 19):
        estimate.Trial.step(trial, 16, at)
    assert rows == [12, 4]


def test_steps_in_fp32_of_a_run_in_bf16_are_tried_and_timed_apart(monkeypatch, tmp_path):
    """They take more memory and time than the steps in bf16 by which they were judged."""
    recipe = make_recipe(tmp_path, "train.precision=bf16", "train.precise_below=0.5")
    seen = []
    monkeypatch.setattr(estimate.Trial, "step", lambda trial, count, at: seen.append(at))
    estimate.Trial(recipe, CPU, compiled=False).phases(16)
    assert seen == [0, 6, 11, 15]
    measured, _ = estimate.measure_run(recipe, 16, 1, "cpu", ready=lambda world, rows: None)
    rows, text = estimate.estimate_training(recipe, measured, compiled=False)
    parts = [("flow", 6, False), ("between", 5, False), ("between", 4, True), ("derivative", 5, False)]
    assert [(row["phase"], row["steps"], row["precise"]) for row in rows] == parts
    assert [line.partition(":")[0] for line in text[1:3]] == ["between", "between in fp32"]


@pytest.mark.parametrize(("processes", "strategy"), [(1, "ddp"), (2, "fsdp2"), (2, "ddp")])
def test_a_trials_first_step_has_beside_it_what_a_runs_later_steps_have(monkeypatch, tmp_path, processes, strategy):
    """Adam's moments, and where DDP keeps gradients in its buckets, their memory."""
    recipe = make_recipe(tmp_path, "alpha.kind=constant", "alpha.initial=0", f"train.strategy={strategy}")
    trial, seen = estimate.Trial(recipe, CPU, compiled=False, processes=processes), []
    step = trial.step

    def look(count, at):
        trained, moments = trial.optimiser.trained, trial.optimiser.adam.state
        seen.append((all(moments[w] for w in trained), {w.grad is None for w in trained}))
        step(count, at)

    monkeypatch.setattr(trial, "step", look)
    trial.phases(4)
    assert seen == [(True, {(processes, strategy) != (2, "ddp")})]


def test_on_a_gpu_the_rows_of_the_whole_batch_are_tried(monkeypatch, tmp_path):
    with other_device(monkeypatch) as device:
        resets = []
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(device.ran))
        world = SimpleNamespace(size=2, device=torch.device("cuda"), largest=lambda value: value)
        assert estimate.micro_batch_that_fits(make_recipe(tmp_path), world, compiled=False) == 8
    assert device.ran > 0
    assert resets == [device.ran], "the run's peak is told without what was tried"
