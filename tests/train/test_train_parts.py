"""The parts of the engine that stand alone: Slurm's variables, trackers, utilisation, signals, --init-from, FSDP2."""

import json
import os
import re
import signal
from dataclasses import asdict, replace
from importlib.util import find_spec

import pytest
import torch
from counting import count
from train_helpers import CPU, MEMBERS, begin, case, make_recipe, make_store, train

from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.recipe import load_recipe, speed
from alphaflow_cli.runtime.launch import StopFlag, check_processes, first_host, slurm_environment
from alphaflow_cli.runtime.processes import join_world
from alphaflow_cli.train import start
from alphaflow_cli.train.estimate import random_rows
from alphaflow_cli.train.journal import (
    Journal,
    check_trackers,
    console_line,
    flat,
    mean_asked_rows,
    mean_step_flops,
    peak_of,
    read_rows,
)
from alphaflow_cli.train.parallel import Split, check_sharding, split_batch
from alphaflow_cli.train.run import _other_meanings
from alphaflow_cli.train.step import Objective, training_step


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


# Slurm.

TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_a_task_of_a_job_step_is_a_worker():
    found = slurm_environment(TASK)
    assert found["RANK"] == "9"
    assert (found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("16", "1", "8")
    assert found["MASTER_ADDR"] == "gpu003"
    assert 20_000 <= int(found["MASTER_PORT"]) < 60_000
    assert found == slurm_environment({**TASK, "SLURM_PROCID": "9"}), "all tasks find the same port"
    assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0", "the one GPU it sees"
    assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": "0,1,2"})["LOCAL_RANK"] == "1"
    assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": ""})["LOCAL_RANK"] == "1", "it sees none"
    assert slurm_environment({**TASK, "MASTER_PORT": "1234"})["MASTER_PORT"] == "1234", "what is set is kept"


@pytest.mark.parametrize(
    "there",
    [{}, {**TASK, "RANK": "3"}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}],
)
def test_a_batch_script_a_single_task_and_torchrun_inside_srun_are_not(there):
    assert slurm_environment(there) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,9],login1", "gpu003"),
        ("a1,b2", "a1"),
        ("node7", "node7"),
        ("n[1,3]", "n1"),
        ("r[2-3]-ib", "r2-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_processes_inside_a_launcher_must_be_its_own_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("ALPHAFLOW_ERRORS", raising=False)
    check_processes(None)
    check_processes(4)
    with pytest.raises(AlphaflowError, match="--processes 2: a launcher has started 4 processes"):
        check_processes(2)


# Trackers.


def test_a_missing_tracker_names_the_extra(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    check_trackers(recipe)
    absent = replace(recipe, train=replace(recipe.train, trackers=("wandb",)))
    monkeypatch.setattr("alphaflow_cli.train.journal.find_spec", lambda name: None)
    with pytest.raises(AlphaflowError, match=r"pip install .*\[wandb\]', or do without"):
        check_trackers(absent)


def test_tensorboard_gets_the_rows_of_the_journal(store, tmp_path):
    if not find_spec("tensorboard"):
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(tmp_path, "train.trackers=[tensorboard]")
    out = train(recipe, store, tmp_path / "run", processes=2)
    events = EventAccumulator(str(next((out / "trackers").rglob("events*")).parent)).Reload()
    rows = read_rows(out / "metrics.jsonl")
    written = {event.step: event.value for event in events.Scalars("l")}
    assert written == {row["step"]: pytest.approx(row["l"]) for row in rows}


def test_numbers_are_flat():
    tree = {"step": 3, "l": 0.5, "l_bins": [None, 1.0], "phase": "flow", "model": {"dim": 8}, "none": None}
    assert flat(tree) == {"step": 3, "l": 0.5, "l_bins.1": 1.0, "phase": "flow", "model.dim": 8}
    assert all(isinstance(value, bool | int | float | str) for value in flat(asdict(load_recipe("b2"))).values())


# Utilisation.


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("guided", [False, True])
def test_the_formula_counts_what_the_dispatcher_counts(alpha, guided, tmp_path):
    guidance = () if guided else ("guidance.omega=1", "guidance.kappa=0")
    sizes = ("data.latent_size=16", "data.image_size=128", "model.dim=192", "model.heads=3")
    recipe = make_recipe(tmp_path, *guidance, *sizes)  # compiled, every row is asked
    net, rows, settings = build_network(recipe), random_rows(recipe, 16, 4, CPU), Objective.of(recipe)
    counted = count(lambda: training_step(net, net, rows, alpha=alpha, objective=settings).loss.backward()).flops
    assert mean_step_flops(recipe, alpha, 4, compiled=True) == pytest.approx(counted, rel=0.04)


def test_it_counts_improved_meanflow_too(tmp_path):
    """Its velocity's own blocks on the graded rows, and shared and velocity blocks on those that are asked."""
    sizes = ("data.latent_size=16", "data.image_size=128", "model.dim=192", "model.heads=3")
    recipe = make_recipe(tmp_path, *MEMBERS["imf"], *sizes)
    net, rows, settings = build_network(recipe), random_rows(recipe, 16, 4, CPU), Objective.of(recipe)
    counted = count(lambda: training_step(net, net, rows, alpha=0.0, objective=settings).loss.backward()).flops
    assert mean_step_flops(recipe, 0.0, 4, compiled=True) == pytest.approx(counted, rel=0.02)


def test_guidance_asks_about_so_many_rows_in_the_mean(tmp_path):
    """XL/2's interval and dropout: 93% of single draws and 87% of the later of two lie below .75 (normal tables)."""
    sets = ("guidance.omega=0.2", "guidance.kappa=0.92", "guidance.t_max=0.75", "guidance.label_dropout=0.1")
    recipe = make_recipe(tmp_path, *sets, "train.batch=256")
    equal, later = 0.9332, 0.9332**2  # Φ((ln 3 + .4) / 1)
    for n_equal, expected in ((0, later * 1.9), (128, (equal * 0.9 + later * 1.9) / 2), (256, equal * 0.9)):
        assert mean_asked_rows(recipe, n_equal, compiled=False) / 256 == pytest.approx(expected, rel=0.01)
    assert mean_asked_rows(recipe, 128, compiled=True) == 256 + 128


def test_the_peak_is_known_for_bf16_on_known_devices_only():
    assert peak_of("NVIDIA H200", "bf16") == 989e12
    assert peak_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_of("NVIDIA H200", "fp32") is None
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert peak_of("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16") is None
    assert peak_of("Some other GPU", "bf16") is None


def test_latents_that_other_programs_leave_no_room_for_are_not_kept_on_the_gpu(store, monkeypatch):
    gpu, size = torch.device("cuda"), 48 * 2 * read_manifest(store).plan.sample_bytes
    for free, fits in ((4 * size, True), (size, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 100 * size))
        assert start.fits_on_device(store, False, gpu) is fits
    assert not start.fits_on_device(store, False, CPU)


@pytest.mark.parametrize(("capability", "warned"), [((7, 5), True), ((9, 0), False)])
def test_a_run_in_bf16_on_a_gpu_without_it_says_so(store, tmp_path, monkeypatch, capsys, capability, warned):
    options = start.TrainOptions(tmp_path, store)
    run = start.open_run(make_recipe(tmp_path, "train.precision=bf16"), options, join_world(device="cpu"))
    run.world = replace(run.world, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    capsys.readouterr()
    start.say_where(run, options)
    line = "beware: Tesla T4 imitates bf16, slowly: --set train.precision=fp32"
    assert (line in capsys.readouterr().err) is warned


def test_b4_needs_the_published_gigaflops():
    """5.6 per forward of DiT-B/4 at 256 px, multiply-adds counted once: arXiv:2212.09748, table 1."""
    assert speed.forward_flops(load_recipe("b4")) / 2e9 == pytest.approx(5.6, rel=0.02)


def test_the_journal_tells_the_share_of_the_peak(tmp_path):
    book = Journal(tmp_path / "metrics.jsonl", 0, writes=True, device_flops=1e12)
    book.started -= 2.0
    row = book.row({"step": 4}, step=4, batch=8, flops=1e11)
    assert row["utilisation"] == pytest.approx(0.2, rel=0.05)
    assert "utilisation" not in Journal(tmp_path / "other.jsonl", 0, writes=True).row({}, step=1, batch=1, flops=1.0)


# Signals.


def test_one_signal_asks_its_echo_is_ignored_a_later_one_leaves(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("alphaflow_cli.runtime.launch.time.monotonic", lambda: clock[0])
    with StopFlag() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        clock[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        clock[0] += 1.0
        os.kill(os.getpid(), signal.SIGUSR1)  # Slurm's warning: it asks to save, and never to leave without
        assert stop.signal == signal.SIGINT
        with pytest.raises(SystemExit) as leaving:
            os.kill(os.getpid(), signal.SIGTERM)
        assert leaving.value.code == 143


# --init-from.


def test_a_run_begins_with_the_weights_of_another(store, tmp_path):
    first = train(make_recipe(tmp_path), store, tmp_path / "first")
    recipe = make_recipe(tmp_path, "train.seed=5", "train.steps=1", "optim.lr=1e-30", "alpha=1")
    out = tmp_path / "second"
    started = begin(recipe, store, out, init_from=str(first))
    assert started.wait() == [0], started.said()
    assert "tensors taken (step 20)" in started.said()
    there, here = (load_checkpoint(folder / "model.safetensors") for folder in (first, out))
    assert here.origin["init_from"] == str(first)
    for name, value in there.weights.items():
        torch.testing.assert_close(here.weights[name], value)


@pytest.mark.parametrize("strategy", [*map(case, ["ddp", "fsdp2"])])
def test_a_label_table_of_another_size_is_fresh_and_said(strategy, store, tmp_path):
    first = train(make_recipe(tmp_path), store, tmp_path / "first")
    sets = ("guidance.label_dropout=0", "guidance.omega=1", "guidance.kappa=0", "model.second_time=r", "train.steps=1")
    recipe = make_recipe(tmp_path, *sets, "alpha=1", "optim.lr=1e-30", f"train.strategy={strategy}")
    started = begin(recipe, store, tmp_path / "second", init_from=str(first), processes=2)
    assert started.wait() == [0, 0], started.said()
    assert "freshly initialised: label_embed.weight" in started.said()
    assert "beware: model.second_time: t-r in the checkpoint, r in this run" in started.said()
    there, here = (load_checkpoint(folder / "model.safetensors").weights for folder in (first, tmp_path / "second"))
    assert here["label_embed.weight"].shape == (10, 32)
    torch.testing.assert_close(here["blocks.0.mlp.fc1.weight"], there["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("head", [0, 1])
def test_a_velocity_that_is_not_in_the_checkpoint_begins_as_u(head, store, tmp_path):
    imf = [text for text in MEMBERS["imf"] if "velocity_head" not in text]
    first = train(make_recipe(tmp_path, *imf, "train.steps=10", "alpha=0"), store, tmp_path / "first")
    sets = (*imf, f"model.velocity_head={head}", "train.steps=1", "alpha=0", "optim.lr=1e-30")
    started = begin(make_recipe(tmp_path, *sets), store, tmp_path / "second", init_from=str(first))
    assert started.wait() == [0], started.said()
    copied = re.search(r"the velocity, which is not in the checkpoint, begins as u: (\d+) tensors", started.said())
    taken = re.search(r"(\d+) of (\d+) tensors taken", started.said())
    assert copied
    assert taken
    assert int(taken[1]) + int(copied[1]) == int(taken[2]), "what was copied was not taken"
    assert "freshly initialised" not in started.said()
    there, here = (load_checkpoint(folder / "model.safetensors").weights for folder in (first, tmp_path / "second"))
    pairs = [("velocity_final.linear.weight", "final.linear.weight")]
    pairs += [("velocity_blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")] if head else []
    for velocity, u in pairs:
        torch.testing.assert_close(here[velocity], there[u])
        assert there[u].abs().max() > 0


def test_settings_that_give_equal_weights_another_meaning_are_said(tmp_path):
    """Other heads have the same shapes, and nothing was said of them."""
    there = make_recipe(tmp_path, "model.prediction=data")
    here = make_recipe(tmp_path, "model.prediction=data", "model.heads=4", "model.t_floor=0.1", "optim.lr=1")
    lines = _other_meanings(there, here)
    assert [line.partition(" in the")[0] for line in lines] == ["beware: model.heads: 2", "beware: model.t_floor: 0.05"]


def test_another_architecture_is_refused_with_shapes(store, tmp_path):
    first = train(make_recipe(tmp_path), store, tmp_path / "first")
    with pytest.raises(
        AlphaflowError, match=r"another architecture\. pos_embed: \(1, 4, 32\) there, \(1, 4, 64\) here"
    ):
        begin(make_recipe(tmp_path, "model.dim=64"), store, tmp_path / "second", init_from=str(first))


# FSDP2.


def test_fsdp2_needs_a_newer_torch_no_conflict_and_a_later_row_in_every_micro_batch(tmp_path):
    recipe = make_recipe(tmp_path, "train.strategy=fsdp2")
    check_sharding(recipe, Split(16, 2, 1), "2.13.0")
    check_sharding(recipe, Split(16, 1, 16), "2.6.0")  # one process shards nothing
    with pytest.raises(AlphaflowError, match=r"fsdp2 needs torch 2\.13 or newer, this is 2\.12\.1\+cu128"):
        check_sharding(recipe, Split(16, 2, 1), "2.12.1+cu128")
    measured = replace(recipe, train=replace(recipe.train, conflict_every=5))
    check_sharding(measured, Split(16, 1, 1), "2.13.0")
    with pytest.raises(AlphaflowError, match="conflict_every: the conflict needs the whole network on one device"):
        check_sharding(measured, Split(16, 2, 1), "2.13.0")
    check_sharding(recipe, Split(16, 4, 3), "2.13.0")  # 12 r < t rows, 12 parts
    with pytest.raises(AlphaflowError, match="12 r < t rows for 16 micro-batches"):
        check_sharding(recipe, Split(16, 4, 4), "2.13.0")


# The journal and the console.


def test_the_journal_has_the_promised_fields_and_the_line_is_readable(store, tmp_path):
    out = train(make_recipe(tmp_path), store, tmp_path / "run")
    row = read_rows(out / "metrics.jsonl")[-1]
    assert list(row) == [
        "step", "images_seen", "alpha", "phase", "equal_share", "lr", "l", "l_later", "l_tfm", "l_tc", "v_loss",
        "l_bins", "grad_norm", "clipped", "nonfinite", "seconds_per_step", "images_per_second",
    ]  # fmt: skip
    assert row["images_seen"] == 320
    assert len(row["l_bins"]) == 8
    assert row["lr"] == 1e-3
    line = console_line({**row, "nonfinite": 2})
    assert line.startswith("α 0.000  l ")
    assert "NON-FINITE 2" in line


def test_the_unweighted_loss_is_the_mean_over_all_rows(store, tmp_path):
    out = train(make_recipe(tmp_path), store, tmp_path / "run")
    for row in read_rows(out / "metrics.jsonl"):
        assert row["l"] == pytest.approx(0.75 * row["l_later"] + 0.25 * row["v_loss"], rel=1e-9)


def test_rows_that_a_kill_cut_off_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 2}) + "\n" + json.dumps({"step": 4}) + "\n" + '{"step": 6, "l": 0.')
    Journal(path, 4, writes=True)
    assert read_rows(path) == [{"step": 2}, {"step": 4}]
    Journal(path, 3, writes=True)
    assert path.read_text() == '{"step": 2}\n'


def test_the_store_stays_on_the_host_without_a_gpu(store):
    assert not start.fits_on_device(store, False, CPU)


def test_a_split_says_of_how_many_rows_its_micro_batches_are():
    assert str(split_batch(8, processes=1, micro_batch=3)) == "1 process × 3 micro-batches of at most 3 rows = batch 8"
    assert str(split_batch(8, processes=2, micro_batch=2)) == "2 processes × 2 micro-batches of 2 rows = batch 8"
    assert str(split_batch(1, processes=1, micro_batch=None)) == "1 process × 1 micro-batch of 1 row = batch 1"
